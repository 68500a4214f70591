# Sourced by the other scripts here, first of all: commands that can be stopped through the script, from its first line to its last.
#
# A signal to the script goes as SIGUSR1 to those of the command's processes that have a handler for it; it waits until there is one, as importing
# torch takes seconds. The command saves what there is to save, and the script ends with its exit code, 75. Between two commands it ends with 75 itself.
# shellcheck shell=bash

signals=0 # that have come
job=''    # process group of the command that runs
trap 'signals=$((signals + 1)); hand_on' TERM INT USR1

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
    run deepspeed --num_accelerators "$ranks" --master_port "${MASTER_PORT:-29500}" --module kto_ds "$@"
}

hand_on() {
    local listening=''
    while [ -z "$listening" ] && [ -n "$job" ] && kill -0 "$job" 2>/dev/null; do
        listening=$(listeners)
        # shellcheck disable=SC2086
        if [ -n "$listening" ]; then kill -USR1 $listening || true; else sleep 0.2; fi
    done 2>/dev/null
}

# Print the processes of the job that have a handler for SIGUSR1; a copy of this shell, which has not yet become the command, is none of them.
listeners() {
    local folder fields caught
    for folder in /proc/[0-9]*; do
        {
            read -r fields <"$folder/stat"
            read -r _ _ fields _ <<<"${fields##*) }"
            [ "$fields" = "$job" ] && [ ! "$folder/exe" -ef "/proc/$$/exe" ] || continue
            caught=$(sed -n 's/^SigCgt:[[:space:]]*//p' "$folder/status")
            (((16#${caught:-0} >> 9) & 1)) && echo "${folder#/proc/}"
        } 2>/dev/null || true
    done
}
