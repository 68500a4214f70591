"""From pairs to micro-batches: units that fit a token budget, balanced over ranks by cost. Pure arithmetic on lengths.

A unit is one prompt with completions that lie behind it in one micro-batch. In the prefix-shared layout the prompt's tokens are there
once for all of them; in the packed and padded layouts every completion brings its own copy of the prompt.

A round is one micro-batch of every rank. Under ZeRO-3 the ranks gather each layer together, so that a round takes as long as its
costliest micro-batch, and a step the sum of that over its rounds.
"""

import heapq
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from kto_ds.errors import UserError

Layout = Literal["prefix_shared", "packed", "padded"]

# First-fit looks at this many open micro-batches, so that packing a whole dataset stays linear.
MAX_OPEN_BINS = 32
# Cost of a sequence of L tokens in token equivalents: L + L^2 / this. Attention catches up with the matrix products at about
# 12 * hidden_size tokens of context; 50,000 is that of a hidden size near 4,096.
QUADRATIC_TOKENS = 50_000
# Where completions share a prompt, its keys and values are gathered anew for each of them. A unit gathers at most so many keys for each of its
# tokens, which bounds the memory of a micro-batch: 1 GiB for 8,192 tokens with 8 heads of 128 in bfloat16. Up to 31 completions never meet it.
MAX_KEYS_PER_TOKEN = 32


class Unit(NamedTuple):
    prompt: int  # prompt index
    pairs: tuple[int, ...]  # pair ids whose prompt that is
    tokens: int  # real tokens the model processes for it
    longest: int  # tokens of the longest prompt + completion
    attended: int  # sum over its tokens of 2 * keys - 1: L^2 for one sequence of L tokens

    @property
    def cost(self) -> float:
        return self.tokens + self.attended / QUADRATIC_TOKENS


MicroBatch = list[Unit]


def make_units(
    pairs: np.ndarray,  # [N] pair ids
    *,
    pair_prompts: np.ndarray,  # [2E] prompt index of every pair
    pair_lengths: np.ndarray,  # [2E] completion tokens of every pair
    prompt_lengths: np.ndarray,  # [P]
    layout: Layout,
    max_tokens: int,
) -> list[Unit]:
    """Gather the pairs of each prompt into units of at most `max_tokens`, or of one pair; only prefix_shared puts several into one."""
    members_of: dict[int, list[tuple[int, int]]] = {}  # prompt -> (pair, completion tokens)
    for prompt, pair, length in zip(pair_prompts[pairs].tolist(), pairs.tolist(), pair_lengths[pairs].tolist()):
        members_of.setdefault(prompt, []).append((pair, length))

    units = []
    for prompt, members in members_of.items():
        size = int(prompt_lengths[prompt])
        chosen: list[int] = []
        tokens = longest = keys = size
        attended = size * size
        for pair, length in members:
            is_full = layout != "prefix_shared" or tokens + length > max_tokens or keys + size + length > MAX_KEYS_PER_TOKEN * (tokens + length)
            if chosen and is_full:
                units.append(Unit(prompt, tuple(chosen), tokens, longest, attended))
                chosen, tokens, longest, keys, attended = [], size, size, size, size * size
            chosen.append(pair)
            tokens += length
            longest = max(longest, size + length)
            keys += size + length
            attended += length * (2 * size + length)
        units.append(Unit(prompt, tuple(chosen), tokens, longest, attended))
    return units


def pack(units: Sequence[Unit], *, layout: Layout, max_tokens: int) -> list[MicroBatch]:
    """First-fit decreasing under the token budget. Padded rows count with the length of the longest row of their micro-batch."""
    bins: list[MicroBatch] = []
    used: list[int] = []
    for unit in sorted(units, key=lambda unit: (-unit.longest, unit.pairs)):
        for index in range(max(0, len(bins) - MAX_OPEN_BINS), len(bins)):
            # Units come longest first, so the first row of a micro-batch sets the width of all.
            more = bins[index][0].longest if layout == "padded" else unit.tokens
            if used[index] + more <= max_tokens:
                bins[index].append(unit)
                used[index] += more
                break
        else:
            bins.append([unit])
            used.append(unit.tokens)
    return bins


def cost_of(micro_batch: MicroBatch, layout: Layout) -> float:
    """Return the cost in token equivalents. Padded rows cost what the longest of them does."""
    if layout != "padded":
        return sum(unit.cost for unit in micro_batch)
    return len(micro_batch) * max((unit.cost for unit in micro_batch), default=0.0)


def share_out(
    pairs: np.ndarray,  # [N] pair ids
    *,
    pair_prompts: np.ndarray,  # [2E]
    pair_lengths: np.ndarray,  # [2E]
    prompt_lengths: np.ndarray,  # [P]
    layout: Layout,
    max_tokens: int,
    num_ranks: int,
) -> list[list[MicroBatch]]:
    """Return every rank's micro-batches, round by round: alike in cost within a round, and in sum over the ranks.

    All ranks get the same number, empty ones included where there are too few units, since unequal forwards deadlock ZeRO-3.
    """
    lengths = {"pair_prompts": pair_prompts, "pair_lengths": pair_lengths, "prompt_lengths": prompt_lengths}
    pairs = np.sort(pairs)
    units = make_units(pairs, layout=layout, max_tokens=max_tokens, **lengths)
    shares = _share_units(units, num_ranks, layout, max_tokens)
    mean = math.ceil(sum(unit.tokens for unit in units) / max(1, sum(map(len, shares))))  # tokens of a micro-batch
    if any(unit.tokens > mean and len(unit.pairs) > 1 for unit in units):
        # The other ranks wait for the one that has a prompt with very many completions: cutting it may be worth repeating the prompt.
        cut = _share_units(make_units(pairs, layout=layout, max_tokens=mean, **lengths), num_ranks, layout, max_tokens)
        shares = min(shares, cut, key=lambda shares: step_cost(shares, layout))
    return shares


