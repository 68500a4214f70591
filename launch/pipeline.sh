#!/usr/bin/env bash
# From rows to a trained model on the GPUs of this machine: launch/pipeline.sh RUN.yaml [--section.key value ...]
# Ends at the first stage that fails, with its exit code.
# NUM_RANKS: how many ranks; default: one for each visible GPU, or 1. MASTER_PORT: where they meet; default: 29500.
set -euo pipefail

[ $# -ge 1 ] || { echo "usage: $0 RUN.yaml [--section.key value ...]" >&2; exit 2; }
config=$1
shift
num_ranks=${NUM_RANKS:-$(python -c 'import torch; print(max(torch.cuda.device_count(), 1))')}

echo "pipeline: prepare"
python -m kto_ds prepare --config "$config" "$@"
echo "pipeline: precompute-ref on $num_ranks rank(s)"
deepspeed --num_accelerators "$num_ranks" --master_port "${MASTER_PORT:-29500}" --module kto_ds precompute-ref --config "$config" "$@"
echo "pipeline: train on $num_ranks rank(s)"
deepspeed --num_accelerators "$num_ranks" --master_port "${MASTER_PORT:-29500}" --module kto_ds train --config "$config" "$@"
echo "pipeline: export"
python -m kto_ds export --config "$config" "$@"
