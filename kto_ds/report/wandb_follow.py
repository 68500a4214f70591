"""Copies a run's record to a wandb run while it is written: line n of metrics.jsonl is step n there."""

import threading
import time
from pathlib import Path

import wandb

from kto_ds.report import wandb_alerts
from kto_ds.report.metric_names import SECTIONS, axis_of, panel_names
from kto_ds.report.metrics_file import METRICS_FILE, Record, whole_records
from kto_ds.report.samples_file import SAMPLES_FILE
from kto_ds.report.wandb_alerts import Alert, StillRanks

POLL_SECONDS = 0.5
NO_VERSION = (0, 0)  # of a file that is not there
# That the status of a run has to say how it ended. After an error of a collective it takes LOST_SECONDS of runtime/watch.py; what is left of FINISH_SECONDS is for the upload.
STATUS_SECONDS = 30.0
SAMPLE_COLUMNS = ("step", "row", "label", "prompt", "before", "completion", "dataset_completion", "dataset_reward")


def follow(run: wandb.Run, folder: Path, ended: threading.Event, *, watch_from: int | None, stall_seconds: float) -> int:
    """Log every record of the run in `folder` until training has ended, and return how many there are; those that the wandb run has already are left out.

    What happens after step `watch_from` may raise an alert; None: nothing does.
    """
    present, done, rest, known_until = run.step, 0, b"", -1
    tables_until: dict[str, int] = {}  # steps
    samples_seen = NO_VERSION
    splits: set[str] = set()
    ranks = StillRanks(folder / "ranks", stall_seconds)
    with (folder / METRICS_FILE).open("rb") as file:
        is_last = False
        while not is_last:
            is_last = ended.wait(POLL_SECONDS)  # and once more, for what came in between
            records, rest = whole_records(rest + file.read())
            for record in records:
                if record["split"] not in splits:
                    splits.add(record["split"])
                    define_axis(run, record["split"])
                if done < present:
                    known_until = record["step"]
                else:
                    run.log(named(record), step=done)
                    if watch_from is not None and record["step"] > watch_from:
                        alert(run, wandb_alerts.of_record(record))
                done += 1
            samples_now = version_of(folder / SAMPLES_FILE)
            if done > present and samples_now != samples_seen:  # a table joins the row that was logged last: with a step of its own it would take that of a line
                samples_seen = samples_now
                samples = {split: found for split, found in samples_by_split(folder / SAMPLES_FILE).items() if found[-1]["step"] > tables_until.get(split, known_until)}
                if samples:
                    run.log({f"{split}/samples": _table(found) for split, found in samples.items()}, step=done - 1)
                tables_until |= {split: found[-1]["step"] for split, found in samples.items()}
            if watch_from is not None:
                alert(run, ranks.look(time.time()))
    return done


def define_axis(run: wandb.Run, split: str) -> None:
    """Have all panels of a split show its own steps, and the table of runs its best evaluation beside the last."""
    axis = axis_of(split)
    run.define_metric(axis, hidden=True)
    for section in SECTIONS if split == "train" else (split,):
        run.define_metric(f"{section}/*", step_metric=axis)
    for name, best in (("loss", "min"), ("rewards/auc", "max")) if split != "train" else ():
        run.define_metric(f"{split}/{name}", step_metric=axis, summary=f"{best},last")


def named(record: Record) -> dict[str, float | int]:
    """Return the numbers of a record under the names that wandb shows, and the axis that they have."""
    return {axis_of(record["split"]): record["step"], **panel_names(record)}


def version_of(file: Path) -> tuple[int, int]:
    """Return what changes when a file is written anew: its time of change and its size."""
    try:
        found = file.stat()
    except OSError:
        return NO_VERSION
    return found.st_mtime_ns, found.st_size


def samples_by_split(samples_file: Path) -> dict[str, list[dict]]:
    """Return all that the policy has answered so far."""
    try:
        samples, _ = whole_records(samples_file.read_bytes())
    except OSError:  # nothing is asked
        return {}
    found: dict[str, list[dict]] = {}
    for sample in samples:
        found.setdefault(sample["split"], []).append(sample)
    return found


def _table(samples: list[dict]) -> wandb.Table:
    columns = [column for column in SAMPLE_COLUMNS if any(column in sample for sample in samples)]
    return wandb.Table(columns=columns, data=[[sample.get(column) for column in columns] for sample in samples], allow_mixed_types=True)


def how_it_ended(status_file: Path) -> Alert | None:
    """Return what is to be said of an end that training did not announce. Its status may be written a moment after it."""
    deadline = time.monotonic() + STATUS_SECONDS
    while not wandb_alerts.has_ended(status_file) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return wandb_alerts.of_end(status_file)


def alert(run: wandb.Run, found: Alert | None) -> None:
    if found is not None:
        run.alert(found.title, found.text, level=found.level)
