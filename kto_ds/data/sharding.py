"""How pairs become one rank's micro-batches."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from kto_ds.data.ahead import ahead
from kto_ds.data.batch import Batch, make_batch
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.packing import Layout, MicroBatch, share_out


class Sharding(NamedTuple):
    layout: Layout
    max_tokens: int
    rank: int
    num_ranks: int
    device: torch.device

    def shares(self, pairs: np.ndarray, split: TokenizedSplit) -> list[list[MicroBatch]]:
        """Return every rank's micro-batches of `pairs`, all ranks the same number, as every forward is a collective."""
        return share_out(
            pairs, pair_prompts=split.pair_prompts, pair_lengths=split.pair_lengths, prompt_lengths=split.prompt_lengths,
            layout=self.layout, max_tokens=self.max_tokens, num_ranks=self.num_ranks,
        )  # fmt: skip

    def batch(self, micro_batch: MicroBatch, split: TokenizedSplit) -> Batch:
        """Lay a micro-batch out on the host, ready to be copied to the device."""
        batch = make_batch(micro_batch, split, self.layout)
        return batch.pinned() if self.device.type == "cuda" else batch

    def batches(self, pairs: np.ndarray, split: TokenizedSplit) -> Iterator[Batch]:
        """Yield this rank's micro-batches of `pairs`, each laid out while the one before is scored."""
        return ahead(lambda micro_batch: self.batch(micro_batch, split), self.shares(pairs, split)[self.rank])
