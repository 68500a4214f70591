"""A torch profiler trace of a few steps, for Perfetto or chrome://tracing."""

from pathlib import Path
from types import TracebackType

from torch.profiler import profile, schedule

from kto_ds.errors import UserError

FIRST, LAST = 3, 5  # steps since this start; those before warm up
FILE = "profile/rank0.json.gz"


def make_room(folder: Path) -> None:
    """See that FILE can be written under `folder`, and remove that of an earlier start; UserError where it cannot."""
    path = folder / FILE
    try:
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write a profile: {error.strerror}", where=str(path), remedy="remove what is in its way, or leave --profile out") from error


class StepProfiler:
    """Records steps 3 to 5 and writes FILE under `folder`; with None instead of a folder it does nothing."""

    def __init__(self, folder: Path | None):
        self._path = folder and folder / FILE
        self._steps = 0
        # The profiler itself warms up in the step before the first.
        self._profile = folder and profile(schedule=schedule(wait=FIRST - 2, warmup=1, active=LAST - FIRST + 1, repeat=1))

    def after_step(self) -> None:
        """Count a step. After the last one that is recorded this writes the trace, which takes seconds that belong to no step."""
        if self._path is None or self._steps == LAST:
            return
        self._steps += 1
        self._profile.step()
        if self._steps == LAST:
            self._profile.stop()
            try:
                self._profile.export_chrome_trace(str(self._path))
                print(f"profile of steps {FIRST} to {LAST} since this start: {self._path}; open it at https://ui.perfetto.dev", flush=True)
            except OSError as error:
                print(f"notice: the profile could not be written to {self._path}: {error.strerror}", flush=True)

    def __enter__(self) -> "StepProfiler":
        if self._path:
            self._profile.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._path and self._steps < LAST:
            self._profile.stop()
            print(f"notice: no profile, as only {self._steps} steps were taken since this start; it needs {LAST}", flush=True)
