"""Where the numbers of a run go: metrics.jsonl is the record, the console and wandb are views of it.

A record is a flat mapping with "split" ("train", or the name of an evaluation split), "step" and metrics. Rank 0 calls `open_sinks`; the other ranks hold `Sinks([])`.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from kto_ds.artifacts import write_atomically
from kto_ds.config import WandbConfig
from kto_ds.report.console import Console, Record

METRICS_FILE = "metrics.jsonl"
WANDB_INIT_SECONDS = 20  # wandb itself adds up to 10 before it gives up, so training waits for half a minute at most
WANDB_FINISH_SECONDS = 60


class Sink(Protocol):
    def log(self, record: Record) -> None: ...
    def close(self) -> None: ...


class Sinks:
    def __init__(self, sinks: Sequence[Sink]):
        self._sinks = sinks

    def log(self, record: Record) -> None:
        for sink in self._sinks:
            sink.log(record)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


def open_sinks(*, output_dir: Path, total_steps: int, done_steps: int, wandb: WandbConfig, run_config: dict) -> Sinks:
    """Open all sinks of a run that has `done_steps` behind it: 0 starts the record anew, else what was logged after them is dropped."""
    metrics = MetricsFile(output_dir / METRICS_FILE)
    metrics.drop_after(done_steps or -1)
    console = Console(total_steps, done_steps)
    sinks: list[Sink] = [metrics, console]
    if wandb.mode != "disabled":
        sinks.append(WandbRun(wandb, output_dir=output_dir, run_config=run_config, resume=done_steps > 0, tell=console.tell))
    return Sinks(sinks)


class MetricsFile:
    """One JSON object a line, on disk as soon as it is logged. What is not finite does not get in."""

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def log(self, record: Record) -> None:
        for name, value in record.items():
            assert isinstance(value, str) or math.isfinite(value), f"{name} is {value} at step {record['step']}"
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def drop_after(self, step: int) -> None:
        """Keep the whole records up to `step`, for a run that resumes from there."""
        self._file.close()
        kept = [json.dumps(record) + "\n" for record in read_records(self._path) if record["step"] <= step]
        write_atomically(self._path, "".join(kept))
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()


def read_records(metrics_file: Path) -> list[Record]:
    """Return the whole records of a metrics file, which may be of a run that goes on, or that was killed within a line."""
    whole_lines = metrics_file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    return [record for line in whole_lines if (record := _parse(line)) is not None]


def _parse(line: str) -> Record | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


class WandbRun:
    """A view that may fail: no wandb error ends a training run, so this class alone catches every exception, and says so once."""

    def __init__(self, settings: WandbConfig, *, output_dir: Path, run_config: dict, resume: bool, tell: Callable[[str], None]):
        self._tell, self._run = tell, None
        id_file = output_dir / "wandb" / "run_id"
        run_id = id_file.read_text(encoding="utf-8") if resume and id_file.exists() else None
        known = dict(project=settings.project, name=settings.name or output_dir.resolve().name, id=run_id, dir=str(output_dir), config=run_config)
        try:
            self._run = self._start_online(known) if settings.mode == "online" else _start("offline", known)
            id_file.parent.mkdir(exist_ok=True)
            write_atomically(id_file, self._run.id)
            tell(f"wandb: {self._run.url or f'offline; to upload it: wandb sync {Path(self._run.dir).parent}'}")
        except Exception as error:
            self._give_up(error)

    def _start_online(self, known: dict):
        import wandb

        try:
            if wandb.login(prompt=False, verify=False):
                return _start("online", known)
            reason = "no API key; run `wandb login` or set WANDB_API_KEY"
        except Exception as error:
            reason = _one_line(error)
        self._tell(f"warning: wandb goes offline: {reason}")
        return _start("offline", known)

    def log(self, record: Record) -> None:
        if self._run is None:
            return
        named = {f"{record['split']}/{name}": value for name, value in record.items() if name not in ("split", "step")}
        try:
            self._run.log({"step": record["step"], **named})
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        try:
            if self._run is not None:
                self._run.finish()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        self._tell(f"warning: wandb is off from here on; metrics.jsonl goes on: {_one_line(error)}")


def _start(mode: str, known: dict):
    import wandb

    quiet = wandb.Settings(silent=True, init_timeout=WANDB_INIT_SECONDS, finish_timeout=WANDB_FINISH_SECONDS)
    run = wandb.init(mode=mode, resume="allow", settings=quiet, **known)
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
