"""Devices, memory and limits of the machines."""

import os
from collections import Counter
from collections.abc import Sequence

from kto_ds.doctor.facts import Facts
from kto_ds.doctor.findings import GIB, Finding, in_ranges, in_words, odd_ranks, worst

FREE_SHARE = 0.97  # of a GPU's memory before training, the context of this process apart
CONTEXT_BYTES = 1 * GIB
ALIKE = 0.02  # devices of one kind may differ by so much of their memory
LEAST_FILES, LEAST_SHM, LEAST_LOCKED = 4096, GIB, GIB


def check_devices(facts: Sequence[Facts], *, dtype: str) -> Finding:
    """Compare the devices of all ranks. What is said of a GPU names the rank and the host."""
    name, findings = "devices", []
    for fact in facts:
        device, whose = fact.device, f"rank {fact.rank} (host {fact.host})"
        if device.kind != "cuda":
            continue
        if not device.identity:
            what = f"{whose} is local rank {fact.local_rank}, and {device.num_visible} GPUs are visible there"
            findings.append(Finding(name, what, "wrong", "start as many ranks as there are GPUs (slots of the hostfile, --num_gpus), or see to CUDA_VISIBLE_DEVICES"))
            continue
        taken = device.total_bytes - device.free_bytes
        if taken > (1 - FREE_SHARE) * device.total_bytes + CONTEXT_BYTES:
            found = f"{taken / GIB:.1f} of {device.total_bytes / GIB:.1f} GiB of the GPU of {whose} are taken by others"
            findings.append(Finding(name, found, "warn", "see nvidia-smi there, and end what is left of other runs"))
        if dtype == "bfloat16" and not device.has_bfloat16:
            findings.append(Finding(name, f"{device.name} of {whose} has no bfloat16", "wrong", "set model.dtype: float32, or use GPUs from Ampere on"))
        if not device.reaches_peers:
            found = f"GPUs of {fact.host} do not reach each other: collectives go through the host"
            findings.append(Finding(name, found, "warn", "see nvidia-smi topo -m; a virtual machine or IOMMU may forbid it"))
    for identity, count in Counter(fact.device.identity for fact in facts if fact.device.identity).items():
        if count > 1:
            ranks = [fact.rank for fact in facts if fact.device.identity == identity]
            findings.append(Finding(name, f"{in_ranges(ranks)} use the same GPU", "wrong", "list each machine once in the hostfile, and each GPU once in CUDA_VISIBLE_DEVICES"))
    present = [fact for fact in facts if fact.device.kind == "cpu" or fact.device.identity]
    kinds = [fact.device.name if fact.device.identity else "cpu" for fact in present]
    if odd := odd_ranks(kinds):
        usual = next(kind for place, kind in enumerate(kinds) if place not in odd)
        found = f"{kinds[odd[0]]} on {in_ranges([present[place].rank for place in odd])}, {usual} on the others"
        findings.append(Finding(name, found, "wrong", "use devices of one kind: the slowest sets the pace, the smallest the memory"))
    findings += _unequal_memory(facts)
    first = facts[0].device
    return worst(name, findings, otherwise=f"{len(facts)} x {first.name}, {first.total_bytes / GIB:.0f} GiB" if first.kind == "cuda" else f"{first.name}; no GPU")


def _unequal_memory(facts: Sequence[Facts]) -> list[Finding]:
    totals = [fact.device.total_bytes for fact in facts]
    small = [rank for rank, total in enumerate(totals) if total < (1 - ALIKE) * max(totals)]
    if facts[0].device.kind != "cuda" or not small:
        return []
    what = f"{totals[small[0]] / GIB:.0f} GiB on {in_ranges(small)}, {max(totals) / GIB:.0f} GiB on the others"
    return [Finding("devices", what, "warn", "what fits is decided by the smallest: MIG slices or another model of card?")]


def check_host_memory(facts: Sequence[Facts], *, needed_per_rank: int, why: str) -> Finding:
    """Compare what all ranks of a host will take of its memory with what is free there, in the container too."""
    findings, least = [], min(fact.available_bytes for fact in facts)
    for host, num_ranks in Counter(fact.host for fact in facts).items():
        free = min(fact.available_bytes for fact in facts if fact.host == host)
        needed = num_ranks * needed_per_rank
        if needed > free:
            what = f"{host}: {in_words(needed)} are needed ({num_ranks} x {in_words(needed_per_rank)}: {why}), {in_words(free)} are free"
            findings.append(Finding("host memory", what, "wrong", "use more hosts or ranks, less offload, or a container with more memory"))
    return worst("host memory", findings, otherwise=f"{in_words(least)} free on the host with least; a rank takes about {in_words(needed_per_rank)} ({why})")


def check_limits(facts: Sequence[Facts], *, pins_memory: bool) -> Finding:
    """Look at what the system lets a process have. `pins_memory`: the run locks host memory, for offload or InfiniBand."""
    findings = []
    for fact in facts:
        if fact.open_files < LEAST_FILES:
            findings.append(Finding("limits", f"{fact.open_files} open files at most on {fact.host}", "warn", f"ulimit -n {LEAST_FILES * 16} before the start, or LimitNOFILE of the service"))
        if fact.shm_bytes < LEAST_SHM and fact.device.kind == "cuda":
            what = f"/dev/shm of {fact.host} has {fact.shm_bytes >> 20} MiB: NCCL and worker processes meet there"
            findings.append(Finding("limits", what, "warn", "start the container with --ipc=host or --shm-size=16g"))
        if pins_memory and 0 <= fact.locked_bytes < LEAST_LOCKED:
            found = f"{fact.locked_bytes >> 10} KiB of locked memory at most on {fact.host}"
            findings.append(Finding("limits", found, "warn", "ulimit -l unlimited, or LimitMEMLOCK=infinity of the service (of slurmd too)"))
    locked = "unlimited" if facts[0].locked_bytes < 0 else f"{facts[0].locked_bytes >> 10} KiB"
    return worst("limits", findings, otherwise=f"{facts[0].open_files} open files, {locked} locked memory, /dev/shm {facts[0].shm_bytes / GIB:.1f} GiB")


def uses_infiniband() -> bool:
    return os.path.isdir("/sys/class/infiniband")
