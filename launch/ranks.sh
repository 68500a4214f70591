# Sourced by single_node.sh and pipeline.sh: ranks that can be stopped through this script.
# shellcheck shell=bash

# The number of ranks: NUM_RANKS, or one for each visible GPU, or 1.
num_ranks() {
    echo "${NUM_RANKS:-$(python -c 'import torch; print(max(torch.cuda.device_count(), 1))')}"
}

# run_ranks RANKS COMMAND [ARGUMENT ...]: run a kto_ds command on so many ranks, and return its exit code.
#
# A signal to this script goes to the ranks as SIGUSR1, on which they save and end with 75. DeepSpeed's own processes ignore it: ended by a
# signal themselves, they would hide that code.
run_ranks() {
    local ranks=$1 job code
    shift
    set -m # a process group of its own
    (
        trap '' USR1
        exec deepspeed --num_accelerators "$ranks" --master_port "${MASTER_PORT:-29500}" --module kto_ds "$@"
    ) &
    job=$!
    set +m
    trap 'kill -USR1 -- "-$job" 2>/dev/null || true' TERM INT USR1
    while :; do
        code=0
        wait "$job" || code=$?
        kill -0 "$job" 2>/dev/null || break # else the wait ended because a signal came
    done
    trap - TERM INT USR1
    return "$code"
}
