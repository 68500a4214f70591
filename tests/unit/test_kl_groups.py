"""Properties that KL groups have for every structure of prompts and labels."""

import time
from collections import Counter, defaultdict

import numpy as np
import pytest

from kto_ds.data.batch_plan import plan_batches
from kto_ds.data.kl_groups import assign_kl_groups
from kto_ds.errors import UserError


def assign(prompt_of, desirable=None, *, kl_group_size=4, max_examples=32, shuffle=True, seed=0):
    prompt_of = np.asarray(prompt_of)
    desirable = np.arange(len(prompt_of)) % 2 == 0 if desirable is None else np.asarray(desirable)
    return assign_kl_groups(prompt_of, desirable, kl_group_size=kl_group_size, max_examples=max_examples, shuffle=shuffle, seed=seed)


def random_prompts(rng: np.random.Generator) -> np.ndarray:
    """Prompts of a data set: mostly single, in pairs, all in many copies, or with a heavy tail; scattered or in runs."""
    num_prompts = int(rng.integers(2, 60))
    copies = [np.ones(num_prompts, int), np.full(num_prompts, 2), rng.integers(1, 9, num_prompts), 1 + rng.geometric(0.3, num_prompts)][rng.integers(4)]
    prompt_of = np.repeat(np.arange(num_prompts), copies)
    return rng.permutation(prompt_of) if rng.random() < 0.6 else prompt_of


def check_donation(prompt_of, kl_group_of, mismatched_prompt_of):
    """Inside every group the prompts form one ring, and all completions of a prompt go to the next prompt of the ring."""
    assert set(kl_group_of) == set(range(kl_group_of.max() + 1))
    members = defaultdict(list)
    for example, group in enumerate(kl_group_of.tolist()):
        members[group].append(example)
    for examples in members.values():
        receivers = defaultdict(set)
        for example in examples:
            receivers[int(prompt_of[example])].add(int(mismatched_prompt_of[example]))
        assert len(receivers) >= 2
        assert all(len(found) == 1 for found in receivers.values())
        # One ring through all prompts: so no prompt receives its own, each receives from one, and what is donated is what is there.
        first = at = min(receivers)
        walked = []
        while not walked or at != first:
            walked.append(at)
            assert len(walked) <= len(receivers)
            [at] = receivers[at]
        assert sorted(walked) == sorted(receivers)
    return members


@pytest.mark.parametrize("seed", range(150))
def test_groups_of_random_structures(seed):
    rng = np.random.default_rng(seed)
    prompt_of = random_prompts(rng)
    kl_group_size = int(rng.choice([2, 3, 4, 8]))
    max_examples = kl_group_size * int(rng.choice([4, 8] if kl_group_size > 3 else [16, 32]))
    options = {"kl_group_size": kl_group_size, "max_examples": max_examples, "shuffle": bool(seed % 3), "seed": seed}
    kl_group_of, mismatched = assign(prompt_of, rng.random(len(prompt_of)) < 0.5, **options)

    assert (mismatched != prompt_of).all()
    members = check_donation(prompt_of, kl_group_of, mismatched)
    assert all(len(examples) <= max_examples for examples in members.values())
    assert Counter(example for examples in members.values() for example in examples) == Counter(range(len(prompt_of)))


@pytest.mark.parametrize("seed", range(20))
def test_whole_groups_hold_kl_group_size_prompts(seed):
    rng = np.random.default_rng(seed)
    prompt_of = rng.permutation(np.repeat(np.arange(int(rng.integers(8, 50))), 3))
    kl_group_of, _ = assign(prompt_of, kl_group_size=4, max_examples=32, seed=seed)
    prompts = [len(set(prompt_of[kl_group_of == group])) for group in range(kl_group_of.max() + 1)]
    # 24 examples and 12 prompts at most: what is left over fits into the last whole group, which takes 1 to 3 more prompts.
    assert all(count == 4 for count in prompts[:-1]) and 4 <= prompts[-1] <= 7


@pytest.mark.parametrize("shuffle", [True, False])
def test_completions_of_one_prompt_stay_in_one_group_when_they_fit(shuffle):
    prompt_of = np.random.default_rng(0).permutation(np.repeat(np.arange(23), 8))
    kl_group_of, _ = assign(prompt_of, kl_group_size=4, max_examples=64, shuffle=shuffle)
    assert all(len(set(kl_group_of[prompt_of == prompt])) == 1 for prompt in range(23))


