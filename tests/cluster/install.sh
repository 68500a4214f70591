#!/usr/bin/env bash
# Install what tests/cluster needs, on Debian or Ubuntu, as root. No service is started: the tests start what they need, with settings of their own.
set -euo pipefail

packages=(iproute2 munge openssh-server pdsh shellcheck slurm-client slurmctld slurmd)
echo "cluster tests: apt-get install ${packages[*]}"
apt-get update -qq
# Debian's way to keep a package from starting its service, for as long as this runs.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}"
