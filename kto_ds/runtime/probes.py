"""What only a doctor asks of the ranks of a job: who comes at all, and whether their collectives are right, fast, and end."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from kto_ds.errors import EXIT_USER, UserError
from kto_ds.runtime.collectives import World, barrier, gather_objects

LARGEST_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
ROUNDS = 3
PATTERN = 251  # a prime: no stretch of a transfer looks like another
FACTORS = 8  # that ranks multiply it by; sums over 8,000 ranks are exact in float32
FOLLOW_SECONDS = 5.0  # in which rank 0 has spoken, and its end has ended the job
SETTLE_SECONDS = 2.0  # that rank 0 waits beyond the others
MATRIX = {"cpu": 1024, "cuda": 8192}


class Meeting(NamedTuple):
    """All ranks, before there is a process group."""

    words: list[str]  # of every rank, in rank order
    store: dist.Store | None  # held for as long as the process group needs its port; None for a single rank


def meet(word: str, *, seconds: float) -> Meeting:
    """Tell every rank `word`, over plain TCP to rank 0: no interface has to be chosen yet. UserError naming the ranks that do not come in time."""
    if "RANK" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        return Meeting([word], None)
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun has one
    remedy = f"see whether all ranks were started, that their hosts can reach {address}:{port} (firewall, --master_addr), and that no other run has this port"
    try:
        store = dist.TCPStore(address, port, num_ranks, is_master=is_host, timeout=timedelta(seconds=seconds), wait_for_workers=False, multi_tenant=True)
        own = dist.PrefixStore("kto_ds/doctor", store)
        deadline = time.monotonic() + seconds + (SETTLE_SECONDS if rank == 0 else 0)  # the store ends with rank 0
        own.set(f"{rank} says", word)
        if absent := _absent(own, "says", num_ranks, deadline):
            raise UserError(f"{len(absent)} of {num_ranks} ranks have not come within {seconds:g} s: {', '.join(map(str, absent))}", where="meeting", remedy=remedy)
        words = [own.get(f"{other} says").decode() for other in range(num_ranks)]
        own.set(f"{rank} has heard", "")
        if rank == 0:  # whose end would take the store away from those that still listen
            _absent(own, "has heard", num_ranks, deadline)
        return Meeting(words, store)
    except dist.DistError as error:
        raise UserError(f"rank {rank} cannot reach rank 0 at {address}:{port} within {seconds:g} s: {str(error).splitlines()[0]}", where="meeting", remedy=remedy) from error


def _absent(store: dist.Store, what: str, num_ranks: int, deadline: float) -> list[int]:
    """Wait until all ranks have left a word, up to the monotonic `deadline`; return those that have not."""
    while not store.check([f"{rank} {what}" for rank in range(num_ranks)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [rank for rank in range(num_ranks) if not store.check([f"{rank} {what}"])]


@contextmanager
def ending_within(seconds: float, phase: str, *, remedy: str, tell: Callable[[UserError], None]) -> Iterator[None]:
    """Let nothing in the block hang: after so many seconds the process ends with exit code 2, once `tell` has told why. What fails in it is a UserError."""

    def give_up() -> None:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(FOLLOW_SECONDS)
        try:
            tell(UserError(f"not done within {seconds:g} s: a rank hangs, or messages between them get lost", where=phase, remedy=remedy))
        finally:  # whatever becomes of the words, the main thread will not go on
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(EXIT_USER)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (RuntimeError, OSError) as error:  # every kind of a failed collective
        raise UserError(str(error).splitlines()[0], where=phase, remedy=remedy) from error
    finally:
        timer.cancel()


class Transfer(NamedTuple):
    """What came of a collective of one size."""

    num_bytes: int
    seconds: float  # of the slowest rank, at its best round
    wrong_ranks: list[int]  # that got another result than they should have


def probe_all_reduce(world: World, num_bytes: int) -> Transfer:
    """Sum `num_bytes` of float32 over the ranks, and compare every element with what it must be."""
    pattern = _pattern(num_bytes, world)
    factors = [rank % FACTORS + 1 for rank in range(world.num_ranks)]

    def once() -> bool:
        values = pattern * factors[world.rank]
        _meet_and_time(world, times, lambda: dist.all_reduce(values))
        return bool(torch.equal(values, pattern * sum(factors)))

    times: list[float] = []
    return _transfer(num_bytes, times, [once() for _ in range(ROUNDS)])


def probe_all_gather(world: World, num_bytes: int) -> Transfer:
    """Bring the parts of all ranks, together `num_bytes`, to every rank, and compare every element."""
    part = _pattern(max(4, num_bytes // world.num_ranks), world)
    own = part * (world.rank + 1)

    def once() -> bool:
        values = torch.zeros(len(part) * world.num_ranks, device=world.device)
        _meet_and_time(world, times, lambda: dist.all_gather_into_tensor(values, own))
        return all(bool(torch.equal(values[rank * len(part) : (rank + 1) * len(part)], part * (rank + 1))) for rank in range(world.num_ranks))

    times: list[float] = []
    return _transfer(4 * len(part) * world.num_ranks, times, [once() for _ in range(ROUNDS)])


def _pattern(num_bytes: int, world: World) -> torch.Tensor:
    # Small whole numbers, whose float32 sums are exact in any order.
    return (torch.arange(num_bytes // 4, device=world.device) % PATTERN).float()


def _meet_and_time(world: World, times: list[float], action: Callable[[], object]) -> None:
    barrier()
    _wait_for_device(world)
    began = time.perf_counter()
    action()
    _wait_for_device(world)
    times.append(time.perf_counter() - began)


def _wait_for_device(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def _transfer(num_bytes: int, times: list[float], are_right: list[bool]) -> Transfer:
    found = gather_objects((min(times), all(are_right)))
    return Transfer(num_bytes, max(seconds for seconds, _ in found), [rank for rank, (_, is_right) in enumerate(found) if not is_right])


def probe_ring(world: World, num_bytes: int) -> list[float]:
    """Return the seconds in which each rank got `num_bytes` from the rank before it, all at a time, at its best round: a slow link has the rank behind it named."""
    sent, received = torch.ones(num_bytes // 4, device=world.device), torch.zeros(num_bytes // 4, device=world.device)
    before, behind = (world.rank - 1) % world.num_ranks, (world.rank + 1) % world.num_ranks
    times: list[float] = []

    def pass_on() -> None:
        for transfer in dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, behind), dist.P2POp(dist.irecv, received, before)]):
            transfer.wait()

    for _ in range(ROUNDS):
        _meet_and_time(world, times, pass_on)
    return gather_objects(min(times))


def probe_arithmetic(world: World) -> list[float]:
    """Return the TFLOP/s of each rank at a matrix product, all at a time, at its best round."""
    size, dtype = MATRIX[world.device.type], torch.bfloat16 if world.device.type == "cuda" else torch.float32
    matrix = torch.ones(size, size, dtype=dtype, device=world.device)
    times: list[float] = []
    for _ in range(ROUNDS):
        _meet_and_time(world, times, lambda: matrix @ matrix)
    return gather_objects(2 * size**3 / min(times) / 1e12)


def clocks() -> list[float]:
    """Return the unix time of every rank, read at one moment."""
    barrier()
    return gather_objects(time.time())
