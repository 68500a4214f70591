"""Floating-point operations that a step needs, and how fast a device could do them at best: the two sides of MFU.

A multiplication with its addition counts as two operations. Counted are the layers' matrices, causal attention and the head on completion
tokens, but not padding, nor the state of linear attention. A backward is two forwards (PaLM, arXiv 2204.02311, appendix B), less one product for
each matrix that is frozen.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.packing import Unit
from kto_ds.model.policy import Policy
from kto_ds.model.support import ATTENTION_LAYERS, experts_of_a_token

# Dense bfloat16 rates in FLOP/s as NVIDIA's data sheets give them, by words of the device's name; of several that fit, the first.
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H800": 989e12, "H200": 989e12, "H20": 148e12,
    "GB200": 2500e12, "B200": 2250e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "A10": 125e12,
}  # fmt: skip


class ModelShape(NamedTuple):
    """What of a model decides its operations."""

    layer_weights: int  # elements of the matrices of all layers that one token meets
    windows: tuple[int | None, ...]  # of every layer with attention: keys that a token attends to at most, None for all before it
    attention_width: int  # query heads x head size
    head_weights: int  # vocabulary x hidden size
    frozen_layer_weights: int = 0  # those of layer_weights that are not trained
    frozen_head_weights: int = 0


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
    experts = experts_of_a_token(config)
    matrices = [(_elements_met(name, parameter, experts), parameter.requires_grad) for layer in layers for name, parameter in layer.named_parameters()]
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * len(layers)
    return ModelShape(
        layer_weights=sum(numel for numel, _ in matrices),
        windows=tuple(window if kind == "sliding_attention" else None for kind in kinds if kind in ATTENTION_LAYERS),
        attention_width=heads * (getattr(config, "head_dim", None) or hidden_size // heads),
        head_weights=config.vocab_size * hidden_size,
        frozen_layer_weights=sum(numel for numel, is_trained in matrices if not is_trained),
        frozen_head_weights=0 if policy.lm.get_output_embeddings().weight.requires_grad else config.vocab_size * hidden_size,
    )


def _elements_met(name: str, parameter: Tensor, experts_met: int) -> int:
    """Return how many elements of a matrix one token is multiplied with; the matrices of all experts are one tensor, and a token meets `experts_met` of them."""
    shape = _shape(parameter)
    if "experts" in name.split("."):
        return math.prod(shape) // shape[0] * experts_met if len(shape) == 3 else 0
    return math.prod(shape) if len(shape) == 2 else 0


def _shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    # Of a partitioned parameter DeepSpeed notes the shape, of a 4-bit one bitsandbytes.
    own = vars(parameter)
    return own["quant_state"].shape if own.get("quant_state") is not None else own.get("ds_shape", parameter.shape)


def forward_flops(shape: ModelShape, units: Sequence[Unit], split: TokenizedSplit) -> Flops:
    """Return what one forward of these units needs; a prompt that several completions of a unit share counts once."""
    tokens = sum(unit.tokens for unit in units)
    completion_tokens = sum(int(split.pair_lengths[pair]) for unit in units for pair in unit.pairs)
    attended = {window: sum(_attended(unit, split, window) for unit in units) for window in set(shape.windows)}
    attention = 4 * shape.attention_width * sum(attended[window] for window in shape.windows)
    return Flops(layers=2 * shape.layer_weights * tokens + attention, head=2 * shape.head_weights * completion_tokens)


def backward_flops(shape: ModelShape, units: Sequence[Unit], split: TokenizedSplit) -> float:
    """Return what one backward of these units needs: the gradient of every input, and of every weight that is trained."""
    frozen = ModelShape(shape.frozen_layer_weights, windows=(), attention_width=0, head_weights=shape.frozen_head_weights)
    return 2 * forward_flops(shape, units, split).total - forward_flops(frozen, units, split).total


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
