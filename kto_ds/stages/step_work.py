"""What one rank does in one step, laid out on the host. It hangs on lengths and seeds alone, so it is made while the step before runs.

Legend: E examples of the step over all ranks, M mismatched pairs that are scored.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from kto_ds.data.ahead import ahead
from kto_ds.data.batch import Batch
from kto_ds.data.batch_plan import BatchPlan
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.kl_sample import KLSample, sample_groups
from kto_ds.data.packing import MicroBatch, Unit
from kto_ds.data.sharding import Sharding
from kto_ds.model.flops import ModelShape, backward_flops, forward_flops
from kto_ds.report.throughput import Work


class StepWork(NamedTuple):
    step: int
    examples: np.ndarray  # [E] example ids, ascending
    kl: KLSample | None  # of the step's mismatched pairs, which stand in the order of `examples`; None without phase A
    kl_batches: list[Batch]  # phase A, this rank's; of matched pairs where it is there for their routing alone
    policy_batches: list[Batch]  # phase B, this rank's
    cost: Work

    @property
    def kl_examples(self) -> np.ndarray:
        """The examples whose mismatched pairs are scored, [M]."""
        return self.examples[self.kl.places]


class StepPlanner(NamedTuple):
    """All that decides the work of a step."""

    split: TokenizedSplit
    plan: BatchPlan
    seed: int
    kl_fraction: float  # of a step's KL groups that phase A scores; 0 without phase A
    training: Sharding
    scoring: Sharding  # without gradients, hence with more room
    shape: ModelShape | None  # None where operations cannot be counted
    recomputed_layers: float  # share of the decoder layers that run forward again in backward
    balances_experts: bool = False  # phase A tells where tokens go, too; without a reference point it is there for that alone

    def ahead(self, done: int) -> Iterator[StepWork]:
        """Yield the work of every step after the first `done`, each made while the one before is in use."""
        return ahead(self.work_of, range(done + 1, self.plan.num_steps + 1))

    def work_of(self, step: int) -> StepWork:
        split, examples = self.split, self.plan.examples_of(step)
        kl, kl_shares = None, [[]] * self.scoring.num_groups
        if self.kl_fraction:
            kl = sample_groups(split.kl_group_of[examples], fraction=self.kl_fraction, seed=self.seed, step=step)
            kl_shares = self.scoring.shares(split.mismatched_pairs(examples[kl.places]), split)
        elif self.balances_experts:
            kl_shares = self.scoring.shares(examples, split)
        policy_shares = self.training.shares(examples, split)
        return StepWork(
            step=step,
            examples=examples,
            kl=kl,
            kl_batches=[self.scoring.batch(micro_batch, split) for micro_batch in kl_shares[self.scoring.group]],
            policy_batches=[self.training.batch(micro_batch, split) for micro_batch in policy_shares[self.training.group]],
            cost=self._cost(examples, _units(kl_shares), _units(policy_shares)),
        )

    def _cost(self, examples: np.ndarray, kl_units: list[Unit], policy_units: list[Unit]) -> Work:
        """Return what the step takes on all ranks: a forward of the mismatched pairs, and of the matched ones a forward and a backward."""
        tokens = int((self.split.prompt_lengths[self.split.prompt_of[examples]] + self.split.matched_lengths[examples]).sum())
        if self.shape is None:
            return Work(tokens, 0.0, 0.0)
        policy, kl = (forward_flops(self.shape, units, self.split) for units in (policy_units, kl_units))
        model_flops = policy.total + backward_flops(self.shape, policy_units, self.split) + kl.total
        # The head computes its logits again in backward, the layers their activations where these were not kept.
        recomputed = policy.head + self.recomputed_layers * policy.layers
        return Work(tokens, model_flops, model_flops + recomputed)


def _units(shares: list[list[MicroBatch]]) -> list[Unit]:
    return [unit for micro_batches in shares for micro_batch in micro_batches for unit in micro_batch]
