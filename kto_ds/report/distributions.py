"""What lies behind the means of a log line: where the log-ratios of each label are, and whether rewards follow the length of completions.

Everything counted here adds up over steps and over runs, as the bins are fixed. Legend: E examples, B bins.
"""

from collections.abc import Sequence

import numpy as np

from kto_ds.report.metrics import StepResult, reward_auc

# Inner edges of the bins of a log-ratio, in nats of a whole completion: 0, and two to a doubling from 0.25 to 256 on both sides. The first bin and
# the last one are open; a value on an edge belongs to the bin above it.
_POSITIVE_EDGES = tuple(0.25 * 2 ** (half / 2) for half in range(21))
LOGRATIO_EDGES = (*(-edge for edge in reversed(_POSITIVE_EDGES)), 0.0, *_POSITIVE_EDGES)
# Least completion tokens of each bucket of lengths; the last one is open.
LENGTH_BUCKETS = tuple(2**power for power in range(15))
DIGITS = 5  # of a mean reward: a step has one for every label and bucket
LABELS = ("chosen", "rejected")
LEAST_FOR_CORRELATION = 3  # examples


def distribution_metrics(results: Sequence[StepResult]) -> dict[str, float | list]:
    """Return the reward AUC, and of each label the histogram of log-ratios, the rewards by length, and how far they follow it; what has no value is left out.

    `logratios/<label>`: [B] counts. `rewards_by_length/<label>`: [least tokens, examples, mean reward] of every bucket that has examples.
    `length_correlation/<label>`: Pearson's r of reward and completion tokens.
    """
    logratios, rewards, lengths = (np.concatenate(arrays).astype(float) for arrays in zip(*((result.logratios, result.rewards, result.lengths) for result in results)))
    desirable = np.concatenate([result.desirable for result in results]).astype(bool)
    metrics: dict[str, float | list] = {}
    if desirable.any() and not desirable.all():
        metrics["rewards/auc"] = reward_auc(rewards, desirable)
    for label, chosen in zip(LABELS, (desirable, ~desirable)):
        if chosen.any():
            correlation = length_correlation(rewards[chosen], lengths[chosen])
            metrics |= {} if correlation is None else {f"length_correlation/{label}": correlation}
            metrics[f"logratios/{label}"] = logratio_counts(logratios[chosen])
            metrics[f"rewards_by_length/{label}"] = rewards_by_length(rewards[chosen], lengths[chosen])
    return metrics


def logratio_counts(logratios: np.ndarray) -> list[int]:
    """Count log-ratios [E] by the bins of LOGRATIO_EDGES, [B]."""
    return np.bincount(np.searchsorted(LOGRATIO_EDGES, logratios, side="right"), minlength=len(LOGRATIO_EDGES) + 1).tolist()


def rewards_by_length(rewards: np.ndarray, lengths: np.ndarray) -> list[list[float]]:
    """Return [least tokens, examples, mean reward] of every bucket of completion lengths [E] that has examples."""
    buckets = np.searchsorted(LENGTH_BUCKETS, lengths, side="right") - 1
    return [
        [LENGTH_BUCKETS[bucket], int((buckets == bucket).sum()), float(f"{rewards[buckets == bucket].mean():.{DIGITS}g}")] for bucket in np.unique(buckets).tolist()
    ]


def length_correlation(rewards: np.ndarray, lengths: np.ndarray) -> float | None:
    """Return Pearson's correlation of rewards [E] and lengths [E]; None where there is none: too few examples, or all of one length or reward."""
    if len(rewards) < LEAST_FOR_CORRELATION or np.ptp(rewards) == 0 or np.ptp(lengths) == 0:
        return None
    return float(np.corrcoef(rewards, lengths)[0, 1])
