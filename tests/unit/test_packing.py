"""Units, micro-batches and shares of ranks: what is kept, what fits, what is balanced."""

from collections import Counter

import numpy as np
import pytest

from kto_ds.data.packing import make_units, pack, require_fit, share_out
from kto_ds.errors import UserError

LAYOUTS = ["prefix_shared", "packed", "padded"]


def random_lengths(rng: np.random.Generator, max_tokens: int):
    """Return (pairs, pair_prompts, pair_lengths, prompt_lengths): every prompt + completion fits into `max_tokens`."""
    num_prompts, num_pairs = int(rng.integers(1, 30)), int(rng.integers(1, 120))
    prompt_lengths = rng.integers(1, max_tokens // 2, num_prompts)
    pair_prompts = rng.integers(0, num_prompts, 2 * num_pairs)
    pair_lengths = np.minimum(1 + rng.geometric(4 / max_tokens, 2 * num_pairs), max_tokens - prompt_lengths[pair_prompts])
    pairs = rng.permutation(2 * num_pairs)[: int(rng.integers(1, 2 * num_pairs + 1))]
    return pairs, pair_prompts, pair_lengths, prompt_lengths


def units_of(pairs, pair_prompts, pair_lengths, prompt_lengths, layout, max_tokens):
    return make_units(np.asarray(pairs), pair_prompts=pair_prompts, pair_lengths=pair_lengths, prompt_lengths=prompt_lengths, layout=layout, max_tokens=max_tokens)


def tokens_of(micro_batch, layout) -> int:
    """Tokens a micro-batch occupies: rows times the longest row where rows are padded."""
    if layout == "padded":
        return sum(len(unit.pairs) for unit in micro_batch) * max(unit.longest for unit in micro_batch)
    return sum(unit.tokens for unit in micro_batch)


# units


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(25))
def test_units_hold_every_pair_once_behind_its_own_prompt(seed, layout):
    rng = np.random.default_rng(seed)
    max_tokens = int(rng.integers(20, 300))
    pairs, pair_prompts, pair_lengths, prompt_lengths = random_lengths(rng, max_tokens)
    units = units_of(pairs, pair_prompts, pair_lengths, prompt_lengths, layout, max_tokens)
    assert Counter(pair for unit in units for pair in unit.pairs) == Counter(pairs.tolist())
    for unit in units:
        lengths = [int(pair_lengths[pair]) for pair in unit.pairs]
        assert all(pair_prompts[pair] == unit.prompt for pair in unit.pairs)
        assert unit.tokens == prompt_lengths[unit.prompt] + sum(lengths) <= max_tokens
        assert unit.longest == prompt_lengths[unit.prompt] + max(lengths)
        assert layout == "prefix_shared" or len(unit.pairs) == 1


def test_completions_of_one_prompt_share_it():
    lengths = {"pair_prompts": np.array([0, 1, 0, 0]), "pair_lengths": np.array([3, 5, 2, 4]), "prompt_lengths": np.array([10, 7])}
    units = make_units(np.arange(4), layout="prefix_shared", max_tokens=100, **lengths)
    assert [(unit.prompt, unit.pairs, unit.tokens, unit.longest) for unit in units] == [(0, (0, 2, 3), 19, 14), (1, (1,), 12, 12)]
    assert [(unit.pairs, unit.tokens) for unit in make_units(np.arange(4), layout="packed", max_tokens=100, **lengths)] == [((0,), 13), ((2,), 12), ((3,), 14), ((1,), 12)]


def test_completions_that_do_not_fit_behind_one_prompt_are_split():
    lengths = {"pair_prompts": np.zeros(4, int), "pair_lengths": np.array([3, 3, 3, 3]), "prompt_lengths": np.array([10])}
    assert [unit.pairs for unit in make_units(np.arange(4), layout="prefix_shared", max_tokens=16, **lengths)] == [(0, 1), (2, 3)]
    assert [unit.pairs for unit in make_units(np.arange(4), layout="prefix_shared", max_tokens=15, **lengths)] == [(0,), (1,), (2,), (3,)]


# micro-batches


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(25))
def test_micro_batches_hold_every_unit_once_under_the_budget(seed, layout):
    rng = np.random.default_rng(100 + seed)
    max_tokens = int(rng.integers(20, 300))
    units = units_of(*random_lengths(rng, max_tokens), layout, max_tokens)
    micro_batches = pack(units, layout=layout, max_tokens=max_tokens)
    assert Counter(unit for micro_batch in micro_batches for unit in micro_batch) == Counter(units)
    assert all(micro_batch and tokens_of(micro_batch, layout) <= max_tokens for micro_batch in micro_batches)


