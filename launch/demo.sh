#!/usr/bin/env bash
# Make the environment if need be, then run the demo: launch/demo.sh [arguments of `kto-ds demo`]
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

echo "demo: kto-ds demo $*"
exec kto-ds demo "$@"
