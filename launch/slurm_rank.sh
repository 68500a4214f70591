#!/usr/bin/env bash
# A task of srun as a rank: what a launcher would say, from what SLURM says. Started by slurm.sh: srun launch/slurm_rank.sh COMMAND [ARGUMENT ...]
set -euo pipefail

export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
if [ -z "${GLOO_SOCKET_IFNAME:-}" ] && [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    GLOO_SOCKET_IFNAME=$(python launch/hosts.py interface)
    export GLOO_SOCKET_IFNAME
fi
exec python -m kto_ds "$@"
