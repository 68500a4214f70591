#!/usr/bin/env bash
# From rows to a trained model on the GPUs of this machine: launch/pipeline.sh RUN.yaml [--section.key value ...]
# Ends at the first stage that fails or is stopped, with its exit code; after 75 the same command goes on.
# NUM_RANKS: how many ranks; default: one for each visible GPU, or 1. MASTER_PORT: where they meet; default: 29500.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/ranks.sh"
[ $# -ge 1 ] || { echo "usage: $0 RUN.yaml [--section.key value ...]" >&2; exit 2; }
config=$1
shift
ranks=$(num_ranks)

say "pipeline: prepare"
run python -m kto_ds prepare --config "$config" "$@"
say "pipeline: precompute-ref on $ranks rank(s)"
run_ranks "$ranks" precompute-ref --config "$config" "$@"
say "pipeline: train on $ranks rank(s)"
run_ranks "$ranks" train --config "$config" "$@"
say "pipeline: export"
run python -m kto_ds export --config "$config" "$@"
