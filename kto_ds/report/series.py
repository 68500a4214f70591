"""Curves short enough to be drawn: a long one becomes means of neighbouring points, with their extremes, so that no peak is lost."""

import math
from typing import NamedTuple

import numpy as np

from kto_ds.report.metrics_file import Record

MOST_POINTS = 600  # of a curve that is drawn point by point
SHORT_POINTS = 300  # that a longer one becomes
DIGITS = 7  # of a number in the page; a float of 32 bits has no more


class Series(NamedTuple):
    """[N] each; `low` and `high` are None where a point is one value without an error."""

    steps: list[float]
    values: list[float]
    low: list[float] | None
    high: list[float] | None


def column(records: list[Record], *names: str) -> list[np.ndarray]:
    """Return the steps and the values of some metrics, [N] each, over the records that have them all as finite numbers."""
    rows = [[record["step"], *(record[name] for name in names)] for record in records if all(is_number(record.get(name)) for name in names)]
    return list(np.array(rows, dtype=float).T) if rows else [np.empty(0)] * (1 + len(names))


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def series(steps: np.ndarray, values: np.ndarray, errors: np.ndarray | None = None) -> Series:
    """Return a curve as it is, or shortened to the mean, the least and the largest of every stretch; `errors` are half-widths around the values."""
    low, high = (values, values) if errors is None else (values - errors, values + errors)
    if len(steps) <= MOST_POINTS:
        return Series(rounded(steps), rounded(values), *((None, None) if errors is None else (rounded(low), rounded(high))))
    parts = np.array_split(np.arange(len(steps)), SHORT_POINTS)
    means, least, largest = ([function(array[part]) for part in parts] for function, array in ((np.mean, values), (np.min, low), (np.max, high)))
    return Series(rounded([steps[part].mean() for part in parts]), rounded(means), rounded(least), rounded(largest))


def rounded(values: np.ndarray | list[float]) -> list[float]:
    """Return values with DIGITS significant digits, whole ones as integers."""
    return [int(value) if float(value).is_integer() and abs(value) < 1e15 else float(f"{value:.{DIGITS}g}") for value in values]