def test_a_prompt_with_many_completions_is_cut_into_slices_of_different_groups():
    prompt_of = np.array([0] * 40 + list(range(1, 31)))
    kl_group_of, mismatched = assign(prompt_of, kl_group_size=4, max_examples=32)
    sizes = Counter(kl_group_of[prompt_of == 0])
    assert len(sizes) == 5 and set(sizes.values()) == {8}  # 32 / 4 = 8 a slice
    check_donation(prompt_of, kl_group_of, mismatched)


# the rule in plain words


def groups_by_the_rule(prompt_of, desirable, *, kl_group_size, max_examples, shuffle, seed):
    """Return kl_group_of and mismatched_prompt_of, or None where no grouping is found: what the index arrays must come to, slice by slice."""
    rows_of = {}
    for row, prompt in enumerate(prompt_of.tolist()):
        rows_of.setdefault(prompt, []).append(row)
    width = max(1, max_examples // kl_group_size)
    slices = [(prompt, rows[at : at + width]) for prompt, rows in rows_of.items() for at in range(0, len(rows), width)]
    if shuffle:
        rng, mixes, places = np.random.default_rng(seed), [desirable[rows].mean() for _, rows in slices], np.empty(len(slices))
        for mix in sorted(set(mixes)):
            stratum = rng.permutation([index for index, found in enumerate(mixes) if found == mix])
            places[stratum] = (np.arange(len(stratum)) + rng.random()) / len(stratum)
        slices = [slices[index] for index in np.argsort(places, kind="stable")]

    closed, still_open = [], []
    for prompt, rows in slices:
        group = next((candidate for candidate in still_open if prompt not in candidate), None)
        if group is None:
            still_open.append(group := {})
        group[prompt] = rows
        if len(group) == kl_group_size:
            closed.append(group)
            still_open = [candidate for candidate in still_open if candidate is not group]
    groups = settled_by_the_rule(closed, still_open, max_examples)
    if any(len(group) < 2 or size_of(group) > max_examples for group in groups):
        return None
    kl_group_of, mismatched = prompt_of.copy(), prompt_of.copy()
    for number, group in enumerate(groups):
        for prompt, receiver in zip(group, [*group][1:] + [*group][:1]):
            kl_group_of[group[prompt]], mismatched[group[prompt]] = number, receiver
    return kl_group_of, mismatched


def settled_by_the_rule(groups, leftovers, max_examples):
    for leftover in leftovers:
        room = [number for number, group in enumerate(groups) if size_of(group) + size_of(leftover) <= max_examples]
        if not room and len(leftover) > 1:
            groups.append(leftover)
            continue
        place = room[-1] if room else -1
        joint = {prompt: groups[place].get(prompt, []) + leftover.get(prompt, []) for prompt in [*groups[place], *leftover]}
        groups[place] = joint
        if not room:
            smaller, larger = {}, {}
            for prompt, rows in joint.items():
                smaller, larger = sorted((smaller, larger), key=size_of)
                smaller[prompt], larger[prompt] = rows[: -(-len(rows) // 2)], rows[-(-len(rows) // 2) :]
            groups[-1:] = [{prompt: rows for prompt, rows in half.items() if rows} for half in (smaller, larger)]
    return groups


def size_of(group) -> int:
    return sum(len(rows) for rows in group.values())


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_groups_are_those_of_the_rule(seed, shuffle):
    rng = np.random.default_rng([seed, shuffle])
    refused = 0
    for _ in range(60):
        prompt_of = random_prompts(rng)
        if rng.random() < 0.4:  # a few prompts with very many rows: slices that collide, and leftovers
            prompt_of = rng.permutation(np.concatenate([prompt_of[: int(rng.integers(40))], np.repeat([0, 1], rng.integers(1, 90, 2))]))
        desirable = rng.random(len(prompt_of)) < rng.choice([0.1, 0.5, 1])
        options = {"kl_group_size": int(rng.integers(2, 7)), "max_examples": int(rng.integers(2, 40)), "shuffle": shuffle, "seed": seed}
        expected = groups_by_the_rule(prompt_of, desirable, **options)
        if expected is None:
            refused += 1
            with pytest.raises(UserError, match="cannot be grouped"):
                assign(prompt_of, desirable, **options)
        else:
            assert np.array_equal(assign(prompt_of, desirable, **options), expected)
    assert 0 < refused < 40


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("shape", ["distinct", "pairs", "heavy tail", "one prompt has most"])
def test_a_million_rows_take_seconds(shape, shuffle):
    rng, num_rows = np.random.default_rng(0), 1_000_000
    prompt_of = {
        "distinct": lambda: np.arange(num_rows),
        "pairs": lambda: np.arange(num_rows) // 2,
        "heavy tail": lambda: rng.zipf(1.3, num_rows) % 500_000,
        "one prompt has most": lambda: np.where(rng.random(num_rows) < 0.9, 0, np.arange(num_rows)),  # 23,000 slices are left over
    }[shape]()
    desirable = rng.random(num_rows) < 0.9
    start = time.process_time()
    kl_group_of, mismatched = assign(prompt_of, desirable, kl_group_size=4, max_examples=64, shuffle=shuffle)
    # Measured: 0.1 to 0.7 s, and minutes for a loop over groups within the loop over slices.
    assert time.process_time() - start < 8
    assert (mismatched != prompt_of).all() and np.bincount(kl_group_of).max() <= 64
    # In every group each prompt donates to one, and receives from one.
    donors, first, donor_of = np.unique(kl_group_of * num_rows + prompt_of, return_index=True, return_inverse=True)
    receivers = kl_group_of * num_rows + mismatched
    assert np.array_equal(np.sort(receivers[first]), donors) and np.array_equal(receivers[first][donor_of], receivers)


def test_a_million_rows_without_enough_other_prompts_are_refused_in_seconds():
    start = time.process_time()
    with pytest.raises(UserError, match="cannot be grouped"):
        assign(np.maximum(np.arange(1_000_000) - 900_000, 0), kl_group_size=64, max_examples=64)
    # Measured: 0.7 s; 8 s if all 898,000 leftovers were dealt out before the end.
    assert time.process_time() - start < 4


# determinism and order


def test_the_same_seed_gives_the_same_groups_and_another_seed_others():
    prompt_of = random_prompts(np.random.default_rng(5))
    first, again, other = (assign(prompt_of, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_without_shuffling_the_seed_and_the_labels_play_no_part():
    prompt_of = random_prompts(np.random.default_rng(6))
    labels = np.random.default_rng(0).random(len(prompt_of)) < 0.5
    assert np.array_equal(assign(prompt_of, labels, shuffle=False, seed=1), assign(prompt_of, ~labels, shuffle=False, seed=2))


@pytest.mark.parametrize("batch", [2, 4, 8])
def test_file_order_reproduces_the_pairing_of_trl(batch):
    """TRL rolls the completions of a batch by one row: row i is scored with the completion of row i - 1, row 0 with the last one."""
    num_rows = 5 * batch
    kl_group_of, mismatched = assign(np.arange(num_rows), kl_group_size=batch, max_examples=batch, shuffle=False)
    assert kl_group_of.tolist() == [row // batch for row in range(num_rows)]
    completion_for = {int(prompt): row for row, prompt in enumerate(mismatched)}
    for start in range(0, num_rows, batch):
        rows = list(range(start, start + batch))
        assert [completion_for[row] for row in rows] == rows[-1:] + rows[:-1]


def test_file_order_takes_a_prompt_where_its_first_row_stands():
    kl_group_of, mismatched = assign([7, 3, 7, 5, 3, 9, 9], kl_group_size=2, max_examples=8, shuffle=False)
    assert kl_group_of.tolist() == [0, 0, 0, 1, 0, 1, 1]
    assert mismatched.tolist() == [3, 7, 3, 9, 7, 5, 5]


def test_the_epoch_without_shuffling_is_the_file():
    kl_group_of, _ = assign(np.arange(24), kl_group_size=8, max_examples=8, shuffle=False)
    plan = plan_batches(kl_group_of, global_batch_size=8, num_train_epochs=1, max_steps=None, shuffle=False, seed=0)
    assert [plan.examples_of(step).tolist() for step in (1, 2, 3)] == [list(range(start, start + 8)) for start in (0, 8, 16)]


# leftovers


@pytest.mark.parametrize(
    ("num_prompts", "max_examples", "expected"),
    [
        (8, 4, [4, 4]),  # none
        (9, 5, [4, 5]),  # joins the last group
        (11, 8, [4, 7]),  # three join
        (11, 4, [4, 4, 3]),  # three do not fit, and stand alone
        (9, 4, [4, 2, 3]),  # one does not fit and cannot stand alone: the last group is cut in two
        (3, 4, [3]),  # nothing but a leftover
        (2, 4, [2]),
    ],
)
def test_leftover_prompts(num_prompts, max_examples, expected):
    prompt_of = np.arange(num_prompts)
    kl_group_of, mismatched = assign(prompt_of, kl_group_size=4, max_examples=max_examples, shuffle=False)
    assert sorted(Counter(kl_group_of.tolist()).values()) == sorted(expected)
    check_donation(prompt_of, kl_group_of, mismatched)


def test_left_over_slices_of_a_prompt_join_its_slice_in_the_last_group():
    # Slices of 2: prompt 0 has three, prompts 1 and 2 one each; two whole groups, and a slice of prompt 0 is left.
    prompt_of = np.array([0] * 6 + [1, 1, 2, 2])
    kl_group_of, mismatched = assign(prompt_of, kl_group_size=2, max_examples=6, shuffle=False)
    assert kl_group_of.max() == 1
    check_donation(prompt_of, kl_group_of, mismatched)


@pytest.mark.parametrize(
    "copies",
    [
        [1, 1, 4, 4, 4],  # room in the first group: {0: 1, 1: 1, 4: 4}, {2: 4, 3: 4}
        [4, 4, 4],  # no room, but prompt 0 can go to both groups: {0: 2, 1: 4}, {0: 2, 2: 4}
    ],
)
def test_a_single_leftover_prompt_is_placed_wherever_it_can_be(copies):
    prompt_of = np.repeat(np.arange(len(copies)), copies)
    kl_group_of, mismatched = assign(prompt_of, kl_group_size=2, max_examples=8, shuffle=False)
    members = check_donation(prompt_of, kl_group_of, mismatched)
    assert all(len(examples) <= 8 for examples in members.values())


def test_a_prompt_left_alone_by_the_deal_takes_the_next_leftover():
    # {0, 1} is full; the first 2 is dealt out with it, {1, 2} and {0}; the second 2 joins 0.
    kl_group_of, mismatched = assign([0, 1, 2, 2], kl_group_size=2, max_examples=2, shuffle=False)
    assert kl_group_of.tolist() == [1, 0, 0, 1] and mismatched.tolist() == [2, 2, 1, 0]


# errors


def test_one_distinct_prompt_is_an_error_that_says_so():
    with pytest.raises(UserError, match="at least two distinct prompts, found 1 in 5 examples") as caught:
        assign([3] * 5)
    assert caught.value.where == "data.train" and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("prompt_of", "kl_group_size"),
    [([0] * 100 + [1], 2), ([0, 1, 2], 2), ([0, 1, 2], 3), ([0, 1, 2], 4)],  # all donors used up; an odd one out; a group larger than a step
)
def test_what_cannot_be_grouped_names_the_batch_size(prompt_of, kl_group_size):
    with pytest.raises(UserError, match="cannot be grouped into steps of at most 2") as caught:
        assign(prompt_of, kl_group_size=kl_group_size, max_examples=2)
    assert caught.value.where == "batch.global_batch_size"


# labels


def labels_of_steps(desirable, prompt_of, *, kl_group_size, global_batch_size, seed):
    kl_group_of, _ = assign(prompt_of, desirable, kl_group_size=kl_group_size, max_examples=global_batch_size, seed=seed)
    plan = plan_batches(kl_group_of, global_batch_size=global_batch_size, num_train_epochs=2, max_steps=None, shuffle=True, seed=seed)
    return [desirable[plan.examples_of(step)] for step in range(1, plan.num_steps + 1)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_prompts", [64, 101, 1000])
def test_no_step_is_one_sided_though_the_file_is_sorted_by_label(seed, num_prompts):
    desirable = np.arange(num_prompts) < num_prompts // 2
    for labels in labels_of_steps(desirable, np.arange(num_prompts), kl_group_size=4, global_batch_size=8, seed=seed):
        assert labels.any() and not labels.all()


@pytest.mark.parametrize("seed", range(5))
def test_a_rare_label_is_spread_over_the_steps(seed):
    # One in eight is desirable: a step of 16 has 2 on average; chance alone would leave (7/8)^16 = 12 % of the steps without any.
    desirable = np.arange(1600) < 200
    counts = [labels.sum() for labels in labels_of_steps(desirable, np.arange(1600), kl_group_size=8, global_batch_size=16, seed=seed)]
    assert min(counts) >= 1 and max(counts) <= 4


def test_labels_do_not_split_the_completions_of_a_prompt():
    # One desirable and one undesirable completion each: every step has as many of both.
    prompt_of, desirable = np.repeat(np.arange(60), 2), np.arange(120) % 2 == 0
    assert all(labels.mean() == 0.5 for labels in labels_of_steps(desirable, prompt_of, kl_group_size=4, global_batch_size=8, seed=3))
