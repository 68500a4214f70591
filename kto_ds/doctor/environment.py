"""Environment variables that are known to bite, and what DeepSpeed's operators are compiled with and where."""

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from kto_ds.doctor.findings import Finding, Verdict, in_ranges, worst
from kto_ds.doctor.storage import is_writable

# Names, or beginnings of names, whose values decide how ranks find one another and what devices do.
WATCHED = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "CROSS_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "NCCL_", "TORCH_NCCL_", "GLOO_",
    "CUDA_", "PYTORCH_", "TORCH_EXTENSIONS_DIR", "TORCH_DISTRIBUTED_DEBUG", "TRITON_CACHE_DIR", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "OMP_NUM_THREADS",
    "TOKENIZERS_PARALLELISM", "DS_ACCELERATOR", "http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "MKL_SERVICE_FORCE_INTEL",
)  # fmt: skip
OWN_OF_A_RANK = ("RANK", "LOCAL_RANK", "CROSS_RANK", "GROUP_RANK", "CUDA_VISIBLE_DEVICES", "TORCH_NCCL_DUMP", "TORCH_FR_")
NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "fuse.sshfs", "9p", "wekafs"}


def watched_variables(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in sorted(environment.items()) if name.startswith(WATCHED)}


class Trap(NamedTuple):
    """A variable with a value that bites."""

    name: str
    why: str
    remedy: str
    verdict: Verdict = "warn"


