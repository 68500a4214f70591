"""Faults that a rank puts into itself at a point of the code; see points.py for those points."""

import builtins
import functools
import io
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.points import Point, call_at

SPEAKING = "kto-ds: "


def at_point(rank: int, *, point: Point, victims: tuple[int, ...], action: Callable[[], None], folder: Path) -> None:
    """In every rank, ahead of the program: the victims do `action` at the point, and note when they began."""
    if rank in victims:
        call_at(point, functools.partial(_noted, rank, action, folder))


def _noted(rank: int, action: Callable[[], None], folder: Path) -> None:
    (folder / f"happened{rank}").write_text(str(time.time()))
    action()


def happened_at(folder: Path, victims: tuple[int, ...]) -> float:
    """Return the unix time of the last of the faults; each victim must have had its own."""
    times = {rank: float(path.read_text()) for rank in victims if (path := folder / f"happened{rank}").exists()}
    assert times.keys() == set(victims), f"the fault happened on {list(times)} instead of {victims}"
    return max(times.values())


def send(*signals: int, pause: float = 0.0, then: float = 0.0) -> None:
    """Send signals to this very process, with a pause between them, and wait `then` seconds."""
    for number, signum in enumerate(signals):
        time.sleep(pause if number else 0.0)
        os.kill(os.getpid(), signum)
    time.sleep(then)


def stop_for_good() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def messages(output: str) -> list[str]:
    """Return what the program said at its end, one entry a message; a rank other than 0 puts its number before it."""
    return [line for line in output.splitlines() if line.startswith((SPEAKING, "[rank ")) and SPEAKING in line]


def deny(pattern: str, reason: int, put_in: Callable[[object, str, object], None] = setattr, *, functions: tuple[str, ...] = ("open",)) -> None:
    """Let functions of the system fail for every path that fits, as they do for who has no right to it, or on a bad disk."""

    def denying(original: Callable) -> Callable:
        def denied(path=".", *arguments, **named):
            if not isinstance(path, int) and re.search(pattern, os.fsdecode(path)):
                raise OSError(reason, os.strerror(reason), os.fspath(path))
            return original(path, *arguments, **named)

        return denied

    for function in functions:
        for holder in (builtins, io) if function == "open" else (os,):
            put_in(holder, function, denying(vars(holder)[function]))
