# Sourced by slurm_train.sbatch and slurm_pipeline.sbatch: a job that goes on where it was stopped, as long as it gets anywhere.
#
# srun starts the ranks: it ends with their exit code, and what SLURM signals goes to them and to nothing in between. DeepSpeed's launcher or torchrun, one a
# node, would get the signals in place of the ranks, and end of SIGUSR1. On exit code 75, and on no other, the job is put back into the queue.
#
#   KTO_MAX_IDLE_RESTARTS  restarts in a row without progress, after which the job ends; default: 3
# shellcheck shell=bash

source launch/ranks.sh
max_idle_restarts=${KTO_MAX_IDLE_RESTARTS:-3}
trap 'end_job $?' EXIT

# SLURM sends SIGTERM to the ranks by itself. SIGUSR1 for the script alone, as of --signal=B:USR1, is for them too; scancel with a signal reaches all but the script.
trap 'signals=$((signals + 1))' TERM INT
trap 'signals=$((signals + 1)); hand_on' USR1
hand_on() { scancel --signal=USR1 "$SLURM_JOB_ID"; }

# prepare_ranks: find where the ranks of this job meet, and look at every host.
prepare_ranks() {
    local per_node=${SLURM_TASKS_PER_NODE%%(*} # 8(x2): 8 on each of 2
    [[ $per_node =~ ^[0-9]+$ ]] || { echo "slurm: $SLURM_TASKS_PER_NODE tasks on the nodes, which differ; ask for them with --ntasks-per-node" >&2; return 2; }
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))} LOCAL_WORLD_SIZE=$per_node
    # srun does not take this over from the job by itself.
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    [ -z "${INTERFACE:-}" ] || use_interface "$INTERFACE"
    # shellcheck disable=SC2016 # each node has its own $SLURM_NODEID
    run srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 bash -c 'python launch/hosts.py here "$LOCAL_WORLD_SIZE" "$SLURM_JOB_NUM_NODES" "$SLURM_NODEID"'
}

# on_ranks COMMAND [ARGUMENT ...]: run a kto_ds command as one rank for each task.
on_ranks() {
    echo "slurm: $1 on $SLURM_NTASKS ranks of ${SLURM_JOB_NODELIST}, which meet at $MASTER_ADDR:$MASTER_PORT"
    # After the first rank has ended the others have a minute; --kill-on-bad-exit would not even let them save.
    run srun --wait=60 --unbuffered bash launch/slurm_rank.sh "$@"
}

# on_one_task COMMAND [ARGUMENT ...]: run a kto_ds command that is one process. Also by srun: signals of SLURM do not reach what the script itself starts.
on_one_task() {
    echo "slurm: $1"
    run srun --nodes=1 --ntasks=1 --unbuffered python -m kto_ds "$@"
}

# require_progress RUN.yaml [--section.key value ...]: end the job when it was started again and again and got no further.
require_progress() {
    local found folder starts idle
    found=$(python launch/progress.py "$@")
    folder=${found%%$'\n'*} starts=$folder/starts-$SLURM_JOB_ID.txt
    mkdir -p "$folder"
    echo "${found#*$'\n'}" >>"$starts"
    idle=$(uniq -c "$starts" | tail -n 1 | awk '{ print $1 - 1 }')
    echo "slurm: start $(wc -l <"$starts") of job $SLURM_JOB_ID, restarts without progress: $idle of at most $max_idle_restarts; ${found#*$'\n'}"
    [ "$idle" -le "$max_idle_restarts" ] || { echo "slurm: no progress in $idle restarts, so this was the last; $starts has what each start found" >&2; return 1; }
}

end_job() {
    local state
    [ "$1" = 75 ] || return 0
    state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)
    # One that was cancelled, or that SLURM itself puts back, is on its way already.
    [ "$state" = RUNNING ] || { echo "slurm: stopped; the job is $state and is not put back from here" >&2; return 0; }
    echo "slurm: stopped with 75: the job goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
}
