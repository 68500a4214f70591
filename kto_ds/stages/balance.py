"""How evenly the experts of a mixture are used over a step: the router's loss, split like the rest of the step, and what is told about it.

Legend: M layers with a router, N experts.
"""

import torch
from torch import Tensor

from kto_ds.data.batch import Batch
from kto_ds.losses import load_balancing_loss
from kto_ds.model.routers import RouterLoad
from kto_ds.report.metrics import RouterBalance
from kto_ds.runtime.collectives import sum_across_ranks
from kto_ds.runtime.engine import Engine


class MeasuredForward:
    """Scores batches as the engine does, and adds up how their tokens are routed. Other steps and phases take another one."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.latest: RouterLoad | None = None  # of the last batch; its probabilities carry a gradient
        self._sums: Tensor | int = 0  # [2, M, N]

    def __call__(self, batch: Batch) -> Tensor:
        logps, self.latest = self.engine(batch, with_load=True)
        self._sums = self._sums + torch.stack(self.latest).detach()
        return logps

    def of_all_ranks(self) -> RouterLoad:
        """Return the sums of all batches so far. All ranks call this."""
        return RouterLoad(*sum_across_ranks(self._sums))


def expert_shares(load: RouterLoad) -> Tensor:
    """Return how often a token went to each expert, on average over tokens and layers, [N]."""
    return load.assignments.sum(dim=0) / load.probabilities.sum()  # those of one token and layer add up to 1


def part_of_loss(shares: Tensor, load: RouterLoad, num_tokens: int) -> Tensor:
    """Return what a micro-batch adds to the step's load-balancing loss; `num_tokens` is that of the step on all ranks."""
    return load_balancing_loss(shares, load.probabilities.sum(dim=0) / (len(load.probabilities) * num_tokens))


def balance_of(load: RouterLoad) -> RouterBalance:
    """Return what there is to tell about a step's load, on the host."""
    shares = expert_shares(load)
    aux_loss = load_balancing_loss(shares, load.probabilities.sum(dim=0) / load.probabilities.sum())
    load_max = (load.assignments / load.assignments.mean(dim=1, keepdim=True)).max()
    return RouterBalance(*torch.stack([aux_loss, load_max]).tolist())
