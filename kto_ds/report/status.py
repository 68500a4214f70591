"""status.json: the truth about a run, whatever the launcher's exit code says."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kto_ds.artifacts import write_atomically
from kto_ds.errors import EXIT_OK, EXIT_UNEXPECTED, KtoError
from kto_ds.redaction import redact

LEAST_SECONDS = 5.0  # between two writes of one state: every write waits for the disk


class RunStatus:
    """Keeps {"state", "step", "exit_code", "reason"} of a run on disk; only rank 0 writes. A step may be some seconds old while the run goes on."""

    def __init__(self, path: Path, *, is_main: bool, clock: Callable[[], float] = time.monotonic):
        self._path, self._is_main, self._clock = path, is_main, clock
        self._step, self._state, self._written_at = 0, "", 0.0

    def running(self, step: int) -> None:
        self._step = step
        if self._state != "running" or self._clock() - self._written_at >= LEAST_SECONDS:
            self._write("running", None, "")

    def _write(self, state: str, exit_code: int | None, reason: str) -> None:
        self._state, self._written_at = state, self._clock()
        if self._is_main:
            write_atomically(self._path, json.dumps({"state": state, "step": self._step, "exit_code": exit_code, "reason": reason}))

    @contextmanager
    def until_the_end(self) -> Iterator["RunStatus"]:
        """Write `completed` when the block ends well, `failed` with exit code and reason when it raises."""
        try:
            yield self
        except BaseException as error:
            exit_code = error.exit_code if isinstance(error, KtoError) else EXIT_UNEXPECTED
            self._write("failed", exit_code, redact(f"{type(error).__name__}: {error}"))
            raise
        self._write("completed", EXIT_OK, "")