def traps(variables: Mapping[str, str], *, on_cuda: bool, names_hub_model: bool, num_local: int) -> list[Trap]:
    """Return what bites among the variables of one rank. `num_local` ranks share its machine."""
    found = []

    def trap(name: str, why: str, remedy: str, verdict: Verdict = "warn") -> None:
        found.append(Trap(name, f"{name}={variables.get(name, '')!r}: {why}" if name in variables else why, remedy, verdict))

    for name in ("CUDA_LAUNCH_BLOCKING", "NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE"):
        if variables.get(name, "0") not in ("0", ""):
            why = "every kernel is waited for" if name == "CUDA_LAUNCH_BLOCKING" else "collectives take a slower way"
            trap(name, f"{why}; of use to find a fault, and far slower", f"unset {name}")
    for name in ("NCCL_DEBUG", "TORCH_DISTRIBUTED_DEBUG"):
        if variables.get(name, "").upper() in ("INFO", "TRACE", "DETAIL"):
            trap(name, "every rank writes lines for every collective, and DETAIL checks each of them", f"unset {name}, or set it to WARN" if name == "NCCL_DEBUG" else f"unset {name}")
    if variables.get("TORCH_NCCL_BLOCKING_WAIT", "0") not in ("0", ""):
        trap("TORCH_NCCL_BLOCKING_WAIT", "every collective holds the host up", "unset TORCH_NCCL_BLOCKING_WAIT")
    if variables.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1") == "0":
        trap("TORCH_NCCL_ASYNC_ERROR_HANDLING", "a rank whose peer died waits for ever", "unset TORCH_NCCL_ASYNC_ERROR_HANDLING")
    allocator = variables.get("PYTORCH_ALLOC_CONF") or variables.get("PYTORCH_CUDA_ALLOC_CONF", "")
    if on_cuda and "expandable_segments:True" not in allocator:
        trap("PYTORCH_CUDA_ALLOC_CONF", "without expandable segments memory fragments as micro-batches differ in length", "export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True")
    if variables.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):
        trap("PYTORCH_NO_CUDA_MEMORY_CACHING", "every tensor asks the driver for memory", "unset PYTORCH_NO_CUDA_MEMORY_CACHING")
    if names_hub_model and any(variables.get(name, "").upper() in ("1", "TRUE", "YES", "ON") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")):
        trap("HF_HUB_OFFLINE", "the model has a name of the hub, and is only looked for among what was fetched before", "give the folder of the model, or fetch it first")
    if "OMP_NUM_THREADS" not in variables and num_local > 1:
        trap("OMP_NUM_THREADS", "OMP_NUM_THREADS is not set: each rank takes a thread for every core, and they hold one another up", "export OMP_NUM_THREADS=1, or cores / ranks")
    visible = variables.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and (entries := [entry.strip() for entry in visible.split(",")]):
        if visible.strip() in ("", "-1", "NoDevFiles"):
            trap("CUDA_VISIBLE_DEVICES", "it hides every GPU", "unset CUDA_VISIBLE_DEVICES, or list the GPUs")
        elif len(set(entries)) < len(entries):
            trap("CUDA_VISIBLE_DEVICES", "a GPU is named twice", "name each GPU once", "wrong")
        elif "" in entries or "-1" in entries:
            trap("CUDA_VISIBLE_DEVICES", "GPUs behind an empty entry or -1 are hidden", "take that entry out")
    master, bypassed = variables.get("MASTER_ADDR", ""), (variables.get("no_proxy") or variables.get("NO_PROXY") or "").replace(" ", "").split(",")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        if variables.get(name) and not {"localhost", "127.0.0.1", "*"} & set(bypassed):
            trap(name, f"programs may ask the proxy for localhost{f' and {master}' if master else ''}", "export no_proxy=localhost,127.0.0.1")
            break
    return found


def check_variables(environments: Sequence[Mapping[str, str]], *, on_cuda: bool, names_hub_model: bool, num_local: int) -> Finding:
    """Look through the variables of all ranks, in rank order; what differs between them is told too."""
    by_trap: dict[Trap, list[int]] = {}
    for rank, variables in enumerate(environments):
        for trap in traps(variables, on_cuda=on_cuda, names_hub_model=names_hub_model, num_local=num_local):
            by_trap.setdefault(trap, []).append(rank)
    for name in sorted({name for variables in environments for name in variables if not name.startswith(OWN_OF_A_RANK)}):
        values = [variables.get(name) for variables in environments]
        if others := [rank for rank, value in enumerate(values) if value != values[0]]:
            why = f"{name}: {_shown(values[0])} on rank 0, {_shown(values[others[0]])} on {in_ranges(others)}"
            by_trap[Trap(name, why, f"set {name} alike on all ranks; on other hosts through .deepspeed_env, or the file that DS_ENV_FILE names")] = others
    findings = []
    for trap, ranks in by_trap.items():
        whose = "" if len(ranks) == len(environments) or " on rank" in trap.why else f" ({in_ranges(ranks)})"
        findings.append(Finding("variables", trap.why + whose, trap.verdict, trap.remedy))
    return worst("variables", findings, otherwise=f"none of {len(environments[0])} that matter bites")


def _shown(value: str | None) -> str:
    return "not set" if value is None else repr(value)


# what is compiled


def extensions_folder(environment: Mapping[str, str]) -> Path:
    """Return where torch puts the operators that are compiled on first use."""
    return Path(environment.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")


def stale_locks(folder: Path) -> list[str]:
    """Return the locks of builds below `folder` that no process of this machine has open: a build that was killed leaves one, and the next waits for it for ever."""
    locks = [path for path in folder.glob("**/lock") if path.is_file()] if folder.is_dir() else []
    held = set()
    for process in psutil.process_iter() if locks else ():
        with suppress(psutil.Error):
            held |= {file.path for file in process.open_files()}
    return sorted(str(path) for path in locks if str(path.resolve()) not in held)


def check_operators(folder: Path, *, is_needed: bool, has_several_hosts: bool) -> Finding:
    """Look at this machine. `is_needed`: whether this run compiles an operator, DeepSpeedCPUAdam for an optimizer in host memory."""
    name, findings = "operators", []
    for lock in stale_locks(folder):
        age = (time.time() - os.stat(lock).st_mtime) / 60
        what = f"a killed build left {lock}, {age:.0f} minutes old: the next build waits for it for ever"
        findings.append(Finding(name, what, "wrong" if is_needed else "warn", f"rm {lock}"))
    if is_needed:
        absent = [tool for tool in ("ninja", os.environ.get("CXX", "c++")) if shutil.which(tool) is None]
        if not (os.environ.get("CUDA_HOME") or shutil.which("nvcc") or Path("/usr/local/cuda").is_dir()):
            absent.append("nvcc")
        if absent:
            what = f"the optimizer in host memory needs DeepSpeedCPUAdam, which is compiled here, and there is no {', no '.join(absent)}"
            findings.append(Finding(name, what, "wrong", "install them (ninja, a C++ compiler, the CUDA toolkit of torch's version), or choose a deepspeed.config without offload"))
        if not is_writable(folder):
            findings.append(Finding(name, f"{folder} cannot be written to, and the operator is compiled there", "wrong", "set TORCH_EXTENSIONS_DIR to a folder of your own on a local disk"))
        if has_several_hosts and (file_system := file_system_of(folder)) in NETWORK_FILE_SYSTEMS:
            what = f"{folder} lies on {file_system}: hosts compile into one folder, and wait for one another's locks"
            findings.append(Finding(name, what, "warn", "set TORCH_EXTENSIONS_DIR to a folder on a local disk"))
    if is_needed and "TORCH_EXTENSIONS_DIR" not in os.environ:
        what = f"TORCH_EXTENSIONS_DIR is not set: every environment of this user compiles into {folder}"
        findings.append(Finding(name, what, "warn", "set TORCH_EXTENSIONS_DIR to a folder of this environment"))
    return worst(name, findings, otherwise=f"compiled in {folder}" if is_needed else "none is compiled for this run")


def file_system_of(path: Path) -> str:
    """Return the kind of the file system that a path lies on, or will lie on."""
    place = str(path.absolute())
    mounts = [part for part in psutil.disk_partitions(all=True) if (place + "/").startswith(part.mountpoint.rstrip("/") + "/")]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "unknown"