def step_cost(shares: list[list[MicroBatch]], layout: Layout) -> float:
    """Return the cost of the ranks' micro-batches in sequence, in token equivalents: in each round, all ranks wait for the costliest."""
    return sum(max(cost_of(micro_batch, layout) for micro_batch in in_round) for in_round in zip(*shares))


def _share_units(units: list[Unit], num_ranks: int, layout: Layout, max_tokens: int) -> list[list[MicroBatch]]:
    micro_batches = pack(units, layout=layout, max_tokens=max_tokens)
    num_rounds = math.ceil(len(micro_batches) / num_ranks)
    units = sorted(units, key=lambda unit: (-unit.cost, unit.pairs))
    if layout == "padded":
        micro_batches = _padded_runs(units, num_rounds * num_ranks, max_tokens)
    else:
        # What does not fit fills nearly all of the budget, so that the micro-batches of first-fit are alike, too.
        micro_batches = _level(units, num_rounds, num_ranks, max_tokens) or micro_batches
    micro_batches.sort(key=lambda micro_batch: (-cost_of(micro_batch, layout), micro_batch))
    shares: list[list[MicroBatch]] = [[] for _ in range(num_ranks)]
    for number, start in enumerate(range(0, len(micro_batches), num_ranks)):
        in_round = micro_batches[start : start + num_ranks]
        in_round += [[]] * (num_ranks - len(in_round))
        # Forth and back, so that sums are alike too: below ZeRO-3 the ranks wait for each other at the end of the step only.
        for share, micro_batch in zip(shares, reversed(in_round) if number % 2 else in_round):
            share.append(micro_batch)
    return shares


def _level(units: list[Unit], num_rounds: int, num_ranks: int, max_tokens: int) -> list[MicroBatch]:
    """Place `units`, costliest first, each into the micro-batch that is farthest below the level of its round; return none where one does not fit.

    The level of a round is the mean of what is left for it and the later ones, or the cost of a unit that must be in it: beside a very
    long sequence the other ranks have time for as much.
    """
    left, levels = sum(unit.cost for unit in units), []
    for number in range(num_rounds):
        largest = units[number * num_ranks].cost if number * num_ranks < len(units) else 0.0
        levels.append(min(max(left / (num_rounds - number), largest * num_ranks), left) / num_ranks)
        left -= levels[-1] * num_ranks

    micro_batches: list[MicroBatch] = [[] for _ in range(num_rounds * num_ranks)]
    heap = [(-levels[number // num_ranks], 0, number) for number in range(len(micro_batches))]  # (cost above the level, tokens, micro-batch)
    heapq.heapify(heap)
    for unit in units:
        without_room = []
        while heap and heap[0][1] + unit.tokens > max_tokens:
            without_room.append(heapq.heappop(heap))
        if not heap:
            return []
        above, tokens, number = heap[0]
        heapq.heapreplace(heap, (above + unit.cost, tokens + unit.tokens, number))
        micro_batches[number].append(unit)
        for entry in without_room:
            heapq.heappush(heap, entry)
    return [micro_batch for micro_batch in micro_batches if micro_batch]


def _padded_runs(units: list[Unit], num_runs: int, max_tokens: int) -> list[MicroBatch]:
    """Cut `units`, longest first, into at most `num_runs` micro-batches of neighbours, the costliest as cheap as can be."""

    def cut(most: float) -> list[MicroBatch]:
        runs: list[MicroBatch] = []
        for number, unit in enumerate(units):
            rows = len(runs[-1]) + 1 if runs else 0
            # Once as many runs as units are left, each unit gets one of its own.
            if rows and rows * runs[-1][0].longest <= max_tokens and rows * runs[-1][0].cost <= most and len(units) - number > num_runs - len(runs):
                runs[-1].append(unit)
            else:
                runs.append([unit])
        return runs

    low, high = 0.0, cost_of(units, "padded")
    while high - low > 1:  # of a token
        middle = (low + high) / 2
        low, high = (low, middle) if len(cut(middle)) <= num_runs else (middle, high)
    return cut(high)


def require_fit(longest_tokens: int, max_tokens: int, where: str, *, group_size: int = 1) -> None:
    """Refuse a split whose longest sequence has no room in a micro-batch of `max_tokens` on each of `group_size` ranks; `where` is that budget's key."""
    if longest_tokens > max_tokens * group_size:
        share = "" if group_size == 1 else f" on {group_size} ranks"
        raise UserError(
            f"the longest sequence has {longest_tokens} tokens, a micro-batch{share} takes only {max_tokens * group_size}",
            where=where,
            remedy=f"raise {where} to {math.ceil(longest_tokens / group_size)} or more, or lower data.max_length and run kto-ds prepare again",
        )
