# Sourced by the other scripts here, first of all: commands that can be stopped through the script, from its first line to its last.
#
# A signal to the script goes as SIGUSR1 to those of the command's processes that have a handler for it; it waits until there is one, as importing
# torch takes seconds. The command saves what there is to save, and the script ends with its exit code, 75. Between two commands it ends with 75 itself.
# shellcheck shell=bash

signals=0 # that have come
job=''    # the command that runs
read -r launch </proc/sys/kernel/random/uuid # by which its processes are known, on every host: KTO_LAUNCH in their environment
trap 'signals=$((signals + 1)); hand_on' TERM INT USR1

# say TEXT: print it; a terminal that is gone ends nothing.
say() {
    echo "$1" || :
}

# The number of ranks: NUM_RANKS, or one for each visible GPU, or 1.
num_ranks() {
    echo "${NUM_RANKS:-$(python -c 'import torch; print(max(torch.cuda.device_count(), 1))')}"
}

# run COMMAND [ARGUMENT ...]: run a command and return its exit code; 75 at once where the script has been asked to stop.
run() {
    local code came
    [ "$signals" = 0 ] || { echo "stopped before: $*" >&2; return 75; }
    set -m # a process group of its own
    # Who has no handler ignores SIGUSR1: DeepSpeed's own processes, which would hide the ranks' exit code if a signal ended them.
    (
        trap '' USR1
        export KTO_LAUNCH=$launch
        exec "$@"
    ) &
    job=$!
    set +m
    [ "$signals" = 0 ] || hand_on # of a signal that came before there was a job
    while :; do
        code=0 came=$signals
        wait "$job" || code=$?
        [ "$came" != "$signals" ] || break # else it was a signal that ended the wait
    done
    job=''
    return "$code"
}

# run_ranks RANKS COMMAND [ARGUMENT ...]: run a kto_ds command on so many ranks, and return its exit code.
run_ranks() {
    local ranks=$1
    shift
    run deepspeed --log_level error --num_accelerators "$ranks" --master_port "${MASTER_PORT:-29500}" --module kto_ds "$@"
}

# use_interface NAME: let collectives go through this interface of the host; nothing for an empty name.
use_interface() {
    [ -n "$1" ] || return 0
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$1}
    # NCCL finds a good one by itself, InfiniBand first.
    [ -z "${INTERFACE:-}" ] || export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$1}
}

hand_on() {
    while [ -n "$job" ] && kill -0 "$job" 2>/dev/null && ! signal_listeners "$launch"; do
        sleep 0.2
    done
}

# signal_listeners LAUNCH: send SIGUSR1 to those processes of a launch on this host that have a handler for it; fail where none has.
signal_listeners() {
    local file caught listening=()
    while read -r file; do
        # Hosts may be network namespaces of one machine.
        [ "${file%environ}ns/net" -ef /proc/self/ns/net ] || continue
        caught=$(sed -n 's/^SigCgt:[[:space:]]*//p' "${file%environ}status" 2>/dev/null) || continue
        if (((16#${caught:-0} >> 9) & 1)); then
            file=${file#/proc/}
            listening+=("${file%/environ}")
        fi
    done < <(grep -lzsxF "KTO_LAUNCH=$1" /proc/[0-9]*/environ)
    [ ${#listening[@]} -gt 0 ] || return 1
    kill -USR1 "${listening[@]}" 2>/dev/null || true # one may have ended since
}
