"""Log-probs without gradients: the loop that precompute-ref and evaluate share."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from kto_ds.config import ModelConfig
from kto_ds.data.batch import Batch, make_batch
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.packing import Layout, MicroBatch
from kto_ds.model.attention import choose_backend
from kto_ds.model.load import load_policy
from kto_ds.model.support import DTYPES, choose_layout


class ScoredPairs(NamedTuple):
    pairs: np.ndarray  # [S] pair ids
    logps: Tensor  # [S] float32, on the model's device


class Serving(NamedTuple):
    """How a model is run here, decided before its weights are read."""

    layout: Layout
    backend: str
    notice: str


def choose_serving(model: ModelConfig, config: PretrainedConfig, device: torch.device) -> Serving:
    layout, notice = choose_layout(config, model.layout)
    return Serving(layout, choose_backend(model.attention, device=device, dtype=DTYPES[model.dtype]), notice)


def load_scorer(model: ModelConfig, config: PretrainedConfig, serving: Serving, device: torch.device) -> Callable[[Batch], Tensor]:
    """Return a whole copy of the model on this rank's device, as something that scores batches."""
    policy = load_policy(model, config, layout=serving.layout, backend=serving.backend, gradient_checkpointing=False, partition_for=None)
    return policy.eval().to(device)


@torch.no_grad()
def score(
    forward: Callable[[Batch], Tensor],
    micro_batches: Iterable[MicroBatch],
    split: TokenizedSplit,
    *,
    layout: Layout,
    device: torch.device,
) -> Iterator[ScoredPairs]:
    """Yield the log-probs of each micro-batch; a filler yields none, after running its forward."""
    for micro_batch in micro_batches:
        batch = make_batch(micro_batch, split, layout)
        yield ScoredPairs(batch.pair_ids, forward(batch.to(device)))
