"""How fast the run goes and how much memory it takes, of this process alone; sums over ranks are the caller's."""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

GIB = 1024**3
RSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024  # getrusage(2) counts in KiB on Linux, in bytes on macOS


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory this process has held so far: allocated by torch on a CUDA device, else resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT_BYTES / GIB


class Lap(NamedTuple):
    seconds: float
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


class StepTimer:
    """Time and tokens since the last lap. CUDA works behind Python's back: end a lap after something that waits for the device."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._started = clock()
        self._paused_seconds = 0.0
        self._tokens = 0

    def add_tokens(self, count: int) -> None:
        self._tokens += count

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is not training: evaluation, saving."""
        since = self._clock()
        try:
            yield
        finally:
            self._paused_seconds += self._clock() - since

    def lap(self) -> Lap:
        """Return seconds and tokens since the last lap, and begin the next."""
        now = self._clock()
        lap = Lap(seconds=now - self._started - self._paused_seconds, tokens=self._tokens)
        self._started, self._paused_seconds, self._tokens = now, 0.0, 0
        return lap
