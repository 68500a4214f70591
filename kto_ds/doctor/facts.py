"""What one rank sees of itself, its device and its machine. Plain values only: ranks tell one another as JSON, before there is a process group."""

import json
import os
import platform
import resource
import shutil
import socket
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

import kto_ds
from kto_ds.doctor.environment import watched_variables
from kto_ds.redaction import redact_values

# Of the container: of version 2 of cgroups and of version 1.
CGROUPS = (("/sys/fs/cgroup", "memory.max", "memory.current"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"))
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


class Device(NamedTuple):
    kind: str  # cuda or cpu
    name: str
    identity: str  # of a GPU, on all machines
    total_bytes: int
    free_bytes: int
    num_visible: int
    has_bfloat16: bool
    reaches_peers: bool  # copies to every other visible GPU without the host in between


class Facts(NamedTuple):
    rank: int
    local_rank: int
    host: str
    variables: dict[str, str]  # those known to bite, secrets taken out
    kto_ds: str
    python: str
    versions: dict[str, str]  # of what setup.cfg asks for, as far as it is installed
    torch_cuda: str  # version that torch was built for, or an empty text
    driver: str  # of NVIDIA, or an empty text
    device: Device
    interfaces: list[str]
    route: str  # interface that leads to rank 0, or an empty text
    own_address: str  # that the host's own name stands for, or an empty text
    available_bytes: int  # of host memory, within the limit of the container
    shm_bytes: int
    open_files: int  # most that a process may have
    locked_bytes: int  # most memory that it may lock, -1 without a limit
    configs: dict[str, str]  # digest of each config that this rank has read, by its name

    def to_text(self) -> str:
        return json.dumps(self._asdict())

    @classmethod
    def from_text(cls, text: str) -> "Facts":
        """Return what to_text wrote."""
        fields = json.loads(text)
        return cls(**{**fields, "device": Device(*fields["device"])})


def facts_of(rank: int, local_rank: int, device: torch.device, *, packages: Sequence[str], configs: dict[str, str]) -> Facts:
    """Look around. `packages` are those whose versions matter, `configs` the digests of what was read."""
    soft_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft_locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return Facts(
        rank, local_rank, socket.gethostname(), redact_values(watched_variables(os.environ)),
        kto_ds.__version__, platform.python_version(), {name: version for name in packages if (version := installed_version(name))},
        torch.version.cuda or "", _driver(), _device(device),
        sorted(psutil.net_if_addrs()), _route_to(os.environ.get("MASTER_ADDR", "")), _address_of(socket.gethostname()),
        _available_bytes(), shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0,
        soft_files, -1 if soft_locked == resource.RLIM_INFINITY else soft_locked, configs,
    )  # fmt: skip


def installed_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _driver() -> str:
    """Return the version of NVIDIA's kernel driver, or an empty text where there is none."""
    if not NVIDIA_DRIVER.is_file():
        return ""
    words = NVIDIA_DRIVER.read_text(errors="replace").split()
    return next((word for word in words if word[0].isdigit() and "." in word), "unknown")


def _device(device: torch.device) -> Device:
    if device.type != "cuda":
        memory = psutil.virtual_memory()
        return Device("cpu", f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores", "", memory.total, _available_bytes(), 0, True, True)
    if device.index >= torch.cuda.device_count():
        return Device("cuda", "none", "", 0, 0, torch.cuda.device_count(), True, True)
    free, total = torch.cuda.mem_get_info(device)
    properties, others = torch.cuda.get_device_properties(device), set(range(torch.cuda.device_count())) - {device.index}
    reaches = all(torch.cuda.can_device_access_peer(device.index, other) for other in others)
    with torch.cuda.device(device):
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Device("cuda", properties.name, str(properties.uuid), total, free, torch.cuda.device_count(), has_bfloat16, reaches)


def _available_bytes() -> int:
    """Return what processes here can still take: of the machine, and of the container, which may have less."""
    available = psutil.virtual_memory().available
    for folder, limit, used in CGROUPS:
        with suppress(OSError, ValueError):  # there is none, or it has the limit `max`
            files = dict(line.split() for line in Path(folder, "memory.stat").read_text().splitlines())
            cached = sum(int(files.get(f"{kind}_file", 0)) for kind in ("active", "inactive"))  # given back where memory is wanted
            free = int(Path(folder, limit).read_text()) - int(Path(folder, used).read_text()) + cached
            available = min(available, max(0, free))
    return available


def _address_of(name: str) -> str:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return ""


def _route_to(address: str) -> str:
    """Return the interface over which this machine talks to an address, or an empty text. No packet is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            own = probe.getsockname()[0]
    except OSError:
        return ""
    return next((name for name, addresses in psutil.net_if_addrs().items() if own in [entry.address for entry in addresses]), "")
