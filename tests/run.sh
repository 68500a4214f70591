#!/usr/bin/env bash
# Make the environment if need be, then run pytest with the arguments given; without any, all but the slow tests and those for a GPU.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

[ $# -gt 0 ] || set -- -m "not slow and not gpu"
echo "tests: python -m pytest $*"
exec python -m pytest "$@"
