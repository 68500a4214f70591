"""Log-probs without gradients: what precompute-ref, evaluate and the first phase of a step share."""

from collections.abc import Callable
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
from kto_ds.model.kernels import Kernels, choose_kernels
from kto_ds.model.policy import sum_by_pair
from kto_ds.model.support import DTYPES, SINK_FAMILIES, choose_layout


class ScoredPairs(NamedTuple):
    pairs: np.ndarray  # [S] pair ids
    logps: Tensor  # [S] float32, on the model's device
    token_logps: Tensor | None = None  # [C] float32, of all their tokens, where they were asked for


class Serving(NamedTuple):
    """How a model is run here, decided before its weights are read."""

    layout: Layout
    backend: str
    notice: str
    kernels: Kernels = "torch"

    @property
    def way(self) -> str:
        """All of it but the notice, for a line on the console."""
        return f"{self.layout}, {self.backend}, {self.kernels} kernels"


def choose_serving(model: ModelConfig, config: PretrainedConfig, device: torch.device) -> Serving:
    layout, notice = choose_layout(config, model.layout)
    has_sinks = config.model_type in SINK_FAMILIES
    backend = choose_backend(model.attention, device=device, dtype=DTYPES[model.dtype], has_sinks=has_sinks)
    if has_sinks and not notice:
        notice = f"{config.model_type} has attention sinks: the sdpa kernel, sequence by sequence, serves them"
    return Serving(layout, backend, notice, choose_kernels(model.kernels, config, device))


def score(
    forward: Callable[..., Tensor],  # that of Policy
    micro_batch: MicroBatch,
    split: TokenizedSplit,
    *,
    layout: Layout,
    device: torch.device,
    per_token: bool = False,
) -> ScoredPairs:
    """Return the log-probs of a micro-batch; those of a filler are none, after running its forward. Nothing here waits for the device."""
    return score_batch(forward, make_batch(micro_batch, split, layout).to(device), per_token=per_token)


@torch.no_grad()
def score_batch(forward: Callable[..., Tensor], batch: Batch, *, per_token: bool = False) -> ScoredPairs:
    """Return the log-probs of a micro-batch that lies on the model's device."""
    if not per_token:
        return ScoredPairs(batch.pair_ids, forward(batch))
    token_logps = forward(batch, per_token=True)
    return ScoredPairs(batch.pair_ids, sum_by_pair(token_logps, batch), token_logps if batch.num_pairs else token_logps[:0])
