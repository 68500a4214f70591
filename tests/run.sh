#!/usr/bin/env bash
# Make the environment if need be, then run pytest with the arguments given; without any, all but the slow tests and those for a GPU, three files at a time.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

# In the order of the folders, long files ahead of short ones, so that no worker is left with a long one at the end.
[ $# -gt 0 ] || set -- -m "not slow and not gpu" -n 3 --dist loadfile --no-loadscope-reorder
echo "tests: python -m pytest $*"
exec python -m pytest "$@"
