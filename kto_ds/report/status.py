"""status.json: the truth about a run, whatever the launcher's exit code says."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kto_ds.artifacts import write_atomically
from kto_ds.errors import EXIT_OK, EXIT_PREEMPTED, EXIT_UNEXPECTED, KtoError, Preempted, disk_may_be_full
from kto_ds.redaction import redact

LEAST_SECONDS = 5.0  # between two writes of one state: every write waits for the disk
WRITE_SECONDS = 5.0  # that the end waits for a write under way, on a disk that may never answer


class RunStatus:
    """Keeps {"state", "step", "exit_code", "reason"} of a run on disk: running, then completed, preempted or failed.

    Only rank 0 writes, unless it is gone; a step may be some seconds old while the run goes on. Any thread may write the end, which is never overwritten.
    """

    def __init__(self, path: Path, *, is_main: bool, clock: Callable[[], float] = time.monotonic):
        self._path, self._is_main, self._clock = path, is_main, clock
        self._step, self._state, self._written_at = 0, "", 0.0
        self._lock = threading.Lock()

    def running(self, step: int) -> None:
        self._step = step
        if self._is_main and (self._state != "running" or self._clock() - self._written_at >= LEAST_SECONDS):
            self._write("running", None, "")

    def end(self, state: str, exit_code: int, reason: str) -> None:
        """Write how the run ended; a rank other than 0 calls this only in place of a rank 0 that cannot."""
        self._write(state, exit_code, reason)

    def _write(self, state: str, exit_code: int | None, reason: str) -> None:
        if not self._lock.acquire(timeout=WRITE_SECONDS):
            return
        try:
            if self._state in ("", "running"):
                self._state, self._written_at = state, self._clock()
                _put(self._path, json.dumps({"state": state, "step": self._step, "exit_code": exit_code, "reason": redact(reason)}))
        finally:
            self._lock.release()

    @contextmanager
    def until_the_end(self) -> Iterator["RunStatus"]:
        """Write `completed` when the block ends well, `preempted` or `failed` with exit code and reason when it raises."""
        try:
            with disk_may_be_full(self._path.parent):
                yield self
        except BaseException as error:
            exit_code = error.exit_code if isinstance(error, KtoError) else EXIT_UNEXPECTED
            is_stop = isinstance(error, (Preempted, KeyboardInterrupt))  # the latter of a signal that came before anything listened
            if self._is_main:
                self.end("preempted" if is_stop else "failed", EXIT_PREEMPTED if is_stop else exit_code, f"{type(error).__name__}: {error}")
            raise
        if self._is_main:
            self.end("completed", EXIT_OK, "")


def _put(path: Path, text: str) -> None:
    """Write the file, whole if that can be; the run itself says what is wrong with the disk."""
    try:
        write_atomically(path, text)
    except OSError:
        with suppress(OSError):  # a full disk has room for what is overwritten
            path.write_text(text, encoding="utf-8")
