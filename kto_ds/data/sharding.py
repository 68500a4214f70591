"""How pairs become one rank's micro-batches."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from kto_ds.data.ahead import ahead
from kto_ds.data.batch import Batch, make_batch, part_of
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.packing import Layout, MicroBatch, share_out


class Sharding(NamedTuple):
    """Ranks work in groups of `group_size` neighbours, which share the tokens of each micro-batch; mostly every rank is a group by itself."""

    layout: Layout
    max_tokens: int  # of a micro-batch on one rank
    rank: int
    num_ranks: int
    device: torch.device
    group_size: int = 1

    @property
    def group(self) -> int:
        return self.rank // self.group_size

    @property
    def num_groups(self) -> int:
        return self.num_ranks // self.group_size

    def shares(self, pairs: np.ndarray, split: TokenizedSplit) -> list[list[MicroBatch]]:
        """Return every group's micro-batches of `pairs`, all groups the same number, as every forward is a collective."""
        return share_out(
            pairs, pair_prompts=split.pair_prompts, pair_lengths=split.pair_lengths, prompt_lengths=split.prompt_lengths,
            layout=self.layout, max_tokens=self.max_tokens * self.group_size, num_ranks=self.num_groups,
        )  # fmt: skip

    def batch(self, micro_batch: MicroBatch, split: TokenizedSplit) -> Batch:
        """Lay this rank's part of a micro-batch out on the host, ready to be copied to the device."""
        batch = make_batch(micro_batch, split, self.layout, num_parts=self.group_size)
        if self.group_size > 1:
            batch = part_of(batch, self.rank % self.group_size, self.group_size)
        return batch.pinned() if self.device.type == "cuda" else batch

    def batches(self, pairs: np.ndarray, split: TokenizedSplit) -> Iterator[Batch]:
        """Yield this rank's micro-batches of `pairs`, each laid out while the one before is scored."""
        return ahead(lambda micro_batch: self.batch(micro_batch, split), self.shares(pairs, split)[self.group])
