"""The ranks of a run and what they tell each other. Only this file and probes.py use torch.distributed."""

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, TypeVar

import deepspeed
import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from kto_ds.errors import KtoError, UserError
from kto_ds.launching import free_port
from kto_ds.runtime.watch import beat, follow

Result = TypeVar("Result")
Group = dist.ProcessGroup

GRACE_SECONDS = 30  # that a collective waits beyond the watch, which has more to say
# NCCL's own record of what every rank was doing: kept, and written when a collective times out.
FLIGHT_RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
FLIGHT_RECORDER_FILE = "TORCH_FR_DUMP_TEMP_FILE"
LOOK_SECONDS = 0.5  # at the most, between two looks for a rank that is waited for


class World(NamedTuple):
    rank: int
    num_ranks: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start(*, timeout_seconds: float, dumps: Path | None = None) -> World:
    """Join the process group that the launcher describes in the environment; without a launcher, be the only rank.

    No collective waits longer than `timeout_seconds`; NCCL writes its record of one that did to the folder `dumps`.
    """
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    device = own_device()
    on_cuda = device.type == "cuda"
    if on_cuda and device.index >= torch.cuda.device_count():
        raise UserError(f"rank {device.index} of this machine has no GPU; {torch.cuda.device_count()} are visible", where="launcher", remedy="start fewer ranks")
    if on_cuda:
        torch.cuda.set_device(device)
    if dumps is not None:
        for name, value in {**FLIGHT_RECORDER, FLIGHT_RECORDER_FILE: str(dumps / "nccl_rank")}.items():
            os.environ.setdefault(name, value)
    if not dist.is_initialized():
        if not on_cuda:  # there the mere question would try compilers and GPUs for every operator
            # DeepSpeed would compile a shared-memory all-reduce for CPU ranks, for a minute or more, that only its inference engine calls.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="nccl" if on_cuda else "gloo", timeout=_limit(timeout_seconds), verbose=False)
    limit_waits(timeout_seconds)
    return World(dist.get_rank(), dist.get_world_size(), device)


def own_device() -> torch.device:
    """Return the device of this rank, whether or not the machine has so many."""
    on_cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_cuda else torch.device("cpu")


def _limit(seconds: float) -> timedelta:
    return timedelta(seconds=seconds + GRACE_SECONDS)


def limit_waits(seconds: float) -> None:
    """Let no collective of any group wait longer than this, from now on."""
    for group in distributed_c10d._world.pg_map:  # DeepSpeed makes a group of its own
        distributed_c10d._set_pg_timeout(_limit(seconds), group)


def free_memory(world: World) -> int:
    """Return the bytes that this rank can still take on its device; ranks of one machine share its memory where that is the device."""
    if world.device.type == "cuda":
        return torch.cuda.mem_get_info(world.device)[0]
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")  # of torchrun, of the deepspeed launcher


def total_memory(device: torch.device) -> int:
    """Return the bytes of a CUDA device, whoever uses them now."""
    return torch.cuda.get_device_properties(device).total_memory


def sum_across_ranks(values: Tensor) -> Tensor:
    """Add `values` over the ranks in place and return it."""
    dist.all_reduce(values)
    beat()
    return values


def neighbours(size: int) -> Group | None:
    """Return the group of this rank and its neighbours, `size` in all, or none where every rank is by itself. All ranks call this."""
    return dist.new_subgroups(group_size=size)[0] if size > 1 else None


class _SumAcrossGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parts: Tensor, group: Group) -> Tensor:
        total = parts.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None  # every rank has computed the same of the same sum; its own part is what it answers for


def sum_across_group(parts: Tensor, group: Group) -> Tensor:
    """Return the sum over the ranks of a group; the gradient of a rank's part is that of the sum, which all of them go on with alike."""
    return _SumAcrossGroup.apply(parts, group)


def any_across_ranks(flag: bool, device: torch.device) -> bool:
    """Tell whether the flag is up on any rank; the same answer on all."""
    return bool(sum_across_ranks(torch.tensor(float(flag), device=device)))


def gather_objects(value: Result) -> list[Result]:
    """Return every rank's value, in rank order, on all ranks."""
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    beat()
    return gathered


def on_main_rank(action: Callable[[], Result]) -> Result:
    """Run `action` on rank 0, for as long as it takes, and return its result on all ranks; an error there is raised on all of them."""
    outcome = [_outcome_of(action) if dist.get_rank() == 0 else None]
    _wait_for([0])
    dist.broadcast_object_list(outcome, src=0)
    beat()
    return _results_of(outcome)[0]


def on_all_ranks(action: Callable[[], Result]) -> list[Result]:
    """Run `action` on every rank, for as long as it takes there, and return all results in rank order; an error of any rank is raised on all of them."""
    outcome = _outcome_of(action)
    wait_for_all()
    return _results_of(gather_objects(outcome))


def _outcome_of(action: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error


def _results_of(outcomes: list[tuple[Result, Exception | None]]) -> list[Result]:
    """Return the results, or raise the first error; all ranks have the same outcomes here, and rank 0 reports that error."""
    for _, error in outcomes:
        if isinstance(error, KtoError):
            error.is_told = dist.get_rank() != 0
        if error is not None:
            raise error
    return [result for result, _ in outcomes]


def wait_for_all() -> None:
    """Wait for all ranks to come here, for as long as each gets on with its work: ahead of a collective that ranks reach hours apart."""
    _wait_for(range(dist.get_world_size()))


def _wait_for(ranks: Iterable[int]) -> None:
    """Let the others know that this rank has come here, and wait for some of them, not in a collective, which gives up on a rank however busy it is.

    Only the watch ends this, when the rank that is waited for makes no progress. Where there is no watch, or the store is gone with the torchrun that kept it, the
    collective behind this does the waiting.
    """
    store, pause = distributed_c10d._get_default_store(), 0.001
    with suppress(dist.DistError):
        here = store.add(f"kto_ds/{dist.get_rank()}", 1)
        for rank in ranks:
            while store.add(f"kto_ds/{rank}", 0) < here and follow(rank):
                time.sleep(pause)
                pause = min(2 * pause, LOOK_SECONDS)


def barrier() -> None:
    dist.barrier()
    beat()


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
