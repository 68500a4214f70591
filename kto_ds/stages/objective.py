"""The objective on the ranks: one step of training, and the same without an update for evaluation.

Legend: E examples of the step, over all ranks; pairs 0..E-1 of a step are its matched ones, E..2E-1 its mismatched ones.
A log-prob is computed by one rank and is zero on the others, so that sums over ranks are exact, and every rank ends with the same values.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kto_ds.config import LossConfig
from kto_ds.data.batch import Batch, make_batch
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.packing import Layout, MicroBatch, make_units, share_out
from kto_ds.errors import NumericsError, UserError
from kto_ds.losses import kto_terms, reference_point
from kto_ds.model.scoring import score
from kto_ds.report.metrics import StepResult, kto_metrics, reward_auc
from kto_ds.runtime.collectives import sum_across_ranks
from kto_ds.runtime.engine import Engine


# Largest log-ratio per token between policy and reference that is still rounding, before the first update.
DRIFT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}


class Sharding(NamedTuple):
    """How pairs become this rank's micro-batches."""

    layout: Layout
    max_tokens: int
    rank: int
    num_ranks: int
    device: torch.device

    def share_of(self, pairs: np.ndarray, split: TokenizedSplit) -> list[MicroBatch]:
        """Return this rank's micro-batches of `pairs`; every rank gets the same number, as every forward is a collective."""
        units = make_units(
            pairs, pair_prompts=split.pair_prompts, pair_lengths=split.pair_lengths, prompt_lengths=split.prompt_lengths,
            layout=self.layout, max_tokens=self.max_tokens,
        )  # fmt: skip
        return share_out(units, num_ranks=self.num_ranks, layout=self.layout, max_tokens=self.max_tokens)[self.rank]


def train_step(
    engine: Engine,
    split: TokenizedSplit,
    reference_logps: np.ndarray,  # [2E of the split], by pair id
    examples: np.ndarray,  # [E] example ids of the step
    *,
    when: str,
    loss: LossConfig,
    sharding: Sharding,
) -> tuple[StepResult, float]:
    """Take one optimizer step and return (its result over all ranks, gradient norm before clipping).

    Phase A estimates the reference point from all mismatched pairs of the step, without gradients. Phase B runs the matched pairs; its
    loss is the mean over the step's examples, whatever ranks and micro-batches they lie on.
    """
    num_examples = len(examples)
    pairs = np.concatenate([examples, split.mismatched_pairs(examples)])  # [2E] matched, then mismatched
    place_of = {pair: place for place, pair in enumerate(pairs.tolist())}
    references = torch.from_numpy(reference_logps[pairs]).to(engine.device)  # [2E]
    desirable = torch.from_numpy(split.desirable[examples]).to(engine.device)  # [E]
    policy_logps = torch.zeros_like(references)  # [2E], filled by the ranks that score them

    def places(pair_ids: np.ndarray) -> Tensor:
        return torch.tensor([place_of[pair] for pair in pair_ids.tolist()], dtype=torch.int64, device=engine.device)

    if loss.loss_type == "kto":
        micro_batches = sharding.share_of(pairs[num_examples:], split)
        for scored in score(engine, micro_batches, split, layout=sharding.layout, device=engine.device):
            policy_logps[places(scored.pairs)] = scored.logps
        sum_across_ranks(policy_logps)
        kl = reference_point((policy_logps - references)[num_examples:]).kl
    else:
        kl = torch.zeros((), device=engine.device)

    matched_logps = torch.zeros(num_examples, device=engine.device)  # [E]
    micro_batches = sharding.share_of(pairs[:num_examples], split)
    for number, micro_batch in enumerate(micro_batches, start=1):
        batch = make_batch(micro_batch, split, sharding.layout).to(engine.device)
        where = places(batch.pair_ids)
        logps = engine(batch)  # [S]
        terms = kto_terms(logratios=logps - references[where], desirable=desirable[where], kl=kl, **loss_constants(loss))
        # DeepSpeed averages gradients over the ranks; the loss is a mean over the step's examples.
        engine.backward(terms.losses.sum() * (sharding.num_ranks / num_examples), is_last=number == len(micro_batches))
        matched_logps[where] = logps.detach()
    policy_logps[:num_examples] = sum_across_ranks(matched_logps)

    logps = policy_logps.cpu()
    require_finite(logps.numpy(), split, when, examples)
    result = step_result(logps, references.cpu(), desirable.cpu(), loss)
    try:
        return result, engine.step()
    except NumericsError as error:
        rows = ", ".join(split.row_name(example) for example in examples[:5].tolist())
        raise NumericsError(f"{when}: {error}; rows: {rows} and others of the step") from error