def test_padded_rows_count_with_the_longest_row():
    lengths = {"pair_prompts": np.arange(3), "pair_lengths": np.array([6, 1, 1]), "prompt_lengths": np.array([4, 4, 4])}
    units = make_units(np.arange(3), layout="padded", max_tokens=20, **lengths)
    # 10 + 5 + 5 real tokens would fit into 20; three rows of 10 do not.
    assert sorted(len(micro_batch) for micro_batch in pack(units, layout="padded", max_tokens=20)) == [1, 2]
    assert [len(micro_batch) for micro_batch in pack(units, layout="packed", max_tokens=20)] == [3]


@pytest.mark.parametrize("layout", ["prefix_shared", "packed"])
def test_few_tokens_of_the_budget_are_left_unused(layout):
    # Measured: 3.6 and 3.4 % more micro-batches than tokens / budget; first-fit looks back at 32 micro-batches only.
    rng = np.random.default_rng(0)
    num_pairs = 2000
    lengths = {"pair_prompts": np.arange(num_pairs) // 2, "pair_lengths": rng.integers(5, 400, num_pairs), "prompt_lengths": rng.integers(5, 300, num_pairs // 2)}
    units = make_units(np.arange(num_pairs), layout=layout, max_tokens=4096, **lengths)
    micro_batches = pack(units, layout=layout, max_tokens=4096)
    fewest = -(-sum(unit.tokens for unit in units) // 4096)
    assert len(micro_batches) <= 1.05 * fewest


# shares


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("seed", range(6))
def test_shares_of_the_ranks_add_up_to_the_set_in_equally_many_micro_batches(seed, num_ranks, layout):
    rng = np.random.default_rng(200 + seed)
    max_tokens = int(rng.integers(20, 300))
    pairs, *lengths = random_lengths(rng, max_tokens)
    units = units_of(pairs, *lengths, layout, max_tokens)
    shares = share_out(units, num_ranks=num_ranks, layout=layout, max_tokens=max_tokens)
    assert len(shares) == num_ranks and len({len(share) for share in shares}) == 1
    assert Counter(pair for share in shares for micro_batch in share for unit in micro_batch for pair in unit.pairs) == Counter(pairs.tolist())
    assert all(tokens_of(micro_batch, layout) <= max_tokens for share in shares for micro_batch in share if micro_batch)
    assert any(share[-1] for share in shares)  # no micro-batch is empty on all ranks


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shares_are_the_same_whatever_order_the_units_come_in(layout):
    rng = np.random.default_rng(3)
    units = units_of(*random_lengths(rng, 100), layout, 100)
    shuffled = [units[index] for index in rng.permutation(len(units))]
    assert share_out(units, num_ranks=3, layout=layout, max_tokens=100) == share_out(shuffled, num_ranks=3, layout=layout, max_tokens=100)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cost_is_balanced_over_the_ranks(layout, num_ranks):
    """Longest-first greedy: the fullest rank is above the mean by less than one average unit, here 8 pairs or more a rank."""
    worst = 0.0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        num_pairs = 8 * num_ranks
        lengths = {
            "pair_prompts": np.arange(num_pairs) // 2,
            "pair_lengths": np.minimum(rng.lognormal(5, 1, num_pairs).astype(int) + 1, 1500),
            "prompt_lengths": np.minimum(rng.lognormal(5, 1, num_pairs // 2).astype(int) + 1, 500),
        }
        units = make_units(np.arange(num_pairs), layout=layout, max_tokens=4096, **lengths)
        shares = share_out(units, num_ranks=num_ranks, layout=layout, max_tokens=4096)
        loads = [sum(unit.cost for micro_batch in share for unit in micro_batch) for share in shares]
        # What no assignment can beat: the mean, and the most expensive unit.
        worst = max(worst, max(loads) / max(np.mean(loads), max(unit.cost for unit in units)))
    print(f"{layout}, {num_ranks} ranks: fullest rank at most {worst:.3f} of the bound")
    assert worst < 1.25


def test_a_rank_without_pairs_gets_empty_micro_batches():
    lengths = {"pair_prompts": np.zeros(1, int), "pair_lengths": np.array([3]), "prompt_lengths": np.array([2])}
    shares = share_out(make_units(np.arange(1), layout="packed", max_tokens=9, **lengths), num_ranks=3, layout="packed", max_tokens=9)
    assert sorted(shares, key=len) == shares and sorted(len(share[0]) for share in shares) == [0, 0, 1]


def test_a_sequence_longer_than_the_budget_is_refused_with_both_numbers():
    require_fit(100, 100, "batch.max_tokens_per_microbatch")
    with pytest.raises(UserError, match="has 101 tokens, a micro-batch takes only 100") as caught:
        require_fit(101, 100, "reference.max_tokens_per_microbatch")
    assert caught.value.where == "reference.max_tokens_per_microbatch"
