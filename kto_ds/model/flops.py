"""Floating-point operations that a step needs, and how fast a device could do them at best: the two sides of MFU.

A multiplication with its addition counts as two operations. Counted are the layers' matrices, causal attention and the head on completion
tokens, but not padding. A backward is two forwards (PaLM, arXiv 2204.02311, appendix B).
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import PretrainedConfig

from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.packing import Unit
from kto_ds.model.policy import Policy

# Dense bfloat16 rates in FLOP/s as NVIDIA's data sheets give them, by words of the device's name; of several that fit, the first.
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H800": 989e12, "H200": 989e12, "H20": 148e12,
    "GB200": 2500e12, "B200": 2250e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "A10": 125e12,
}  # fmt: skip


class ModelShape(NamedTuple):
    """What of a model decides its operations."""

    layer_weights: int  # elements of the matrices of all layers
    windows: tuple[int | None, ...]  # of every layer: keys that a token attends to at most, None for all before it
    attention_width: int  # query heads x head size
    head_weights: int  # vocabulary x hidden size


class Flops(NamedTuple):
    """Operations of one forward."""

    layers: float
    head: float

    @property
    def total(self) -> float:
        return self.layers + self.head


def model_shape(policy: Policy, config: PretrainedConfig) -> ModelShape | None:
    """Return the shape, None for a model that is not made of attention heads or does not mark its layers."""
    layers = policy.decoder_layers
    # As attributes, not as entries: some families have names of their own, which transformers maps.
    heads, hidden_size = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    if not (layers and isinstance(heads, int) and hidden_size):
        return None
    # A partitioned parameter has no shape of its own; DeepSpeed notes it.
    shapes = [vars(parameter).get("ds_shape", parameter.shape) for layer in layers for parameter in layer.parameters()]
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * len(layers)
    return ModelShape(
        layer_weights=sum(int(np.prod(shape)) for shape in shapes if len(shape) == 2),
        windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
        attention_width=heads * (getattr(config, "head_dim", None) or hidden_size // heads),
        head_weights=config.vocab_size * hidden_size,
    )


def forward_flops(shape: ModelShape, units: Sequence[Unit], split: TokenizedSplit) -> Flops:
    """Return what one forward of these units needs; a prompt that several completions of a unit share counts once."""
    tokens = sum(unit.tokens for unit in units)
    completion_tokens = sum(int(split.pair_lengths[pair]) for unit in units for pair in unit.pairs)
    attended = {window: sum(_attended(unit, split, window) for unit in units) for window in set(shape.windows)}
    attention = 4 * shape.attention_width * sum(attended[window] for window in shape.windows)
    return Flops(layers=2 * shape.layer_weights * tokens + attention, head=2 * shape.head_weights * completion_tokens)


def _attended(unit: Unit, split: TokenizedSplit, window: int | None) -> int:
    """Return the sum over the unit's tokens of the positions each attends to, itself included."""
    prompt = int(split.prompt_lengths[unit.prompt])
    ends = [prompt + int(split.pair_lengths[pair]) for pair in unit.pairs]
    return _triangle(prompt, window) + sum(_triangle(end, window) - _triangle(prompt, window) for end in ends)


def _triangle(length: int, window: int | None) -> int:
    """Return the attended positions of a sequence of `length` tokens."""
    full = length if window is None else min(length, window)
    return full * (full + 1) // 2 + (length - full) * full


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Return the device's rate in FLOP/s, None where it is not known: off CUDA, for other devices, and for other dtypes than bfloat16."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    return rate_of(torch.cuda.get_device_name(device))


def rate_of(device_name: str) -> float | None:
    words = set(re.split(r"[\s-]+", device_name))
    return next((rate for model, rate in PEAK_FLOPS.items() if words >= set(model.split())), None)
