"""The KTO mathematics on sequence log-ratios: pure torch, no model, no ranks, no config.

Shapes: E examples, K mismatched pairs. Log-probs are sums over a completion's tokens, never divided by its length.
Source: KTO (arXiv 2402.01306, section 4.1), APO-zero (arXiv 2408.06266); TRL 1.16 computes the same values.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class KTOTerms(NamedTuple):
    losses: Tensor  # [E] weighted, not yet divided by the number of examples of the step
    rewards: Tensor  # [E] beta * logratio, detached


def kto_terms(
    *,
    logratios: Tensor,  # [E] policy minus reference log-prob of each completion
    desirable: Tensor,  # [E] bool
    kl: Tensor,  # [] reference point z >= 0, detached; 0 makes this apo_zero_unpaired
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> KTOTerms:
    """Return w * (1 - sigmoid(s * beta * (logratio - z))) per example, with s = +1 and w = lambda_D for desirable ones, s = -1 and w = lambda_U else.

    A label is a sign and a weight, so a batch of one label is nothing special. Equation 7 of the KTO paper; for z = 0 it is APO-zero,
    since 1 - sigmoid(-x) = sigmoid(x).
    """
    assert logratios.dtype == torch.float32, f"logratios must be float32, found {logratios.dtype}"
    assert logratios.shape == desirable.shape and logratios.dim() == 1, f"expected [E] and [E], found {logratios.shape} and {desirable.shape}"
    assert kl.dim() == 0, f"the reference point is one number, found shape {kl.shape}"
    signs = torch.where(desirable, 1.0, -1.0)  # [E]
    weights = torch.where(desirable, desirable_weight, undesirable_weight)  # [E]
    losses = weights * (1.0 - torch.sigmoid(signs * beta * (logratios - kl)))
    return KTOTerms(losses=losses, rewards=beta * logratios.detach())


def load_balancing_loss(shares: Tensor, probabilities: Tensor) -> Tensor:
    """Return N * sum(shares * probabilities), which is least when all N experts are used alike (Switch Transformer, arXiv 2101.03961, equations 4 to 6).

    `shares` [N]: how often a token goes to each expert; `probabilities` [N]: the router's, mean over tokens. Only the latter carry a gradient,
    and the loss is linear in them: parts of a step add up, once the shares of the whole step are known.
    """
    assert shares.shape == probabilities.shape and shares.dim() == 1, f"expected [N] and [N], found {shares.shape} and {probabilities.shape}"
    return len(shares) * (shares.detach() * probabilities).sum()


class ReferencePoint(NamedTuple):
    kl: Tensor  # [] float32, z = max(0, mean): what the loss uses
    raw: Tensor  # [] the mean before the clamp
    stderr: Tensor  # [] standard error of that mean


def reference_point(values: Tensor, weights: Tensor | None = None) -> ReferencePoint:
    """Return z of a whole step from the log-ratios [K] of its mismatched pairs, on all ranks; clamped after the mean (paper, section 4.1).

    `weights` [K] float64 add up to 1; without them all count alike. Instead of pairs the values may be means of groups that were drawn whole,
    so that the error is that of the draw. Of a single value no error can be told: it is NaN.
    """
    values = values.detach().double()
    if weights is None:
        weights = torch.full_like(values, 1 / len(values))
    mean = (weights * values).sum()
    effective = 1 / weights.square().sum()  # values; len(values) if they count alike
    variance = (weights * (values - mean).square()).sum()
    stderr = torch.where(effective > 1, (variance / (effective - 1)).sqrt(), torch.nan)
    return ReferencePoint(kl=mean.clamp(min=0).float(), raw=mean.float(), stderr=stderr.float())
