#!/usr/bin/env bash
# Train on the GPUs of this machine, from artefacts that exist: launch/single_node.sh RUN.yaml [--section.key value ...]
# NUM_RANKS: how many ranks; default: one for each visible GPU, or 1. MASTER_PORT: where they meet; default: 29500.
set -euo pipefail

[ $# -ge 1 ] || { echo "usage: $0 RUN.yaml [--section.key value ...]" >&2; exit 2; }
config=$1
shift
num_ranks=${NUM_RANKS:-$(python -c 'import torch; print(max(torch.cuda.device_count(), 1))')}

echo "single_node: train on $num_ranks rank(s)"
exec deepspeed --num_accelerators "$num_ranks" --master_port "${MASTER_PORT:-29500}" --module kto_ds train --config "$config" "$@"
