"""What the page of a run is made of: its files as they were read, whichever of them there are."""

from collections.abc import Iterable
from typing import NamedTuple

from kto_ds.report.metrics_file import Record


class RunFiles(NamedTuple):
    """One run. Texts have no secrets in them; every part but the name and the records may be empty."""

    name: str
    records: dict[str, list[Record]]  # by split, "train" first, each step once, in order
    updated: str = ""  # when the newest record was written, for a reader
    status: dict = {}
    config: dict[str, object] = {}  # by dotted key
    defaults: dict[str, object] = {}  # of those keys that have one
    data_report: dict[str, dict] = {}  # by split
    samples: tuple[dict, ...] = ()

    @property
    def train(self) -> list[Record]:
        return self.records.get("train", [])


def by_split(records: Iterable[object]) -> dict[str, list[Record]]:
    """Sort records by split and step; of two with the same step the later one counts. What is no record is left out."""
    found: dict[str, dict[int, Record]] = {}
    for record in records:
        if isinstance(record, dict) and isinstance(record.get("split"), str) and type(record.get("step")) is int:
            found.setdefault(record["split"], {})[record["step"]] = record
    order = sorted(found, key=lambda split: split != "train")  # stable: evaluation splits stay as they came
    return {split: [found[split][step] for step in sorted(found[split])] for split in order}


def flat(tree: dict, prefix: str = "") -> dict[str, object]:
    """Return nested dicts as one, by dotted key; a list is one value."""
    found: dict[str, object] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def distinct_names(paths: list[tuple[str, ...]]) -> list[str]:
    """Return a name for each path, given by its parts: the last of them, or as many as tell it from the others; a path that is there twice is numbered."""
    names: list[str] = []
    for parts in paths:
        others = [other for other in paths if other != parts]
        length = next((length for length in range(1, len(parts)) if all(other[-length:] != parts[-length:] for other in others)), len(parts))
        name = "/".join(parts[-length:])
        names.append(name if name not in names else f"{name} ({1 + sum(known.partition(' (')[0] == name for known in names)})")
    return names
