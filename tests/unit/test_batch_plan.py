"""Steps: which examples each takes, over epochs, fractions of epochs and max_steps."""

from collections import Counter
from fractions import Fraction
from math import ceil

import numpy as np
import pytest

from kto_ds.data.batch_plan import plan_batches
from kto_ds.errors import UserError


def plan_of(kl_group_of, *, global_batch_size=8, num_train_epochs=1.0, max_steps=None, shuffle=True, seed=0):
    return plan_batches(
        np.asarray(kl_group_of), global_batch_size=global_batch_size, num_train_epochs=num_train_epochs, max_steps=max_steps, shuffle=shuffle, seed=seed
    )  # fmt: skip


def random_groups(rng: np.random.Generator, largest: int) -> np.ndarray:
    """Group of each example, groups of 2 to `largest` examples scattered over the file."""
    sizes = rng.integers(2, largest + 1, int(rng.integers(1, 40)))
    return rng.permutation(np.repeat(np.arange(len(sizes)), sizes))


def steps_of(plan):
    return [plan.examples_of(step).tolist() for step in range(1, plan.num_steps + 1)]


@pytest.mark.parametrize("seed", range(60))
def test_an_epoch_takes_every_example_once_in_whole_groups_within_the_batch(seed):
    rng = np.random.default_rng(seed)
    largest = int(rng.integers(2, 12))
    kl_group_of = random_groups(rng, largest)
    global_batch_size = int(rng.integers(largest, 3 * largest))
    epochs = int(rng.integers(1, 4))
    plan = plan_of(kl_group_of, global_batch_size=global_batch_size, num_train_epochs=epochs, shuffle=bool(seed % 4), seed=seed)
    group_sizes = Counter(kl_group_of.tolist())

    steps = steps_of(plan)
    assert len(plan.steps_of_epoch) == epochs and sum(plan.steps_of_epoch) == plan.num_steps
    for step in steps:
        assert 0 < len(step) <= global_batch_size and step == sorted(set(step))
        assert Counter(kl_group_of[step].tolist()).items() <= group_sizes.items()  # whole groups only
    start = 0
    for count in plan.steps_of_epoch:
        assert sorted(example for step in steps[start : start + count] for example in step) == list(range(len(kl_group_of)))
        start += count


@pytest.mark.parametrize("seed", range(20))
def test_a_step_takes_the_next_group_whenever_it_fits(seed):
    rng = np.random.default_rng(seed)
    kl_group_of = random_groups(rng, 5)
    plan = plan_of(kl_group_of, global_batch_size=9, seed=seed)
    steps = steps_of(plan)
    sizes = Counter(kl_group_of.tolist())
    for step, following in zip(steps, steps[1:]):
        assert any(len(step) + sizes[group] > 9 for group in set(kl_group_of[following].tolist()))


def test_epochs_differ_in_order_and_repeat_with_the_seed():
    kl_group_of = np.repeat(np.arange(20), 4)
    first, again, other = (plan_of(kl_group_of, num_train_epochs=2, seed=seed) for seed in (7, 7, 8))
    assert steps_of(first) == steps_of(again) != steps_of(other)
    assert steps_of(first)[:10] != steps_of(first)[10:]


def test_the_order_of_an_epoch_does_not_depend_on_how_many_follow():
    kl_group_of = np.repeat(np.arange(20), 4)
    assert steps_of(plan_of(kl_group_of, num_train_epochs=1)) == steps_of(plan_of(kl_group_of, num_train_epochs=3))[:10]


def test_without_shuffling_all_epochs_follow_the_file():
    plan = plan_of(np.repeat(np.arange(6), 4), num_train_epochs=2, shuffle=False)
    assert steps_of(plan) == 2 * [list(range(start, start + 8)) for start in (0, 8, 16)]


def test_the_last_step_of_an_epoch_may_be_smaller():
    assert [len(step) for step in steps_of(plan_of(np.repeat(np.arange(5), 4), num_train_epochs=2))] == [8, 8, 4, 8, 8, 4]


# length of a run


@pytest.mark.parametrize("steps_an_epoch", [1, 3, 5, 7, 10])
@pytest.mark.parametrize("epochs", ["0.01", "0.1", "0.3", "0.5", "0.7", "0.8", "0.9", "1", "1.1", "1.5", "1.6", "2", "2.2", "2.3", "2.999", "3.05"])
def test_a_fraction_of_an_epoch_is_that_fraction_of_its_steps_rounded_up(steps_an_epoch, epochs):
    plan = plan_of(np.repeat(np.arange(steps_an_epoch), 8), num_train_epochs=float(epochs))
    assert plan.num_steps == ceil(Fraction(epochs) * steps_an_epoch)
    assert len(plan.examples) == 8 * plan.num_steps


@pytest.mark.parametrize(("max_steps", "expected"), [(None, 6), (1, 1), (4, 4), (6, 6), (7, 7), (20, 20)])
def test_max_steps_overrides_the_epochs(max_steps, expected):
    plan = plan_of(np.repeat(np.arange(6), 4), num_train_epochs=2, max_steps=max_steps)
    assert plan.num_steps == expected and len(plan.examples) == 8 * expected


def test_epochs_are_counted_in_steps_done():
    plan = plan_of(np.repeat(np.arange(6), 4), num_train_epochs=2)
    assert [plan.epoch_after(step) for step in range(7)] == pytest.approx([0, 1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])


@pytest.mark.parametrize("step", [0, -1, 4])
def test_a_step_outside_the_run_is_a_broken_invariant(step):
    with pytest.raises(AssertionError, match=r"is not in 1\.\.3"):
        plan_of(np.repeat(np.arange(6), 4)).examples_of(step)


def test_a_group_larger_than_a_step_is_refused_with_both_numbers():
    with pytest.raises(UserError, match="holds 9 examples, a step only 8") as caught:
        plan_of(np.repeat(np.arange(3), [4, 9, 2]))
    assert caught.value.where == "batch.global_batch_size" and "9 or more" in caught.value.remedy
