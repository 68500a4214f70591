#!/usr/bin/env bash
# Make the environment if need be, then run the demo: launch/demo.sh [arguments of `kto-ds demo`]
set -euo pipefail

here=$(dirname "${BASH_SOURCE[0]}")
source "$here/ranks.sh" # before anything that takes time
source "$here/environment.sh"

echo "demo: kto-ds demo $*"
run kto-ds demo "$@"
