"""How much the two labels weigh in the loss: Eq. 8 of the KTO paper (arXiv 2402.01306), as advice and as the meaning of `auto`."""

from typing import Literal

LEAST_RATIO, LARGEST_RATIO = 1.0, 4 / 3
TOLERANCE = 1.1  # nothing is said of labels that are as good as balanced

Weight = float | Literal["auto"]


def weight_ratio(num_desirable: int, num_undesirable: int, desirable_weight: float, undesirable_weight: float) -> float:
    """Return r = lambda_D n_D / (lambda_U n_U), which the paper wants within [1, 4/3]; infinite where the undesirable side weighs nothing."""
    desirable, undesirable = num_desirable * desirable_weight, num_undesirable * undesirable_weight
    return desirable / undesirable if undesirable else float("inf")


def recommended_weights(num_desirable: int, num_undesirable: int, desirable_weight: Weight, undesirable_weight: Weight) -> tuple[float, float]:
    """Return (lambda_D, lambda_U) with `auto` made a number; a number stays what it is.

    An automatic weight is 1, or what brings r to the nearer end of [1, 4/3]. Of two, only the one of the side that lacks weight is raised.
    Without examples or weight on either side there is nothing to balance, and it is 1.
    """
    desirable, undesirable = (1.0 if weight == "auto" else weight for weight in (desirable_weight, undesirable_weight))
    if not (num_desirable * desirable and num_undesirable * undesirable):
        return desirable, undesirable
    ratio = weight_ratio(num_desirable, num_undesirable, desirable, undesirable)
    nearest = min(max(ratio, LEAST_RATIO), LARGEST_RATIO)
    moves_desirable = desirable_weight == "auto" and (ratio < nearest or undesirable_weight != "auto")
    if moves_desirable:
        return desirable * (nearest / ratio), undesirable
    if undesirable_weight == "auto":
        return desirable, undesirable * (ratio / nearest)
    return desirable, undesirable
