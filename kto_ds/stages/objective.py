"""The objective on the ranks: one step of training, and the same without an update for evaluation.

Legend: E examples of the step, over all ranks; M mismatched pairs that it scores; S sequences of a micro-batch; N pairs. Example ids and pair ids
come in ascending order.
A log-prob is computed by one rank and is zero on the others, so that sums over ranks are exact, and every rank ends with the same values.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kto_ds.config import LossConfig
from kto_ds.data.batch import Batch, to_device
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.sharding import Sharding
from kto_ds.errors import NumericsError, UserError
from kto_ds.losses import ReferencePoint, kto_terms, reference_point
from kto_ds.model.scoring import score_batch
from kto_ds.report.metrics import StepResult, kto_metrics, reward_auc
from kto_ds.report.throughput import StepTimer
from kto_ds.runtime.collectives import any_across_ranks, sum_across_ranks
from kto_ds.runtime.engine import Engine
from kto_ds.runtime.watch import beat
from kto_ds.stages.balance import MeasuredForward, balance_of, expert_shares, part_of_loss
from kto_ds.stages.numerics import Problem, StepOutcome, loss_problem
from kto_ds.stages.step_work import StepWork

# apo_zero_unpaired compares with the reference itself.
NO_REFERENCE_POINT = ReferencePoint(kl=torch.zeros(()), raw=torch.zeros(()), stderr=torch.zeros(()))
# Largest log-ratio that is still rounding, before the first update, in nats for a completion of one token.
DRIFT_TOLERANCE = {"float32": 2e-3, "bfloat16": 0.3}


def train_step(
    engine: Engine,
    work: StepWork,
    split: TokenizedSplit,
    reference_logps: np.ndarray,  # [2E of the split], by pair id
    *,
    loss: LossConfig,
    num_ranks: int,
    timer: StepTimer,
    limit: float,
    wants_to_stop: Callable[[], bool],  # of this rank
    aux_coef: float | None = None,  # of a mixture of experts: weight of its load-balancing loss
) -> StepOutcome:
    """Take one optimizer step. Where a value is not finite, or the loss above `limit`, the step's gradient is dropped: no weight or moment changes.

    Phase A estimates the reference point from mismatched pairs of the step, without gradients, and the shares of experts where these are to be
    balanced. Phase B runs the matched pairs; its loss is the mean over the step's examples, whatever ranks and micro-batches they lie on.
    """
    examples, device = work.examples, engine.device
    desirable = to_device(torch.from_numpy(split.desirable[examples]), device)  # [E]
    references = to_device(torch.from_numpy(reference_logps[examples]), device)  # [E]

    timer.begin("kl")
    forward = MeasuredForward(engine) if aux_coef else engine
    point, mismatched_logps = _estimate_point(forward, work, split, reference_logps, device)
    kl = point.kl.to(device)
    shares = expert_shares(forward.of_all_ranks()) if aux_coef else None  # [experts]

    timer.begin("policy")
    forward = engine if aux_coef is None else MeasuredForward(engine)
    logps, own_loss = torch.zeros_like(references), torch.zeros_like(references[:1])  # [E], [1]
    for number, batch in enumerate(work.policy_batches, start=1):
        batch = batch.to(device)
        places = _places(batch.pair_ids, examples, device)
        sequence_logps = forward(batch)  # [S]
        terms = kto_terms(logratios=sequence_logps - references[places], desirable=desirable[places], kl=kl, **_constants(loss))
        # DeepSpeed averages gradients over the ranks; the loss is a mean over the step's examples.
        objective = terms.losses.sum() * (num_ranks / len(examples))
        if aux_coef:
            objective = objective + aux_coef * num_ranks * part_of_loss(shares, forward.latest, work.cost.tokens)
        engine.backward(objective, is_last=number == len(work.policy_batches))
        if batch.is_counted:
            logps[places] = sequence_logps.detach()
            own_loss += terms.losses.detach().sum()
    summed = sum_across_ranks(torch.cat([logps, own_loss, torch.full_like(own_loss, wants_to_stop())]))  # [E + 2]: one collective for all
    logps = summed[:-2]
    load = None if aux_coef is None else forward.of_all_ranks()

    # The first time that the host waits for the device in this step.
    loss_sum, num_stopping = summed[-2:].tolist()
    step_loss = loss_sum / len(examples)
    problem = None if mismatched_logps is None else nonfinite(mismatched_logps, work.kl_examples, split, "mismatched pairs: ")
    problem = problem or nonfinite(logps, examples, split) or loss_problem(step_loss, limit)
    timer.begin("update")
    grad_norm = engine.step() if problem is None else engine.discard_gradients()
    timer.begin("host")
    if problem is None and not math.isfinite(grad_norm):
        problem = Problem("gradient", f"the gradient is not finite, though every log-prob is; rows: {_first_rows(examples, split)} and others of the step")
    result = None if problem else _result(logps, references, desirable, split.matched_lengths[examples], point, loss)._replace(router=load and balance_of(load))
    return StepOutcome(step_loss, grad_norm, result, problem, is_stopping=bool(num_stopping))


def _estimate_point(
    forward: Callable[[Batch], Tensor], work: StepWork, split: TokenizedSplit, reference_logps: np.ndarray, device: torch.device
) -> tuple[ReferencePoint, Tensor | None]:
    """Run phase A and return the reference point, and the log-probs [M] that it comes from, None where the loss has no such point."""
    if work.kl is None:
        for batch in work.kl_batches:
            score_batch(forward, batch.to(device))
        return NO_REFERENCE_POINT, None
    mismatched = split.mismatched_pairs(work.kl_examples)  # [M]
    mismatched_logps = logps_of(forward, work.kl_batches, mismatched, device)
    mismatched_references = to_device(torch.from_numpy(reference_logps[mismatched]), device)
    logratios = (mismatched_logps - mismatched_references).double()
    values = logratios if work.kl.averages is None else to_device(torch.from_numpy(work.kl.averages), device) @ logratios
    return reference_point(values, to_device(torch.from_numpy(work.kl.weights), device)), mismatched_logps


class Cut(Exception):
    """An evaluation is not brought to its end, because the run is to stop. Raised on all ranks."""


def evaluate_split(
    forward: Callable[[Batch], Tensor],
    split: TokenizedSplit,
    reference_logps: np.ndarray,  # [2E] by pair id
    loss: LossConfig,
    *,
    sharding: Sharding,
    wants_to_stop: Callable[[], bool] | None = None,
) -> dict[str, float]:
    """Return the metrics of the split: z is estimated once from all its mismatched pairs. All ranks call this and get the same result.

    Where `wants_to_stop` is given it is asked before every micro-batch; once any rank's says yes, Cut is raised on all of them.
    """
    examples = np.arange(split.num_examples)
    matched_references, mismatched_references = (torch.from_numpy(half).to(sharding.device) for half in np.split(np.array(reference_logps), 2))  # [E]
    point = NO_REFERENCE_POINT
    batches_of = partial(_until_cut, split=split, sharding=sharding, wants_to_stop=wants_to_stop)
    if loss.loss_type == "kto":
        mismatched = split.mismatched_pairs(examples)
        mismatched_logps = logps_of(forward, batches_of(mismatched), mismatched, sharding.device)
        require_finite(mismatched_logps, examples, split, "evaluation, mismatched pairs")
        point = reference_point(mismatched_logps - mismatched_references)
    logps = logps_of(forward, batches_of(examples), examples, sharding.device)
    require_finite(logps, examples, split, "evaluation")
    desirable = np.array(split.desirable)
    result = _result(logps, matched_references, torch.from_numpy(desirable).to(sharding.device), split.matched_lengths, point, loss)
    metrics = kto_metrics([result])
    if desirable.any() and not desirable.all():
        metrics["rewards/auc"] = reward_auc(result.rewards, desirable)
    return metrics


def _until_cut(pairs: np.ndarray, *, split: TokenizedSplit, sharding: Sharding, wants_to_stop: Callable[[], bool] | None) -> Iterator[Batch]:
    for batch in sharding.batches(pairs, split):
        if wants_to_stop and any_across_ranks(wants_to_stop(), sharding.device):
            raise Cut
        yield batch


def evaluation_metrics(split: TokenizedSplit, loss: LossConfig) -> list[str]:
    """Return the names of the metrics that evaluate_split gives for a split: they hang on its labels and on the loss."""
    desirable = np.array(split.desirable)
    nothing = np.zeros(len(desirable))
    kl_stderr = float("nan") if loss.loss_type == "kto" and len(desirable) == 1 else 0.0  # as reference_point says it
    names = list(kto_metrics([StepResult(nothing, nothing, nothing, desirable, nothing, nothing, kl=0.0, kl_raw=0.0, kl_stderr=kl_stderr)]))
    return [*names, "rewards/auc"] if desirable.any() and not desirable.all() else names


class Drift(NamedTuple):
    """How far the policy's own log-probs lie from the reference's before the first update, in nats."""

    mean_per_token: float  # the noise floor, where both are the same model
    largest: float  # of a sequence, at the worst row
    allowed: float  # there
    worst_row: str

    def __str__(self) -> str:
        return f"{self.mean_per_token:.1e} nats a token on average, {self.largest:.1e} nats at the worst sequence, {self.worst_row}"


def measure_drift(engine: Engine, split: TokenizedSplit, reference_logps: np.ndarray, pairs: np.ndarray, *, dtypes: set[str], sharding: Sharding) -> Drift:
    """Score `pairs`, ascending pair ids, and compare with the reference. All ranks call this and get the same answer.

    Before the first update policy and reference are the same model, so what is left is rounding, the noise floor of the rewards. It grows
    with the square root of a completion's length, while another model or template differs by as much in every token. `dtypes` are those of
    the two: the coarser one rounds.
    """
    logps = logps_of(engine, sharding.batches(pairs, split), pairs, sharding.device)
    drift = np.abs(logps.cpu().numpy() - reference_logps[pairs])
    lengths = split.pair_lengths[pairs]
    allowed = max(DRIFT_TOLERANCE[dtype] for dtype in dtypes) * np.sqrt(lengths)
    worst = int((drift / allowed).argmax())
    return Drift(float(drift.sum() / lengths.sum()), float(drift[worst]), float(allowed[worst]), split.row_name(pairs[worst] % split.num_examples))


def require_no_drift(drift: Drift, reference_dir: Path) -> None:
    """Raise UserError where the drift is beyond rounding, NumericsError where it is no number."""
    if not np.isfinite(drift.largest):
        raise NumericsError(f"before the first step: the log-prob of {drift.worst_row} is NaN or Inf")
    if drift.largest > drift.allowed:
        what = f"the policy does not reproduce its own reference log-probs: {drift.largest:.2g} nats at {drift.worst_row}, {drift.allowed:.2g} allowed"
        remedy = f"if libraries or kernels have changed since, delete {reference_dir} and run kto-ds precompute-ref again; if nothing has, doubt this machine"
        raise UserError(what, where="reference.artifact", remedy=remedy)


def logps_of(forward: Callable[[Batch], Tensor], batches: Iterable[Batch], pairs: np.ndarray, device: torch.device) -> Tensor:
    """Return the log-probs [N] of `pairs` [N], ascending pair ids, without gradients, where `batches` are this rank's share of them.

    All ranks call this with equally many batches and get all log-probs.
    """
    logps = torch.zeros(len(pairs), dtype=torch.float32, device=device)
    for batch in batches:
        scored = score_batch(forward, batch.to(device))
        beat()  # the ranks may not meet before the last micro-batch
        if batch.is_counted:
            logps[_places(scored.pairs, pairs, device)] = scored.logps
    return sum_across_ranks(logps)


def require_finite(logps: Tensor, examples: np.ndarray, split: TokenizedSplit, when: str) -> None:
    """Raise NumericsError naming the rows of `examples` [N] whose log-probs [N] are NaN or Inf."""
    if problem := nonfinite(logps, examples, split):
        raise NumericsError(f"{when}: {problem.message}")


def nonfinite(logps: Tensor, examples: np.ndarray, split: TokenizedSplit, of: str = "") -> Problem | None:
    """Return the problem of log-probs [N] of `examples` [N] that are NaN or Inf, if any are."""
    bad = (~torch.isfinite(logps)).cpu().numpy()
    if not bad.any():
        return None
    rows = _first_rows(examples[bad], split)
    blame = f"all of them, so the weights are broken rather than a row: lower optim.learning_rate; rows: {rows}" if bad.all() else f"rows: {rows}"
    return Problem("log-prob", f"{of}{bad.sum()} of {len(bad)} log-probs are NaN or Inf; {blame}", tuple(examples[bad].tolist()))


def _first_rows(examples: np.ndarray, split: TokenizedSplit) -> str:
    return ", ".join(split.row_name(example) for example in examples[:5].tolist())


def _places(pair_ids: np.ndarray, pairs: np.ndarray, device: torch.device) -> Tensor:
    return to_device(torch.from_numpy(np.searchsorted(pairs, pair_ids)), device)


def _constants(loss: LossConfig) -> dict[str, float]:
    return {"beta": loss.beta, "desirable_weight": loss.desirable_weight, "undesirable_weight": loss.undesirable_weight}


def _result(logps: Tensor, references: Tensor, desirable: Tensor, lengths: np.ndarray, point: ReferencePoint, loss: LossConfig) -> StepResult:
    """Return losses and rewards of E examples from their log-probs [E], on the host."""
    logratios = logps - references
    terms = kto_terms(logratios=logratios, desirable=desirable, kl=point.kl.to(logps.device), **_constants(loss))
    losses, rewards, values, ratios = torch.stack([terms.losses, terms.rewards, logps, logratios]).cpu().numpy()
    kl, kl_raw, kl_stderr = torch.stack(point).tolist()
    return StepResult(losses, rewards, values, desirable.cpu().numpy(), ratios, np.asarray(lengths), kl=kl, kl_raw=kl_raw, kl_stderr=kl_stderr)
