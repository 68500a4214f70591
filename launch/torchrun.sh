#!/usr/bin/env bash
# Train by torchrun, on one host or, with the same command on each, on several: launch/torchrun.sh RUN.yaml [--section.key value ...]
# NUM_RANKS: ranks on this host; default: one for each visible GPU, or 1. NNODES: how many hosts; default: 1. For more than one:
# NODE_RANK: 0 on the first, 1 on the second, ... MASTER_ADDR: address of the first, the same on all. MASTER_PORT, INTERFACE: see README.md here.
# COMMAND: train by default, or precompute-ref, or evaluate.
# Asked to stop on any host (SIGTERM, SIGINT, SIGUSR1), all save and end with 75; started again, they go on.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/ranks.sh"
[[ $# -ge 1 && ${NNODES:=1} =~ ^[1-9][0-9]*$ && ${NODE_RANK:=0} =~ ^[0-9]+$ ]] ||
    { echo "usage: [NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1] $0 RUN.yaml [--section.key value ...]" >&2; exit 2; }
config=$1
shift
ranks=$(num_ranks)
interface=$(python "$here/hosts.py" here "$ranks" "$NNODES" "$NODE_RANK")
use_interface "$interface"

on_this_host() {
    run python "$here/torchrun.py" --nnodes "$NNODES" --node_rank "$NODE_RANK" --nproc_per_node "$ranks" \
        --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-29500}" -m kto_ds "$@"
}

echo "torchrun: doctor, then ${COMMAND:-train}, on $ranks rank(s) of host $NODE_RANK of $NNODES"
on_this_host doctor --quick --config "$config" "$@"
on_this_host "${COMMAND:-train}" --config "$config" "$@"
