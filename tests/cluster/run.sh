#!/usr/bin/env bash
# All tests of the launch scripts on several hosts and under SLURM, as root: bash tests/cluster/run.sh [arguments of pytest]
# What is not installed (tests/cluster/install.sh) is skipped with a reason; takes some 15 minutes on 2 cores.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/environment.sh

echo "cluster tests: python -m pytest tests/cluster $*"
exec python -m pytest tests/cluster "$@"
