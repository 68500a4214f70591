"""Which examples each optimizer step takes. No world size in it: a step is the same set on any number of ranks."""

from dataclasses import dataclass

import numpy as np

from kto_ds.artifacts import digest_of
from kto_ds.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """Steps as stretches of one long sequence of examples.

    An epoch permutes whole KL groups; a step takes the next groups while they fit into `global_batch_size` examples.
    The position of a run is one integer, the number of steps taken.
    """

    examples: np.ndarray  # [examples of all epochs] int64
    step_offsets: np.ndarray  # [num_steps + 1] int64, into `examples`
    steps_of_epoch: tuple[int, ...]  # steps in each epoch

    @property
    def num_steps(self) -> int:
        return len(self.step_offsets) - 1

    def examples_of(self, step: int) -> np.ndarray:
        """Examples of step `step`, counted from 1, in ascending order: a step is a set."""
        assert 1 <= step <= self.num_steps, f"step {step} is not in 1..{self.num_steps}"
        return np.sort(self.examples[self.step_offsets[step - 1] : self.step_offsets[step]])

    def digest_until(self, step: int) -> str:
        """Return a digest of the first `step` steps: a run can go on with a plan only if it begins like the one it came from."""
        offsets = self.step_offsets[: step + 1]
        return digest_of(offsets.astype("<i8").tobytes(), self.examples[: offsets[-1]].astype("<i8").tobytes())

    def epoch_after(self, step: int) -> float:
        """Epochs completed when step `step` is done."""
        for epoch, steps in enumerate(self.steps_of_epoch):
            if step <= steps:
                return epoch + step / steps
            step -= steps
        return float(len(self.steps_of_epoch))


def plan_batches(
    kl_group_of: np.ndarray,  # [E]
    *,
    global_batch_size: int,
    num_train_epochs: float,
    max_steps: int | None,
    shuffle: bool,
    seed: int,
) -> BatchPlan:
    """Plan every step of the run: `num_train_epochs` epochs (the last one may be a fraction), or `max_steps` steps, however many epochs that is."""
    by_group = np.argsort(kl_group_of, kind="stable")  # [E] examples, group by group
    group_sizes = np.bincount(kl_group_of)
    largest = int(group_sizes.max())
    if largest > global_batch_size:
        raise UserError(
            f"a KL group of the dataset artefact holds {largest} examples, a step only {global_batch_size}",
            where="batch.global_batch_size",
            remedy=f"raise it to {largest} or more, or run kto-ds prepare again with the smaller batch",
        )

    examples, sizes, steps_of_epoch = [], [], []
    num_epochs = int(np.ceil(num_train_epochs))
    while len(steps_of_epoch) < num_epochs or (max_steps and len(sizes) < max_steps):
        epoch = len(steps_of_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(len(group_sizes)) if shuffle else np.arange(len(group_sizes))
        examples.append(by_group[_places_in_order(group_sizes, order)])
        epoch_sizes = _step_sizes(group_sizes[order], global_batch_size)
        steps_of_epoch.append(len(epoch_sizes))
        sizes.extend(epoch_sizes)

    # 1 - 0.8 is a little less than 0.2, and 0.8 epochs of 5 steps are 4 steps nonetheless.
    unfinished = int(np.floor((num_epochs - num_train_epochs) * steps_of_epoch[num_epochs - 1] + 1e-6))
    num_steps = max_steps or len(sizes) - unfinished
    step_offsets = np.concatenate([[0], np.cumsum(sizes[:num_steps])])
    return BatchPlan(examples=np.concatenate(examples)[: step_offsets[-1]], step_offsets=step_offsets, steps_of_epoch=tuple(steps_of_epoch))


def _places_in_order(group_sizes: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return where each example stands [E] among the examples group by group, when groups are taken in `order`."""
    sizes = group_sizes[order]
    moved_by = (np.cumsum(group_sizes) - group_sizes)[order] - (np.cumsum(sizes) - sizes)  # [groups], from the new place to the old
    return np.arange(sizes.sum()) + np.repeat(moved_by, sizes)


def _step_sizes(group_sizes: np.ndarray, global_batch_size: int) -> list[int]:
    """Examples of each step when groups are taken in order while they fit."""
    steps = [0]
    for size in group_sizes.tolist():
        if steps[-1] + size > global_batch_size:
            steps.append(0)
        steps[-1] += size
    return steps
