"""Where the numbers of a run go: metrics.jsonl is the record, the console, TensorBoard and wandb are views of it.

Rank 0 calls `open_sinks`; the other ranks hold `Sinks([])`.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from kto_ds.config import ReportConfig
from kto_ds.report.console import Console
from kto_ds.report.metrics_file import METRICS_FILE, MetricsFile, Record, read_records
from kto_ds.report.tensorboard import FOLDER, TensorBoard
from kto_ds.report.wandb_process import CLOSE_SECONDS, WandbProcess, forget_run, wandb_order


class Sink(Protocol):
    def log(self, record: Record) -> None: ...
    def close(self) -> None: ...


class Sinks:
    def __init__(self, sinks: Sequence[Sink]):
        self._sinks = sinks

    def log(self, record: Record) -> None:
        for sink in self._sinks:
            sink.log(record)

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        """Close all; the first error stays. It is not kept waiting for wandb: other ranks may have it too, and would tell it if rank 0 did not."""
        first = error
        for sink in self._sinks:
            try:
                if isinstance(sink, WandbProcess):
                    sink.close(CLOSE_SECONDS if first is None else 0, is_good=first is None)
                else:
                    sink.close()
            except Exception as failed:
                first = first or failed
        if first is not error:
            raise first


def open_sinks(
    *, output_dir: Path, total_steps: int, done_steps: int, report: ReportConfig, run_config: dict, sources: Mapping[str, Path] = {}, stall_seconds: float = math.inf
) -> Sinks:
    """Open all sinks of a run that has `done_steps` behind it: 0 starts the record anew, else what was logged after them is dropped.

    `sources`: the folders of the artefacts it is made from, by kind. wandb raises an alert after `stall_seconds` without progress.
    """
    metrics = MetricsFile(output_dir / METRICS_FILE)
    num_dropped = metrics.drop_after(done_steps or -1)
    if num_dropped or not done_steps:
        forget_run(output_dir)  # wandb keeps what it got: the record goes, as it is now, to a run of its own
    console = Console(total_steps, done_steps)
    sinks: list[Sink] = [metrics, console]
    if report.tensorboard:
        sinks.append(TensorBoard(output_dir / FOLDER, known=read_records(output_dir / METRICS_FILE), tell=console.tell))
    if report.wandb.mode != "disabled":
        order = wandb_order(
            report.wandb, report.wandb.mode, output_dir=output_dir, run_config=run_config, sources=sources, watch_from=done_steps, stall_seconds=stall_seconds
        )
        # Last to be opened and closed: it reads what the first has written.
        sinks.append(WandbProcess(order, tell=console.tell))
    return Sinks(sinks)
