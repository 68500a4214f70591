"""Charts of what distributions.py counts: where the log-ratios of a label lie as training goes on, and rewards by length of completion.

Legend: B bins of a log-ratio, C columns of a heat map, L buckets of lengths.
"""

from typing import NamedTuple

import numpy as np

from kto_ds.report.charts import DASHES, LABELS, NUM_COLORS, curve
from kto_ds.report.distributions import LENGTH_BUCKETS, LOGRATIO_EDGES
from kto_ds.report.metrics_file import Record
from kto_ds.report.run_files import RunFiles
from kto_ds.report.series import is_number, series

MOST_COLUMNS = 40  # of a heat map
LAST_SHARE = 4  # rewards by length are those of the last quarter of the log lines
LEAST_LINES = 8  # of the record in that quarter, where there are so many


def heat_maps(runs: list[RunFiles]) -> list[dict]:
    """Return a heat map for every run and label that has histograms: counts [C, B'], of the bins that are in use."""
    maps = []
    for number, run in enumerate(runs):
        found = {label: _histograms(run.train, f"logratios/{label}") for label, _ in LABELS}
        used = np.flatnonzero(sum(counts.sum(axis=0) for _, counts in found.values()))
        if not len(used):
            continue
        low, high = used[0], used[-1] + 1  # one range for both labels
        for place, (label, words) in enumerate(LABELS):
            steps, counts = found[label]
            if len(counts):
                parts = np.array_split(np.arange(len(counts)), min(MOST_COLUMNS, len(counts)))
                maps.append({
                    "kind": "heat", "name": f"logratios-{number}-{label}", "run": number, "title": f"Log-ratios, {f'{run.name}, ' if len(runs) > 1 else ''}{words}", "unit": "nats of an answer",
                    "color": place, "edges": [None if edge is None else float(f"{edge:.4g}") for edge in (None, *LOGRATIO_EDGES, None)[low : high + 1]],
                    "columns": [[int(steps[part[0]]), int(steps[part[-1]])] for part in parts],
                    "counts": [counts[part, low:high].sum(axis=0).tolist() for part in parts],
                })  # fmt: skip
    return maps


def _histograms(records: list[Record], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps [N] and counts [N, B] of the records that have this histogram; one with other bins is none, nor is one that counts nothing."""
    size = len(LOGRATIO_EDGES) + 1
    rows = [(record["step"], record[metric]) for record in records if _is_histogram(record.get(metric), size)]
    return np.array([step for step, _ in rows]), np.array([counts for _, counts in rows], dtype=np.int64).reshape(-1, size)


def _is_histogram(value: object, size: int) -> bool:
    return isinstance(value, list) and len(value) == size and all(map(is_number, value)) and sum(map(int, value)) > 0


def heat_alt_text(chart: dict) -> str:
    """Return a heat map in words: where the middle of the log-ratios was at first and at last."""
    ends = [_median_bin(counts, chart["edges"]) for counts in (chart["counts"][0], chart["counts"][-1])]
    return f"{chart['title']}. Half of them are above {ends[0]} at step {chart['columns'][0][0]}, above {ends[1]} at step {chart['columns'][-1][1]}."


def _median_bin(counts: list[int], edges: list[float | None]) -> str:
    place = int(np.searchsorted(np.cumsum(counts), sum(counts) / 2))
    return "the lowest bin" if edges[place] is None else f"{edges[place]:g} nats"


class ByLength(NamedTuple):
    """Examples and sums of rewards of both labels, by bucket of lengths."""

    counts: np.ndarray  # [2, L], desirable first
    sums: np.ndarray  # [2, L]

    @property
    def means(self) -> np.ndarray:
        """Mean rewards [2, L], NaN where a bucket is empty."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.sums / self.counts


def by_length(records: list[Record]) -> ByLength:
    """Add up the rewards by length of the last quarter of `records`, or of a few more where these are few."""
    last = records[-max(LEAST_LINES, len(records) // LAST_SHARE) :]
    counts, sums = np.zeros((2, len(LENGTH_BUCKETS))), np.zeros((2, len(LENGTH_BUCKETS)))
    for place, (label, _) in enumerate(LABELS):
        for record in last:
            for least, count, mean in _entries(record.get(f"rewards_by_length/{label}")):
                bucket = LENGTH_BUCKETS.index(least)
                counts[place, bucket] += count
                sums[place, bucket] += count * mean
    return ByLength(counts, sums)


def _entries(value: object) -> list[list[float]]:
    """Return the [least tokens, examples, mean reward] in a list that may be of another program."""
    entries = value if isinstance(value, list) else []
    return [entry for entry in entries if isinstance(entry, list) and len(entry) == 3 and all(map(is_number, entry)) and entry[0] in LENGTH_BUCKETS and entry[1] > 0]


def margins(lengths: ByLength) -> tuple[float, float] | None:
    """Return (reward margin, the same among completions of similar length); None where no bucket has both labels.

    The second is the mean of the margins of the buckets, each weighted by the inverse variance of a difference of means, n m / (n + m): what is left of
    the first when length is no longer a way to tell the labels apart.
    """
    shared = (lengths.counts > 0).all(axis=0)
    if not shared.any():
        return None
    desirable, undesirable = lengths.sums.sum(axis=1) / lengths.counts.sum(axis=1)
    counts, means = lengths.counts[:, shared], lengths.means[:, shared]
    weights = counts[0] * counts[1] / counts.sum(axis=0)
    return float(desirable - undesirable), float((weights * (means[0] - means[1])).sum() / weights.sum())


def length_chart(runs: list[RunFiles]) -> dict | None:
    """Return mean rewards by length of completion, a curve for each label and run; None where no run has them."""
    found = [by_length(run.train) for run in runs]
    used = np.flatnonzero(sum(lengths.counts.sum(axis=0) for lengths in found))
    if not len(used):
        return None
    first, last = int(used[0]), int(used[-1])
    curves = []
    for number, (run, lengths) in enumerate(zip(runs, found)):
        for place, (label, words) in enumerate(LABELS):
            buckets = np.flatnonzero(lengths.counts[place])
            if len(buckets):
                about = {"color": (number if len(runs) > 1 else place) % NUM_COLORS, "dash": DASHES[place], "marker": "circle", "counts": lengths.counts[place, buckets].astype(int).tolist()}
                curves.append(curve(words, series(buckets - first, lengths.means[place, buckets]), run=number, split="train", metric=f"rewards_by_length/{label}", **about))
    ticks = [_bucket_name(bucket) for bucket in range(first, last + 1)]
    return {"kind": "lines", "name": "by_length", "title": "Reward by length", "unit": "", "from_zero": False, "is_noisy": False, "curves": curves, "guide": {"value": 0, "words": "as the reference"}, "ticks": ticks}


def _bucket_name(bucket: int) -> str:
    low = LENGTH_BUCKETS[bucket]
    high = LENGTH_BUCKETS[bucket + 1] - 1 if bucket + 1 < len(LENGTH_BUCKETS) else None
    return f"{low}+" if high is None else f"{low}–{high}" if high > low else str(low)
