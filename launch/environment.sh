# Sourced by tests/run.sh and launch/demo.sh: makes the virtual environment of this checkout where it is missing or stale, and enters it.
#
#   KTO_VENV    where it lies; default: .venv in this checkout
#   KTO_PYTHON  the Python that makes it; default: python3
# shellcheck shell=bash

kto_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
kto_venv=${KTO_VENV:-$kto_root/.venv}

install_kto_ds() {
    local stamp=$kto_venv/installed log=$kto_venv/pip.log torch_pin
    local pip=("$kto_venv/bin/python" -m pip install -qq --log "$log")
    [ "$(cat "$stamp" 2>/dev/null)" != "$1" ] || return 0
    rm -f "$stamp"
    torch_pin=$(grep '^torch==' "$kto_root/constraints.txt")
    echo "environment: installing into $kto_venv; some minutes the first time"
    "${KTO_PYTHON:-python3}" -m venv "$kto_venv"
    # torch alone and first: asked for together with the rest, pip may replace a CPU build by one with gigabytes of CUDA.
    if ! { "${pip[@]}" "$torch_pin" && "${pip[@]}" -e "${kto_root}[test]" -c "$kto_root/constraints.txt"; }; then
        echo "environment: pip failed; all it said is in $log" >&2
        return 1
    fi
    echo "$1" >"$stamp"
}

enter_environment() {
    local wanted
    "${KTO_PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "environment: constraints.txt needs Python 3.11 or newer; name one with KTO_PYTHON" >&2
        return 2
    }
    # The path counts too: an editable install belongs to one checkout.
    wanted=$({ echo "$kto_root"; cat "$kto_root/setup.cfg" "$kto_root/constraints.txt"; } | sha256sum)
    mkdir -p "$kto_venv"
    exec 9>"$kto_venv/lock"
    flock 9
    install_kto_ds "$wanted"

    # shellcheck disable=SC1091
    source "$kto_venv/bin/activate"
    exec 9>&-
    # What DeepSpeed compiles belongs to this environment: a folder shared between environments is rebuilt again and again.
    export TORCH_EXTENSIONS_DIR=$kto_venv/torch_extensions OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
    python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || export DS_ACCELERATOR=cpu
}

enter_environment
