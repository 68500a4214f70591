"""Which mismatched pairs of a step the reference point is estimated from: all of them, or a fixed sample of KL groups.

Legend: K mismatched pairs of the step, D drawn KL groups, M their pairs.
"""

import math
from typing import NamedTuple

import numpy as np


class KLSample(NamedTuple):
    """The sum of `weights` * values estimates the mean log-ratio of all K pairs; a value is a pair's, or the mean of a drawn group's."""

    places: np.ndarray  # [M] int64, ascending, into the K pairs
    averages: np.ndarray | None  # [D, M] float64, takes the log-ratios of the pairs to the means of the D drawn groups; None where pairs are the values
    weights: np.ndarray  # [D] or [K] float64, which add up to 1


def sample_groups(group_of: np.ndarray, *, fraction: float, seed: int, step: int) -> KLSample:
    """Return `fraction` of the KL groups of a step, at least one; `group_of` [K] is the KL group of every pair.

    Systematic sampling with chances in proportion to the groups' sizes: n points at equal distances, from a random start, on a line on which
    each group is as long as it has pairs. The mean over the points of their group's mean is without bias whatever the sizes are (Madow 1949),
    which the mean over the pairs of groups drawn evenly would not be. The same (seed, step) draws the same groups on every rank and after a resume.
    """
    if fraction == 1:
        return KLSample(np.arange(len(group_of)), None, np.full(len(group_of), 1 / len(group_of)))
    _, group_of, sizes = np.unique(group_of, return_inverse=True, return_counts=True)
    num_points = math.ceil(fraction * len(sizes))
    points = (np.random.default_rng([seed, step]).random() + np.arange(num_points)) * (len(group_of) / num_points)
    # A group longer than the distance of two points may be hit by several.
    drawn, hits = np.unique(np.searchsorted(np.cumsum(sizes), points, side="right"), return_counts=True)
    places = np.flatnonzero(np.isin(group_of, drawn))
    averages = (group_of[places] == drawn[:, None]) / sizes[drawn, None]
    return KLSample(places, averages, hits / num_points)
