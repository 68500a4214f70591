"""What precompute-ref has to score, cut into shards by the data alone: neither the number of ranks nor an interruption changes a shard.

Legend: W wanted pairs, each content once, whichever splits it lies in.
"""

import math
from typing import NamedTuple

import numpy as np

from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.keys import distinct
from kto_ds.data.packing import Layout, MicroBatch, make_units, pack, require_fit

# A kill costs what was scored since the last commit: less than two minutes for a 30B model, which scores some 8,000 tokens a second.
SHARD_COST = 1 << 20
# To be raised whenever equal work comes to be cut into other shards: those of an attempt begun before are then known by their keys, not by their numbers.
PLAN_RULES = 2
MIN_SHARDS = 256  # where there are as many micro-batches: a few shards alone could not keep many ranks busy


class Wanted(NamedTuple):
    keys: np.ndarray  # [W, 2] uint64, distinct
    split_of: np.ndarray  # [W] int64, index into `names`
    pairs: np.ndarray  # [W] int64, pair id in that split
    names: list[str]  # of the splits

    def select(self, chosen: np.ndarray) -> "Wanted":
        return Wanted(self.keys[chosen], self.split_of[chosen], self.pairs[chosen], self.names)


class Task(NamedTuple):
    split: str
    micro_batch: MicroBatch

    @property
    def cost(self) -> float:
        return sum(unit.cost for unit in self.micro_batch)

    @property
    def num_pairs(self) -> int:
        return sum(len(unit.pairs) for unit in self.micro_batch)

    @property
    def tokens(self) -> int:
        return sum(unit.tokens for unit in self.micro_batch)


Shard = list[Task]


def needed_pairs(split: TokenizedSplit, loss_type: str) -> np.ndarray:
    """Return the pair ids whose reference log-prob the loss needs: all 2E for kto, the E matched ones for apo_zero_unpaired."""
    return np.arange(split.num_examples * (2 if loss_type == "kto" else 1))


def wanted_pairs(splits: dict[str, TokenizedSplit], loss_type: str) -> Wanted:
    """Return one pair for every distinct key that the loss needs: what is there twice is scored once."""
    pairs = [needed_pairs(split, loss_type) for split in splits.values()]
    keys = np.concatenate([split.pair_keys[: len(ids)] for split, ids in zip(splits.values(), pairs)])
    split_of = np.repeat(np.arange(len(pairs)), [len(ids) for ids in pairs])
    _, first = distinct(keys)
    return Wanted(keys[first], split_of[first], np.concatenate(pairs)[first], list(splits))


def plan_shards(splits: dict[str, TokenizedSplit], wanted: Wanted, *, layout: Layout, max_tokens: int) -> list[Shard]:
    """Return all micro-batches, in shards of about equal cost, each with its longest first; the first one of all is the longest there is.

    The completions of a prompt, its own and those donated to it, lie behind it in one micro-batch, as far as the layout shares prompts.
    """
    tasks = []
    for number, (name, split) in enumerate(splits.items()):
        require_fit(split.longest_pair_tokens, max_tokens, "reference.max_tokens_per_microbatch")
        units = make_units(
            np.sort(wanted.pairs[wanted.split_of == number]), pair_prompts=split.pair_prompts, pair_lengths=split.pair_lengths,
            prompt_lengths=split.prompt_lengths, layout=layout, max_tokens=max_tokens,
        )  # fmt: skip
        tasks += [Task(name, micro_batch) for micro_batch in pack(units, layout=layout, max_tokens=max_tokens)]
    tasks.sort(key=lambda task: -task.cost)
    num_shards = min(len(tasks), max(MIN_SHARDS, math.ceil(sum(task.cost for task in tasks) / SHARD_COST)))
    return [tasks[number::num_shards] for number in range(num_shards)]
