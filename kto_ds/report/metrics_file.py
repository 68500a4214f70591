"""metrics.jsonl, the record of a run: one JSON object a line, with "split" ("train", or the name of an evaluation split), "step" and metrics.

A metric is a number, or a list of numbers: see distributions.py.
"""

import json
import math
from pathlib import Path

from kto_ds.artifacts import write_atomically

METRICS_FILE = "metrics.jsonl"

Record = dict[str, float | int | str | list]


class MetricsFile:
    """One JSON object a line, on disk as soon as it is logged. What is not finite does not get in."""

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def log(self, record: Record) -> None:
        for name, value in record.items():
            assert isinstance(value, (str, list)) or math.isfinite(value), f"{name} is {value} at step {record['step']}"
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def drop_after(self, step: int) -> int:
        """Keep the whole records up to `step`, for a run that resumes from there; return how many are dropped."""
        self._file.close()
        records = read_records(self._path)
        kept = [record for record in records if record["step"] <= step]
        write_atomically(self._path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = self._path.open("a", encoding="utf-8")
        return len(records) - len(kept)

    def close(self) -> None:
        self._file.close()


def read_records(metrics_file: Path) -> list[Record]:
    """Return the whole records of a metrics file, which may be of a run that goes on, or that was killed within a line."""
    return whole_records(metrics_file.read_bytes())[0]


def whole_records(content: bytes) -> tuple[list[Record], bytes]:
    """Return the records of the whole lines, and what follows the last of them."""
    *lines, rest = content.split(b"\n")
    return [record for line in lines if (record := _parse(line)) is not None], rest


def _parse(line: bytes) -> Record | None:
    try:
        return json.loads(line)
    except ValueError:  # no JSON, or no UTF-8
        return None
