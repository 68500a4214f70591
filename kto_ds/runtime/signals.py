"""Signals that ask a run to stop, and the wall time that does.

A Python handler runs only between two steps of the main thread, which may sit in a collective for minutes. So a thread of its own listens.
"""

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil

from kto_ds.early import STOPPING
from kto_ds.errors import Preempted, UserError

WALL_TIME = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)")


@contextmanager
def listening(hear: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Call `hear` on another thread for every stopping signal inside the block, which the main thread runs; after it they do what they did before."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(writer, False)
    handlers = {signum: signal.signal(signum, _leave_it_to_the_thread) for signum in STOPPING}
    descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_pass_on, args=(reader, hear), name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        for signum, handler in handlers.items():
            signal.signal(signum, handler or signal.SIG_DFL)  # None is a handler that is not of Python
        os.close(writer)
        thread.join()
        os.close(reader)


def _leave_it_to_the_thread(signum: int, frame: object) -> None:
    """Without a handler of Python's there would be no byte in the pipe."""


def _pass_on(reader: int, hear: Callable[[signal.Signals], None]) -> None:
    while numbers := os.read(reader, 64):
        for number in numbers:
            if number in STOPPING:
                hear(signal.Signals(number))


@contextmanager
def interruptible(what_is_kept: str) -> Iterator[None]:
    """Turn a stopping signal inside the block into Preempted at once; for a single process whose unfinished work can be gone on with."""
    heard: list[str] = []

    def interrupt(signum: int, frame: object) -> None:
        heard.append(signal.Signals(signum).name)
        raise KeyboardInterrupt  # which no library takes for an error of its own

    handlers = {signum: signal.signal(signum, interrupt) for signum in STOPPING}
    try:
        yield
    except KeyboardInterrupt as error:
        raise Preempted(f"{heard[0] if heard else 'SIGINT'}: {what_is_kept}; start the same command again to go on") from error
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler or signal.SIG_DFL)


def wall_seconds(text: str) -> float:
    """Return the seconds of a wall time: a number of seconds, or [D-]HH:MM:SS as SLURM writes it."""
    if match := WALL_TIME.fullmatch(text):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        found = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    else:
        try:
            found = float(text)
        except ValueError:
            found = 0.0
    if not 0 < found < float("inf"):
        raise UserError(f"{text!r} is no wall time", where="--max-wall-time", remedy="give seconds, or [D-]HH:MM:SS")
    return found


class WallTime:
    """When a run must stop to be through with saving before its time is over. Without a limit it never must."""

    def __init__(self, limit: float | None, *, started: float | None = None, clock: Callable[[], float] = time.time):
        """`limit` in seconds from `started`, the start of this process."""
        self._limit, self._clock = limit, clock
        self._started = psutil.Process().create_time() if started is None else started
        self._longest_step = self._longest_save = 0.0

    def took(self, *, step: float = 0.0, save: float = 0.0) -> None:
        """Note the seconds that a step or a save took."""
        self._longest_step, self._longest_save = max(self._longest_step, step), max(self._longest_save, save)

    def is_over(self) -> bool:
        """Whether what is left is less than another step and its save may take."""
        return self._limit is not None and self._limit - (self._clock() - self._started) < self._longest_step + self._longest_save
