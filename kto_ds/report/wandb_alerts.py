"""When somebody who is not looking should hear of a run: a step without an update, a rank that stands still, an end that was not meant. No wandb in it."""

import json
from pathlib import Path
from typing import NamedTuple

from kto_ds.report.metrics_file import Record
from kto_ds.report.screen import duration

LOOK_SECONDS = 15.0
ENDED = ("done", "failed", "preempted")  # phases of a rank that has left


class Alert(NamedTuple):
    title: str
    text: str
    level: str  # as wandb has them: INFO, WARN or ERROR


def of_record(record: Record) -> Alert | None:
    """Return the alert that a new line of metrics asks for."""
    if not record.get("skipped_steps"):
        return None
    return Alert("steps left out", f"step {record['step']}: {record['skipped_steps']} updates with NaN, Inf or a loss spike were left out since the last line; see numerics.jsonl", "WARN")


class StillRanks:
    """Looks now and then for the rank that has stood still for longest, and tells of it once, until all move again."""

    def __init__(self, folder: Path, stall_seconds: float):
        self._folder, self._stall_seconds, self._looked_at, self._is_told = folder, stall_seconds, 0.0, False

    def look(self, now: float) -> Alert | None:
        """Return an alert where a rank has had no progress for `stall_seconds` by `now`, a unix time."""
        if now - self._looked_at < LOOK_SECONDS:
            return None
        self._looked_at = now
        beats = [beat for path in self._folder.glob("rank*.json") if (beat := _read(path)).get("phase") not in (None, *ENDED)]
        slowest = min(beats, key=lambda beat: beat["beat"], default=None)
        was_told, self._is_told = self._is_told, slowest is not None and now - slowest["beat"] >= self._stall_seconds
        if was_told or not self._is_told:
            return None
        where = f"rank {slowest['rank']} on {slowest['host']}, {slowest['phase']} of step {slowest['step']}"
        return Alert("no progress", f"{where}: no progress for {duration(now - slowest['beat'])}", "WARN")


def of_end(status_file: Path) -> Alert | None:
    """Return the alert for a run that has ended without saying so to its views: what its status says of it."""
    status = _read(status_file)
    state = status.get("state")
    if state in ("completed", "preempted"):
        return None
    if state == "failed":
        return Alert("run failed", f"at step {status.get('step')}, exit code {status.get('exit_code')}: {status.get('reason')}", "ERROR")
    return Alert("run is gone", f"at step {status.get('step')} or after it, without a word: killed, perhaps for lack of memory; the same command goes on from the newest checkpoint", "ERROR")


def has_ended(status_file: Path) -> bool:
    return _read(status_file).get("state") != "running"


def has_failed(status_file: Path) -> bool:
    return _read(status_file).get("state") == "failed"


def _read(path: Path) -> dict:
    """Return the JSON object in a file that may go or change at any time; an empty one where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
