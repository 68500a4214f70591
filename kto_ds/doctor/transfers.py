"""What the ranks made of collectives, and of a matrix product: right or wrong, how fast, and who holds the others up."""

import statistics
from collections.abc import Sequence
from typing import Protocol

from kto_ds.doctor.facts import Facts
from kto_ds.doctor.findings import Finding, in_ranges

SLOW_LINK, SLOW_RANK = 3.0, 0.7  # of the median: beyond so many times its seconds, below that share of its rate
SLOW_SECONDS = 0.05  # what a slow link takes at least: less is the noise of a busy machine


class Transfer(Protocol):
    """What runtime/probes.py measures of a collective of one size."""

    num_bytes: int
    seconds: float
    wrong_ranks: list[int]


def check_transfers(name: str, transfers: Sequence[Transfer], facts: Sequence[Facts], *, bus_factor: float) -> Finding:
    """`transfers` are of growing size. `bus_factor`: what a link carries for each byte of a result, so that figures of other numbers of ranks compare."""
    if bad := sorted({rank for transfer in transfers for rank in transfer.wrong_ranks}):
        hosts = ", ".join(sorted({facts[rank].host for rank in bad}))
        return Finding(name, f"{in_ranges(bad)} (host {hosts}) got another result than it must be", "wrong", "take that host out: doubt its memory, its GPU or its network card")
    small, large = transfers[0], transfers[-1]
    rate = large.num_bytes / large.seconds / 1e9
    told = f"{large.num_bytes >> 20} MiB: {rate:.2f} GB/s, {rate * bus_factor:.2f} GB/s of bus; {small.num_bytes >> 10} KiB in {1000 * small.seconds:.2f} ms"
    return Finding(name, f"right on all ranks; {told}")


def check_links(seconds: Sequence[float], facts: Sequence[Facts], *, num_bytes: int) -> Finding:
    """`seconds`: in which each rank got `num_bytes` from the rank before it."""
    rates = [num_bytes / taken / 1e9 for taken in seconds]
    if slow := [rank for rank in _beyond(seconds, SLOW_LINK) if seconds[rank] > SLOW_SECONDS]:
        links = "; ".join(f"from rank {(rank - 1) % len(seconds)} to rank {rank} (host {facts[rank].host}) {rates[rank]:.2f} GB/s" for rank in slow)
        usual = statistics.median_high(rates)
        return Finding("links", f"{links}; the usual is {usual:.2f}", "warn", "see to the card, cable or topology there: the slowest link sets the pace of all ranks")
    return Finding("links", f"from each rank to the next {min(rates):.2f} to {max(rates):.2f} GB/s")


def check_speeds(rates: Sequence[float], facts: Sequence[Facts]) -> Finding:
    """`rates`: TFLOP/s of each rank at the same work, all at a time."""
    if slow := _beyond([1 / rate for rate in rates], 1 / SLOW_RANK):
        named = "; ".join(f"rank {rank} (host {facts[rank].host}) {rates[rank]:.3g} TFLOP/s" for rank in slow)
        usual = statistics.median_high(rates)
        return Finding("speed", f"{named}; the usual is {usual:.3g}", "warn", "see who else computes there, and whether the device is throttled (nvidia-smi -q -d PERFORMANCE)")
    return Finding("speed", f"{min(rates):.3g} to {max(rates):.3g} TFLOP/s a rank at a matrix product")


def _beyond(seconds: Sequence[float], factor: float) -> list[int]:
    """Return the ranks that took more than `factor` times the median."""
    usual = statistics.median_low(seconds)
    return [rank for rank, taken in enumerate(seconds) if taken > factor * usual]
