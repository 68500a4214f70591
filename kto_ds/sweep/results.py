"""What has become of the trials: from their own files, as any of them may have been run elsewhere; and all of them as a table."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from kto_ds.artifacts import read_json
from kto_ds.errors import EXIT_OK, EXIT_PREEMPTED, Unreadable
from kto_ds.report.metrics_file import METRICS_FILE, Record, read_records
from kto_ds.sweep.grid import Trial, as_text

NOT_BEGUN = "not begun"
RUNNING = "running"  # in a status.json, until the run has ended in order
SHOWN = ("rewards/auc", "rewards/margins", "loss", "kl")


class Metric(NamedTuple):
    """What trials are compared by."""

    split: str
    name: str
    takes_best: bool  # of all evaluations, as that checkpoint is kept; else the last one counts
    greater_is_better: bool

    def __str__(self) -> str:
        return f"{self.split}/{self.name}"


class Spent(NamedTuple):
    """What the sweep itself saw of a trial."""

    seconds: float  # in all starts
    exit_code: int  # of the last one


class Result(NamedTuple):
    trial: Trial
    folder: Path
    state: str  # of its status.json
    step: int | None
    reason: str
    value: float | None  # of the metric
    metrics: dict[str, float]  # of the same evaluation
    spent: Spent | None  # None of a trial that was run elsewhere


def read_result(trial: Trial, folder: Path, metric: Metric, spent: Spent | None) -> Result:
    status = _status(folder)
    records = _evaluations(folder, metric)
    chosen: Record = {}
    if records:
        order = (lambda record: record[metric.name]) if metric.greater_is_better else (lambda record: -record[metric.name])
        chosen = max(records, key=order) if metric.takes_best else records[-1]
    metrics = {name: chosen[name] for name in SHOWN if name in chosen}
    reason = next(iter(str(status.get("reason") or "").splitlines()), "")
    state = status.get("state", NOT_BEGUN)
    if state == NOT_BEGUN and spent and spent.exit_code not in (EXIT_OK, EXIT_PREEMPTED):  # refused before it had a folder
        state, reason = "failed", f"exit code {spent.exit_code}"
    if state == RUNNING and spent and spent.exit_code:
        reason = f"killed, or still running elsewhere: its last start here ended with exit code {spent.exit_code}"
    return Result(trial, folder, state, chosen.get("step", status.get("step")), reason, chosen.get(metric.name), metrics, spent)


def _status(folder: Path) -> dict:
    try:
        found = read_json(folder / "status.json")
    except (ValueError, Unreadable):
        return {}
    return found if isinstance(found, dict) else {}


def _evaluations(folder: Path, metric: Metric) -> list[Record]:
    path = folder / METRICS_FILE
    records = read_records(path) if path.is_file() else []
    return [record for record in records if record["split"] == metric.split and metric.name in record]


def best_first(results: Sequence[Result], metric: Metric) -> list[Result]:
    """Return the completed trials by their metric, then the others."""
    sign = -1 if metric.greater_is_better else 1
    ranked = sorted((result for result in results if is_ranked(result)), key=lambda result: sign * result.value)
    return [*ranked, *(result for result in results if not is_ranked(result))]


def is_ranked(result: Result) -> bool:
    return result.state == "completed" and result.value is not None


def show_results(results: Sequence[Result], metric: Metric) -> None:
    """Print the table. A path or a reason stays in one piece."""
    table = Table(title=f"sweep, by {metric}{' at its best' if metric.takes_best else ' at the end'}", box=None, padding=(0, 2, 0, 0))
    keys = list(dict.fromkeys(key for result in results for key in result.trial.settings))
    others = [name for name in SHOWN if name != metric.name and any(name in result.metrics for result in results)]
    for title in ("", *keys, str(metric), *others, "step", "minutes", "state"):
        table.add_column(title)
    for place, result in enumerate(results, start=1):
        state = result.state if result.state == "completed" or not result.reason else f"{result.state}: {result.reason}"
        table.add_row(
            str(place) if is_ranked(result) else "-", *(as_text(result.trial.settings.get(key, "")) for key in keys), _number(result.value),
            *(_number(result.metrics.get(name)) for name in others), str(result.step or "-"), "-" if result.spent is None else f"{result.spent.seconds / 60:.1f}", state,
        )  # fmt: skip
    Console(width=1000, markup=False, highlight=False).print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def as_json(result: Result) -> dict:
    spent = result.spent._asdict() if result.spent else {"seconds": None, "exit_code": None}
    values = {name: value for name, value in result._asdict().items() if name not in ("trial", "folder", "spent")}
    return {"trial": result.trial.name, "settings": result.trial.settings, "folder": str(result.folder), **values, **spent}


def as_csv(results: Sequence[Result], metric: Metric) -> str:
    """Return the table as CSV, a row for each trial, best first."""
    keys = list(dict.fromkeys(key for result in results for key in result.trial.settings))
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(["trial", *keys, str(metric), *SHOWN, "step", "seconds", "state", "folder"])
    for result in results:
        settings = [as_text(result.trial.settings[key]) if key in result.trial.settings else "" for key in keys]
        metrics = [result.metrics.get(name, "") for name in SHOWN]
        writer.writerow([result.trial.name, *settings, "" if result.value is None else result.value, *metrics, result.step, result.spent.seconds if result.spent else "", result.state, result.folder])
    return stream.getvalue()
