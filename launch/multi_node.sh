#!/usr/bin/env bash
# Train on several hosts, started from one machine that has ssh to all of them: launch/multi_node.sh HOSTFILE RUN.yaml [--section.key value ...]
# HOSTFILE: a line for each host, as `node1 slots=8`; rank 0 runs on the first. MASTER_ADDR, MASTER_PORT, INTERFACE, SSH_PORT, EXPORT: see README.md here.
# COMMAND: train by default, or precompute-ref, or evaluate.
# Asked to stop (SIGTERM, SIGINT, SIGUSR1), it saves and ends with 75; started again, it goes on.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/ranks.sh"
[ $# -ge 2 ] || { echo "usage: $0 HOSTFILE RUN.yaml [--section.key value ...]" >&2; exit 2; }
hostfile=$1 config=$2
shift 2
command -v pdsh >/dev/null || { echo "multi_node: pdsh is not installed; install it, or use launch/multi_node_no_ssh.sh" >&2; exit 2; }

# Of the variables here, the ranks elsewhere get those of this file, one NAME=value a line.
write_variables() {
    local name names=(DS_ACCELERATOR HF_HOME HF_HUB_OFFLINE OMP_NUM_THREADS TOKENIZERS_PARALLELISM TORCH_EXTENSIONS_DIR)
    mapfile -t -O "${#names[@]}" names < <(compgen -e | grep -E '^(NCCL|GLOO|TORCH_NCCL)_')
    [ ! -f "${DS_ENV_FILE:-$HOME/.deepspeed_env}" ] || cat "${DS_ENV_FILE:-$HOME/.deepspeed_env}"
    echo "KTO_LAUNCH=$launch"
    for name in "${names[@]}" ${EXPORT:-}; do
        [ -n "${!name:-}" ] || continue
        if [[ $name =~ (_KEY|_TOKEN|SECRET|PASSWORD) ]]; then
            echo "multi_node: $name would stand in a command line that all users see; log in on the hosts instead (wandb login, hf auth login)" >&2
            return 2
        fi
        if [[ ${!name} =~ [\"\$\`\\] || ${!name} == *$'\n'* ]]; then
            echo "multi_node: $name has a character that a shell would not leave as it is; set it on the hosts instead" >&2
            return 2
        fi
        echo "$name=${!name}"
    done
}

# DeepSpeed and pdsh hand arguments to the shells of the hosts without quotes.
quoted() {
    if [[ $1 =~ ^[A-Za-z0-9_@+=:,./-]+$ ]]; then
        echo "$1"
    else
        echo "\$'$(printf %s "$1" | od -An -v -tx1 | tr -d ' \n' | sed 's/../\\x&/g')'"
    fi
}

on_hosts() {
    run deepspeed --log_level error --hostfile "$hostfile" --launcher pdsh ${SSH_PORT:+--ssh_port "$SSH_PORT"} --master_addr "$address" --master_port "${MASTER_PORT:-29500}" --module kto_ds "$@"
}

# The ranks are not processes of this script: each host is asked, until its ranks can hear, to signal them once.
hand_on() {
    local host left=()
    mapfile -t left < <(sed -nE 's/^[[:space:]]*([[:alnum:]][^[:space:]]*)[[:space:]].*/\1/p' "$hostfile")
    while [ -n "$job" ] && kill -0 "$job" 2>/dev/null && [ ${#left[@]} -gt 0 ]; do
        for host in "${!left[@]}"; do
            ssh -o BatchMode=yes -o ConnectTimeout=10 ${SSH_PORT:+-p "$SSH_PORT"} "${left[host]}" bash -s <<<"$(declare -f signal_listeners); signal_listeners $launch" && unset "left[host]"
        done
        sleep 0.2
    done
}

checked=$(python "$here/hosts.py" check "$hostfile")
read -r address interface <<<"$checked"
use_interface "$interface"
variables=$(mktemp)
trap 'rm -f "$variables"' EXIT
write_variables >"$variables"
export DS_ENV_FILE=$variables
# pdsh must not wait for ever on the connection to a host that is gone.
export PDSH_SSH_ARGS_APPEND="-o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=4 ${PDSH_SSH_ARGS_APPEND:-}"
overrides=()
for argument in --config "$config" "$@"; do overrides+=("$(quoted "$argument")"); done

echo "multi_node: doctor, then ${COMMAND:-train}, on the hosts of $hostfile; they meet at $address:${MASTER_PORT:-29500} through $interface"
on_hosts doctor --quick "${overrides[@]}"
on_hosts "${COMMAND:-train}" "${overrides[@]}"
