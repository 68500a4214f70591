"""How fast the run goes and how much memory it takes, of this process alone; sums over ranks are the caller's."""

import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.profiler import record_function

GIB = 1024**3
RSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024  # getrusage(2) counts in KiB on Linux, in bytes on macOS
# What a run spends its time on: mismatched pairs, matched pairs with their backward, the optimizer, and the host alone (waiting for the next
# batches, writing log lines). Evaluation and saving are nobody's.
PHASES = ("kl", "policy", "update", "host")
PAUSED = "paused"


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory this process has held so far: allocated by torch on a CUDA device, else resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT_BYTES / GIB


class Clock(NamedTuple):
    """Moments and the seconds between them."""

    now: Callable[[], Any]
    seconds_between: Callable[[Any, Any], float]


HOST_CLOCK = Clock(time.perf_counter, lambda begin, end: end - begin)


def device_clock(device: torch.device) -> Clock:
    """Return the clock of what runs on the device. CUDA works behind Python's back, so moments are events in its stream; reading one waits for it."""
    if device.type != "cuda":
        return HOST_CLOCK

    def now() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds_between(begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    return Clock(now, seconds_between)


class Work(NamedTuple):
    """What steps took in, over all ranks."""

    tokens: int  # of matched pairs, prompts and completions
    model_flops: float  # that the steps need
    hardware_flops: float  # with what is computed again in backward


class Lap(NamedTuple):
    seconds_of: dict[str, float]  # by phase
    work: Work

    @property
    def seconds(self) -> float:
        return sum(self.seconds_of.values())

    def per_second(self, amount: float) -> float:
        return amount / self.seconds if self.seconds > 0 else 0.0


class StepTimer:
    """Time and work since the last lap. Every moment belongs to the phase begun last."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self._marks = [("host", clock.now())]  # (phase, when it began)
        self._work = Work(0, 0.0, 0.0)
        self._range = record_function("host")  # names the phase in a profile
        self._range.__enter__()

    def begin(self, phase: str) -> None:
        self._marks.append((phase, self._clock.now()))
        self._range.__exit__(None, None, None)
        self._range = record_function(phase)
        self._range.__enter__()

    def add(self, work: Work) -> None:
        self._work = Work(*(sum(amounts) for amounts in zip(self._work, work)))

    def lap(self) -> Lap:
        """Return seconds and work since the last lap, and begin the next in the phase that goes on."""
        self._marks.append((self._marks[-1][0], self._clock.now()))
        seconds_of = dict.fromkeys(PHASES, 0.0)
        for (phase, begin), (_, end) in zip(self._marks, self._marks[1:]):
            if phase != PAUSED:
                seconds_of[phase] += self._clock.seconds_between(begin, end)
        lap = Lap(seconds_of, self._work)
        self._marks, self._work = self._marks[-1:], Work(0, 0.0, 0.0)
        return lap


def speed_metrics(lap: Lap, *, num_steps: int, num_ranks: int, peak_flops: float | None) -> dict[str, float]:
    """Return what metrics.jsonl says about a lap of `num_steps` steps: TFLOP/s where operations were counted, MFU and HFU where the device's rate is known."""
    metrics = {"tokens_per_second": lap.per_second(lap.work.tokens), "seconds": lap.seconds / num_steps}
    metrics |= {f"seconds/{phase}": seconds / num_steps for phase, seconds in lap.seconds_of.items()}
    if lap.work.model_flops:
        metrics["tflops"] = lap.per_second(lap.work.model_flops) / num_ranks / 1e12
    if lap.work.model_flops and peak_flops:
        metrics["mfu"] = lap.per_second(lap.work.model_flops) / num_ranks / peak_flops
        metrics["hfu"] = lap.per_second(lap.work.hardware_flops) / num_ranks / peak_flops
    return metrics


def sum_of_laps(laps: list[Lap]) -> Lap:
    work = Work(*(sum(amounts) for amounts in zip(*(lap.work for lap in laps))))
    return Lap({phase: sum(lap.seconds_of[phase] for lap in laps) for phase in PHASES}, work)


def speed_rows(lap: Lap, peaks_gib: list[float], *, peak_flops: float | None) -> list[tuple[str, str]]:
    """Return what a run says at its end, by label: speed, memory at its peak on every rank, and where the time went."""
    speed = speed_metrics(lap, num_steps=1, num_ranks=len(peaks_gib), peak_flops=peak_flops)
    rate = f", {speed['tflops']:.3g} TFLOP/s a rank" if "tflops" in speed else ""
    used = f", MFU {speed['mfu']:.1%}, HFU {speed['hfu']:.1%}" if "mfu" in speed else ""
    lowest, highest = min(peaks_gib), max(peaks_gib)
    return [
        ("speed", f"{speed['tokens_per_second']:,.0f} tokens/s since this start ({lap.work.tokens:,} tokens in {lap.seconds:,.1f} s){rate}{used}"),
        ("time", ", ".join(f"{phase} {lap.per_second(seconds):.0%}" for phase, seconds in lap.seconds_of.items())),
        ("memory", f"{highest:.2f} GiB at the peak" if len(peaks_gib) == 1 else f"{lowest:.2f} to {highest:.2f} GiB at the peak on each rank"),
    ]
