"""From pairs to micro-batches: units that fit a token budget, balanced over ranks by cost. Pure arithmetic on lengths.

A unit is one prompt with completions that lie behind it in one micro-batch. In the prefix-shared layout the prompt's tokens are there
once for all of them; in the packed and padded layouts every completion brings its own copy of the prompt.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from kto_ds.errors import UserError

Layout = Literal["prefix_shared", "packed", "padded"]

# First-fit looks at this many open micro-batches, so that packing a whole dataset stays linear.
MAX_OPEN_BINS = 32
# Cost of a unit in token equivalents: tokens + tokens^2 / this. Attention catches up with the matrix products at about
# 12 * hidden_size tokens of context; 50,000 is that of a hidden size near 4,096.
QUADRATIC_TOKENS = 50_000


class Unit(NamedTuple):
    prompt: int  # prompt index
    pairs: tuple[int, ...]  # pair ids whose prompt that is
    tokens: int  # real tokens the model processes for it
    longest: int  # tokens of the longest prompt + completion

    @property
    def cost(self) -> float:
        return self.tokens + self.tokens * self.longest / QUADRATIC_TOKENS


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
    """Gather the pairs of each prompt into units of at most `max_tokens`; only prefix_shared puts several pairs into one."""
    members_of: dict[int, list[tuple[int, int]]] = {}  # prompt -> (pair, completion tokens)
    for prompt, pair, length in zip(pair_prompts[pairs].tolist(), pairs.tolist(), pair_lengths[pairs].tolist()):
        members_of.setdefault(prompt, []).append((pair, length))

    units = []
    for prompt, members in members_of.items():
        prompt_length = int(prompt_lengths[prompt])
        chosen: list[int] = []
        tokens = longest = prompt_length
        for pair, length in members:
            if chosen and (layout != "prefix_shared" or tokens + length > max_tokens):
                units.append(Unit(prompt, tuple(chosen), tokens, longest))
                chosen, tokens, longest = [], prompt_length, prompt_length
            chosen.append(pair)
            tokens += length
            longest = max(longest, prompt_length + length)
        units.append(Unit(prompt, tuple(chosen), tokens, longest))
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


def share_out(units: Sequence[Unit], *, num_ranks: int, layout: Layout, max_tokens: int) -> list[list[MicroBatch]]:
    """Return every rank's micro-batches; all ranks get the same number, empty ones included, since unequal forwards deadlock ZeRO-3."""
    loads = [0.0] * num_ranks
    shares: list[list[Unit]] = [[] for _ in range(num_ranks)]
    for unit in sorted(units, key=lambda unit: (-unit.cost, unit.pairs)):
        rank = loads.index(min(loads))
        loads[rank] += unit.cost
        shares[rank].append(unit)
    packed = [pack(share, layout=layout, max_tokens=max_tokens) for share in shares]
    most = max(len(micro_batches) for micro_batches in packed)
    return [micro_batches + [[] for _ in range(most - len(micro_batches))] for micro_batches in packed]


def require_fit(longest_tokens: int, max_tokens: int, where: str) -> None:
    if longest_tokens > max_tokens:
        raise UserError(
            f"the longest sequence has {longest_tokens} tokens, a micro-batch takes only {max_tokens}",
            where=where,
            remedy=f"raise {where} to {longest_tokens} or more, or lower data.max_length and run kto-ds prepare again",
        )
