"""From prompts and labels to what every rank runs: what holds for any dataset, searched by hypothesis.

The search is seeded, so that a run on one commit is like the next.
"""

import time
from collections import Counter, defaultdict

import numpy as np
from hypothesis import event, given, settings
from hypothesis import strategies as st

from kto_ds.data.batch_plan import plan_batches
from kto_ds.data.kl_groups import assign_kl_groups
from kto_ds.data.packing import make_units, share_out
from kto_ds.errors import UserError

searched = settings(max_examples=100, deadline=None, derandomize=True, database=None)

seeds = st.integers(0, 2**32 - 1)
# Rows of each prompt: mostly a few, or a few prompts with very many.
even = st.lists(st.integers(1, 9), min_size=1, max_size=40)
skewed = st.tuples(st.lists(st.integers(20, 150), min_size=1, max_size=3), st.lists(st.integers(1, 4), max_size=60)).map(lambda parts: parts[0] + parts[1])
single = st.integers(1, 80).map(lambda num_prompts: [1] * num_prompts)


@st.composite
def datasets(draw):
    """Return (prompt_of, desirable), scattered or in runs; labels mixed, rare, or all the same."""
    copies = draw(st.one_of(even, skewed, single))
    rng = np.random.default_rng(draw(seeds))
    prompt_of = np.repeat(rng.permutation(len(copies)), copies)
    if draw(st.booleans()):
        prompt_of = rng.permutation(prompt_of)
    return prompt_of, rng.random(len(prompt_of)) < draw(st.sampled_from([0, 0.1, 0.5, 1]))


@st.composite
def options(draw):
    kl_group_size = draw(st.integers(2, 8))
    return {"kl_group_size": kl_group_size, "max_examples": draw(st.integers(kl_group_size, 64)), "shuffle": draw(st.booleans()), "seed": draw(st.integers(0, 99))}


def groups_of(dataset, options):
    """Return (kl_group_of, mismatched_prompt_of), or None where the user is told that it cannot be."""
    prompt_of, desirable = dataset
    try:
        found = assign_kl_groups(prompt_of, desirable, **options)
    except UserError as error:
        assert error.where == ("batch.global_batch_size" if len(set(prompt_of.tolist())) > 1 else "data.train") and error.remedy
        found = None
    event("refused" if found is None else "grouped")
    return found


def plan_of(kl_group_of, options, *, num_train_epochs=2.0, max_steps=None, more=0):
    return plan_batches(
        kl_group_of, global_batch_size=options["max_examples"] + more, num_train_epochs=num_train_epochs, max_steps=max_steps,
        shuffle=options["shuffle"], seed=options["seed"],
    )  # fmt: skip


def bundles(prompts, examples) -> dict[int, frozenset]:
    """Return the examples that stand behind each prompt."""
    found = defaultdict(set)
    for prompt, example in zip(prompts[examples].tolist(), examples.tolist()):
        found[prompt].add(example)
    return {prompt: frozenset(members) for prompt, members in found.items()}


# groups and steps


@searched
@given(datasets(), options(), st.integers(0, 40))
def test_every_step_donates_the_completions_it_has_among_the_prompts_it_has(dataset, options, more):
    prompt_of, found = dataset[0], groups_of(dataset, options)
    if found is None:
        return
    kl_group_of, mismatched = found
    assert (mismatched != prompt_of).all()
    plan = plan_of(kl_group_of, options, more=more)
    for step in range(1, plan.num_steps + 1):
        examples = plan.examples_of(step)
        assert 0 < len(examples) <= options["max_examples"] + more
        for group in set(kl_group_of[examples].tolist()):
            members = examples[kl_group_of[examples] == group]
            own, received = bundles(prompt_of, members), bundles(mismatched, members)
            assert own.keys() == received.keys() and Counter(own.values()) == Counter(received.values())
            assert all(own[prompt] != received[prompt] for prompt in own)


@searched
@given(datasets(), options(), st.integers(0, 40))
def test_every_epoch_takes_every_example_once(dataset, options, more):
    found = groups_of(dataset, options)
    if found is None:
        return
    plan = plan_of(found[0], options, num_train_epochs=3.0, more=more)
    steps = iter(range(1, plan.num_steps + 1))
    for num_steps in plan.steps_of_epoch:
        taken = np.concatenate([plan.examples_of(next(steps)) for _ in range(num_steps)])
        assert np.array_equal(np.sort(taken), np.arange(len(dataset[0])))
    assert next(steps, None) is None and len(plan.steps_of_epoch) == 3


