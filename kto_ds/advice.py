"""What the KTO paper and TRL's documentation recommend, as one line for each setting that lies outside of it. Advice only: nothing is refused for it.

Sources, by the names that the lines give:

- paper: arXiv 2402.01306, its settings for learning rate, batch size (8 to 128), risk aversion (beta) and loss aversion (Eq. 8).
- TRL docs: "KTO Trainer" of TRL's documentation: "Batch size recommendations" (16 to 128 there; the paper's wider range is kept), "Learning rate recommendations",
  "Imbalanced data", "Expected dataset type and format", which speaks of undesirable rows alone; "PEFT Integration" for adapters.
- our reading: neither says it.
"""

from typing import NamedTuple

from kto_ds.config import LossConfig, OptimConfig
from kto_ds.data.balance import LARGEST_RATIO, LEAST_RATIO, TOLERANCE, recommended_weights, weight_ratio

LEARNING_RATES = 5e-7, 5e-6
BETAS = 0.01, 1.0
BATCH_SIZES = 8, 128
LEAST_PAIRS = 4  # that z is estimated from
USUAL_BETA, LARGEST_RATE_THERE = 0.1, 1e-6
OF_ADAPTERS = 10  # times the learning rate of full fine-tuning


class LabelCounts(NamedTuple):
    """Examples of the training split by label."""

    desirable: int
    undesirable: int


class Advice(NamedTuple):
    key: str
    what: str  # was found, and is recommended
    source: str

    def __str__(self) -> str:
        return f"advice: {self.key}: {self.what} ({self.source})"


def advice(loss: LossConfig, optim: OptimConfig, *, global_batch_size: int, has_adapters: bool, labels: LabelCounts | None) -> list[Advice]:
    """Return what to think over before the run, at most one piece for each key. Without `labels`, before prepare, nothing is said of them."""
    found = [_learning_rate(loss, optim, has_adapters), _beta(loss), _batch_size(global_batch_size), _pairs(loss, global_batch_size)]
    return [piece for piece in (*found, labels and _labels(loss, optim, labels)) if piece]


def _learning_rate(loss: LossConfig, optim: OptimConfig, has_adapters: bool) -> Advice | None:
    rate, times = optim.learning_rate, OF_ADAPTERS if has_adapters else 1
    least, most = LEARNING_RATES[0], LEARNING_RATES[1] * times
    of_adapters = f"{least:g} to {most:g} for adapters, which take up to {times} times the rate of full fine-tuning" if has_adapters else f"{least:g} to {most:g}"
    if rate < least or rate > most:
        instead = "more steps or epochs serve better than a higher rate" if rate > most else "the run may learn next to nothing"
        return Advice("optim.learning_rate", f"{rate:g} is outside {of_adapters}; {instead}", "paper; TRL docs")
    # "As beta decreases, the learning rate should also be reduced accordingly": read as in proportion.
    tolerated = min(max(LARGEST_RATE_THERE * loss.beta / USUAL_BETA * times, least), most)
    if rate > tolerated * (1 + 1e-9):
        return Advice("optim.learning_rate", f"{rate:g} is high for loss.beta {loss.beta:g}, which tolerates about {tolerated:.2g}: the smaller beta, the smaller the rate", "TRL docs")
    return None


def _beta(loss: LossConfig) -> Advice | None:
    least, most = BETAS
    if least <= loss.beta <= most:
        return None
    meaning = "hardly holds the policy to the reference" if loss.beta < least else "holds the policy so close to the reference that examples stop counting early"
    return Advice("loss.beta", f"{loss.beta:g} is outside {least:g} to {most:g} and {meaning}", "paper")


def _batch_size(global_batch_size: int) -> Advice | None:
    least, most = BATCH_SIZES
    if least <= global_batch_size <= most:
        return None
    meaning = "makes a noisy reference point z" if global_batch_size < least else "makes few steps of an epoch"
    return Advice("batch.global_batch_size", f"{global_batch_size} is outside {least} to {most} and {meaning}; the paper's own runs have 32", "paper")


def _pairs(loss: LossConfig, global_batch_size: int) -> Advice | None:
    """Every step has one z of all ranks, so that what counts is a step's mismatched pairs and not those of a micro-batch."""
    pairs = global_batch_size * loss.kl_fraction
    if loss.loss_type != "kto" or pairs >= LEAST_PAIRS:
        return None
    return Advice("loss.kl_fraction", f"z is estimated from about {pairs:.1f} mismatched pairs a step, and poor with fewer than {LEAST_PAIRS}", "TRL docs")


def _labels(loss: LossConfig, optim: OptimConfig, labels: LabelCounts) -> Advice | None:
    if not all(labels):
        label = "desirable" if labels.desirable else "undesirable"
        is_fast = labels.undesirable and optim.learning_rate > LEARNING_RATES[0]
        caution = f"keep optim.learning_rate low, at {LEARNING_RATES[0]:g} rather than {optim.learning_rate:g}, and watch logps" if is_fast else "watch logps"
        return Advice("data.train", f"all examples are {label}, so that the loss only moves all log-probs one way; {caution}", "TRL docs" if labels.undesirable else "our reading")
    weights = recommended_weights(*labels, loss.desirable_weight, loss.undesirable_weight)
    ratio = weight_ratio(*labels, *weights)
    if LEAST_RATIO / TOLERANCE <= ratio <= LARGEST_RATIO * TOLERANCE:
        return None
    balanced = recommended_weights(*labels, "auto", "auto")
    what = f"desirable examples count {ratio:.3g} times as much as undesirable ones, beyond 1 to 4/3; {balanced[0]:.3g} and {balanced[1]:.3g} would balance them, and so would auto"
    return Advice("loss.desirable_weight, loss.undesirable_weight", what, "paper, Eq. 8; TRL docs")
