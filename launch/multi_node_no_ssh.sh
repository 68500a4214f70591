#!/usr/bin/env bash
# Train on several hosts without ssh: run the same command on each, with its NODE_RANK: launch/multi_node_no_ssh.sh HOSTFILE RUN.yaml [--section.key value ...]
# NODE_RANK: 0 on the first host of HOSTFILE, 1 on the second, ... MASTER_ADDR: address of the first, the same on all. MASTER_PORT, INTERFACE: see README.md here.
# COMMAND: train by default, or precompute-ref, or evaluate.
# Asked to stop on any host (SIGTERM, SIGINT, SIGUSR1), all save and end with 75; started again, they go on.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/ranks.sh"
[[ $# -ge 2 && ${NODE_RANK:-} =~ ^[0-9]+$ && -n ${MASTER_ADDR:-} ]] ||
    { echo "usage, on each host: NODE_RANK=0 MASTER_ADDR=10.0.0.1 $0 HOSTFILE RUN.yaml [--section.key value ...]" >&2; exit 2; }
hostfile=$1 config=$2
shift 2

listed=$(python "$here/hosts.py" slots "$hostfile")
read -ra slots <<<"$listed"
interface=$(python "$here/hosts.py" here "${slots[NODE_RANK]:-1}" "${#slots[@]}" "$NODE_RANK")
use_interface "$interface"

on_this_host() {
    run deepspeed --log_level error --hostfile "$hostfile" --no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" --module kto_ds "$@"
}

echo "multi_node_no_ssh: doctor, then ${COMMAND:-train}, as host $NODE_RANK of ${#slots[@]}; they meet at $MASTER_ADDR:${MASTER_PORT:-29500} through $interface"
on_this_host doctor --quick --config "$config" "$@"
on_this_host "${COMMAND:-train}" --config "$config" "$@"
