"""Metrics of steps as means over examples, under the names TRL logs. Pure arithmetic; no ranks in it.

Legend: E examples of a step, over all ranks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class RouterBalance(NamedTuple):
    """How the experts of a mixture were used in a step."""

    aux_loss: float  # load-balancing loss, before its coefficient; the number of experts of a token when all are used alike
    load_max: float  # of the expert with most tokens, of all layers, over the mean of its layer


class StepResult(NamedTuple):
    """What one step, or one evaluation, found: the same on all ranks and for every split into micro-batches."""

    losses: np.ndarray  # [E] weighted losses
    rewards: np.ndarray  # [E] beta * (policy - reference)
    logps: np.ndarray  # [E] policy log-probs
    desirable: np.ndarray  # [E] bool
    logratios: np.ndarray  # [E] policy - reference
    lengths: np.ndarray  # [E] completion tokens
    kl: float  # z, the reference point the loss used
    kl_raw: float  # before the clamp at 0
    kl_stderr: float  # NaN where it cannot be told
    router: RouterBalance | None = None  # of a mixture of experts, in training


def kto_metrics(results: Sequence[StepResult]) -> dict[str, float]:
    """Return the means over all examples of `results`; a label without examples is left out, never NaN or 0.

    `kl` and what routers did are means over the steps. An error of the reference point that no step could tell is left out too.
    """
    losses, rewards, logps, desirable = (np.concatenate([result[index] for result in results]).astype(column) for index, column in enumerate((float, float, float, bool)))
    metrics = {
        "loss": float(losses.mean()),
        "kl": float(np.mean([result.kl for result in results])),
        "kl_raw": float(np.mean([result.kl_raw for result in results])),
    }
    if errors := [result.kl_stderr for result in results if not np.isnan(result.kl_stderr)]:
        metrics["kl_stderr"] = float(np.mean(errors))
    if balances := [result.router for result in results if result.router]:
        metrics["aux_loss"], metrics["router/load_max"] = np.mean(balances, axis=0).tolist()
    for name, chosen in (("chosen", desirable), ("rejected", ~desirable)):
        metrics[f"count/{name}"] = int(chosen.sum())
        if chosen.any():
            metrics[f"rewards/{name}"] = float(rewards[chosen].mean())
            metrics[f"logps/{name}"] = float(logps[chosen].mean())
    if desirable.any() and not desirable.all():
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics


def reward_auc(rewards: np.ndarray, desirable: np.ndarray) -> float:
    """Return the chance that a desirable example has a higher reward than an undesirable one, ties counting half.

    The one accuracy that unpaired data allows; 0.5 is chance. Both labels must be present.
    """
    values, counts = np.unique(rewards, return_counts=True)
    middle_rank = np.cumsum(counts) - (counts - 1) / 2  # of equal values, 1-based
    ranks = middle_rank[np.searchsorted(values, rewards)]
    num_desirable, num_undesirable = int(desirable.sum()), int((~desirable).sum())
    assert num_desirable and num_undesirable, "an AUC needs both labels"
    return float((ranks[desirable].sum() - num_desirable * (num_desirable + 1) / 2) / (num_desirable * num_undesirable))