def evaluate_split(
    forward: Callable[[Batch], Tensor],
    split: TokenizedSplit,
    reference_logps: np.ndarray,  # [2E] by pair id
    loss: LossConfig,
    *,
    sharding: Sharding,
) -> dict[str, float]:
    """Return the metrics of the split: z is estimated once from all its mismatched pairs. All ranks call this and get the same result."""
    examples = np.arange(split.num_examples)
    phases = [examples] if loss.loss_type == "apo_zero_unpaired" else [split.mismatched_pairs(examples), examples]
    policy_logps = torch.zeros(2 * split.num_examples, dtype=torch.float32, device=sharding.device)
    for pairs in phases:
        for scored in score(forward, sharding.share_of(pairs, split), split, layout=sharding.layout, device=sharding.device):
            policy_logps[torch.from_numpy(scored.pairs)] = scored.logps
    logps = sum_across_ranks(policy_logps).cpu()
    require_finite(logps.numpy(), split, "evaluation")
    result = step_result(logps, torch.from_numpy(reference_logps), torch.from_numpy(np.array(split.desirable)), loss)
    metrics = kto_metrics([result])
    if split.desirable.any() and not split.desirable.all():
        metrics["rewards/auc"] = reward_auc(result.rewards, np.array(split.desirable))
    return metrics


def check_drift(engine: Engine, split: TokenizedSplit, reference_logps: np.ndarray, examples: np.ndarray, *, dtype: str, sharding: Sharding) -> float:
    """Score the matched pairs of `examples` and return the largest |policy - reference| log-prob per token.

    Before the first update both are the same model, so what is left is rounding, the noise floor of the rewards. UserError beyond that.
    """
    drift = torch.zeros(len(examples), device=sharding.device)
    for scored in score(engine, sharding.share_of(examples, split), split, layout=sharding.layout, device=sharding.device):
        gap = scored.logps.cpu().numpy() - reference_logps[scored.pairs]
        drift[torch.from_numpy(np.searchsorted(examples, scored.pairs))] = torch.from_numpy(np.abs(gap) / split.pair_lengths[scored.pairs]).to(drift)
    drift = sum_across_ranks(drift).cpu().numpy()
    require_finite(np.concatenate([drift, drift]), split, "before the first step", examples)
    worst = int(drift.argmax())
    if drift[worst] > DRIFT_TOLERANCE[dtype]:
        raise UserError(
            f"the policy does not reproduce its own reference log-probs: {drift[worst]:.2g} per token at {split.row_name(examples[worst])}, {DRIFT_TOLERANCE[dtype]} allowed in {dtype}",
            where="reference.artifact",
            remedy="run kto-ds precompute-ref again with this model and these libraries",
        )
    return float(drift[worst])


def loss_constants(loss: LossConfig) -> dict[str, float]:
    return {"beta": loss.beta, "desirable_weight": loss.desirable_weight, "undesirable_weight": loss.undesirable_weight}


def step_result(policy_logps: Tensor, reference_logps: Tensor, desirable: Tensor, loss: LossConfig) -> StepResult:
    """Return losses and rewards of E examples from log-probs [2E] in the order matched pairs, mismatched pairs; all on one device."""
    num_examples = len(desirable)
    logratios = policy_logps - reference_logps
    point = reference_point(torch.zeros(1) if loss.loss_type == "apo_zero_unpaired" else logratios[num_examples:])
    terms = kto_terms(logratios=logratios[:num_examples], desirable=desirable, kl=point.kl, **loss_constants(loss))
    return StepResult(
        losses=terms.losses.numpy(), rewards=terms.rewards.numpy(), logps=policy_logps[:num_examples].numpy(), desirable=desirable.numpy(),
        kl=float(point.kl), kl_raw=float(point.raw), kl_stderr=float(point.stderr),
    )  # fmt: skip


def require_finite(logps: np.ndarray, split: TokenizedSplit, when: str, examples: np.ndarray | None = None) -> None:
    """Raise NumericsError naming the rows of log-probs [2E] that are NaN or Inf; `examples` says which rows they are, all by default."""
    bad = np.flatnonzero(~np.isfinite(logps))
    if len(bad):
        places = bad % (len(logps) // 2)
        rows = [split.row_name(example) for example in (places if examples is None else examples[places]).tolist()]
        raise NumericsError(f"{when}: {len(bad)} log-probs are NaN or Inf; rows: {', '.join(dict.fromkeys(rows[:5]))}")