@searched
@given(datasets(), options())
def test_labels_of_one_kind_do_not_change_what_holds(dataset, options):
    """With one label only there is one stratum, whichever the label is."""
    prompt_of, _ = dataset
    results = [groups_of((prompt_of, np.full(len(prompt_of), label)), options) for label in (True, False)]
    assert (results[0] is None) == (results[1] is None) and (results[0] is None or np.array_equal(results[0], results[1]))


@searched
@given(datasets(), options(), st.integers(0, 20))
def test_prompts_that_fit_into_one_step_are_never_refused(dataset, options, more):
    prompt_of, _ = dataset
    if len(set(prompt_of.tolist())) > 1:
        assert groups_of(dataset, {**options, "max_examples": max(options["kl_group_size"], len(prompt_of)) + more}) is not None


@searched
@given(st.integers(2, 300), options())
def test_distinct_prompts_are_never_refused_where_three_fit(num_prompts, options):
    found = groups_of((np.arange(num_prompts), np.arange(num_prompts) % 2 == 0), {**options, "max_examples": max(3, options["max_examples"])})
    assert found is not None and np.bincount(found[0]).min() >= 2


# resuming, and any number of ranks


@searched
@given(datasets(), options(), st.data())
def test_a_step_depends_on_its_number_alone(dataset, options, data):
    """Not on who asks, in which order, how long the run is, or where it was resumed."""
    found, again = groups_of(dataset, options), groups_of(dataset, options)
    if found is None:
        return
    assert np.array_equal(found, again)
    plan = plan_of(found[0], options)
    in_order = [plan.examples_of(step).tolist() for step in range(1, plan.num_steps + 1)]
    resumed_after = data.draw(st.integers(0, plan.num_steps - 1))
    same, longer, shorter = plan_of(again[0], options), plan_of(found[0], options, num_train_epochs=3.5), plan_of(found[0], options, max_steps=resumed_after + 1)
    for step in range(plan.num_steps, resumed_after, -1):
        assert same.examples_of(step).tolist() == longer.examples_of(step).tolist() == in_order[step - 1]
    assert [shorter.examples_of(step).tolist() for step in range(1, shorter.num_steps + 1)] == in_order[: resumed_after + 1]


@searched
@given(datasets(), options(), seeds, st.sampled_from(["prefix_shared", "packed", "padded"]))
def test_ranks_share_the_pairs_of_a_step_whatever_their_number(dataset, options, seed, layout):
    prompt_of, found = dataset[0], groups_of(dataset, options)
    if found is None:
        return
    kl_group_of, mismatched = found
    num_examples, rng = len(prompt_of), np.random.default_rng(seed)
    lengths = {
        "pair_prompts": np.concatenate([prompt_of, mismatched]),
        "pair_lengths": np.minimum(rng.geometric(0.1, 2 * num_examples), 50),
        "prompt_lengths": rng.integers(1, 50, int(prompt_of.max()) + 1),
    }
    plan = plan_of(kl_group_of, options, num_train_epochs=1.0)
    for step in {1, plan.num_steps}:
        examples = plan.examples_of(step)
        pairs = np.concatenate([examples, examples + num_examples])
        for num_ranks in (1, 2, 3, 8):
            shares = share_out(pairs, num_ranks=num_ranks, layout=layout, max_tokens=120, **lengths)
            assert len(shares) == num_ranks and len({len(share) for share in shares}) == 1
            shared = [pair for share in shares for micro_batch in share for unit in micro_batch for pair in unit.pairs]
            assert sorted(shared) == sorted(pairs.tolist())
            # What a step scores is each of its completions twice: behind its own prompt, and behind that of its neighbour.
            assert Counter(pair % num_examples for pair in shared) == Counter({example: 2 for example in examples.tolist()})


# size


def test_plans_and_units_of_very_many_rows_take_seconds():
    # Measured: 0.3 s and 0.2 s. Sums over all earlier pairs of a prompt would take minutes.
    start = time.process_time()
    plan = plan_batches(np.repeat(np.arange(250_000), 4), global_batch_size=64, num_train_epochs=3, max_steps=None, shuffle=True, seed=0)
    num_pairs = 200_000
    lengths = {"pair_prompts": np.zeros(num_pairs, int), "pair_lengths": np.ones(num_pairs, int), "prompt_lengths": np.array([10])}
    units = make_units(np.arange(num_pairs), layout="prefix_shared", max_tokens=10 + num_pairs // 2, **lengths)
    assert time.process_time() - start < 8
    assert len(plan.examples) == 3_000_000 and [len(unit.pairs) for unit in units] == [num_pairs // 2] * 2
