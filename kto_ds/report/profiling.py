"""A torch profiler trace of a few steps, for Perfetto or chrome://tracing."""

from pathlib import Path
from types import TracebackType

from torch.profiler import profile, schedule

STEPS = (3, 5)  # of this process, from 1: the first two warm up
FILE = "profile/rank0.json.gz"


class StepProfiler:
    """Records steps 3 to 5 and writes FILE under `folder`; with None instead of a folder it does nothing."""

    def __init__(self, folder: Path | None):
        self._folder = folder
        first, last = STEPS
        # The profiler itself warms up in the step before the first.
        steps = schedule(wait=first - 2, warmup=1, active=last - first + 1, repeat=1)
        self._profile = profile(schedule=steps, on_trace_ready=self._write, with_stack=True) if folder else None

    def _write(self, recorded: profile) -> None:
        path = self._folder / FILE
        path.parent.mkdir(exist_ok=True)
        recorded.export_chrome_trace(str(path))
        print(f"profile of steps {STEPS[0]} to {STEPS[1]}: {path}; open it at https://ui.perfetto.dev", flush=True)

    def after_step(self) -> None:
        if self._profile:
            self._profile.step()

    def __enter__(self) -> "StepProfiler":
        if self._profile:
            self._profile.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._profile:
            self._profile.__exit__(kind, error, trace)
