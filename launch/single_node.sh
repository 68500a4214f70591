#!/usr/bin/env bash
# Train on the GPUs of this machine, from artefacts that exist: launch/single_node.sh RUN.yaml [--section.key value ...]
# NUM_RANKS: how many ranks; default: one for each visible GPU, or 1. MASTER_PORT: where they meet; default: 29500.
# Asked to stop (SIGTERM, SIGINT, SIGUSR1), it saves and ends with 75; started again, it goes on.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/ranks.sh"
[ $# -ge 1 ] || { echo "usage: $0 RUN.yaml [--section.key value ...]" >&2; exit 2; }
config=$1
shift
ranks=$(num_ranks)

echo "single_node: train on $ranks rank(s)"
run_ranks "$ranks" train --config "$config" "$@"
