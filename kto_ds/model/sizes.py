"""What a model is made of, counted on the meta device: exact to the element, without weights and in seconds for any size."""

import copy
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from kto_ds.config import ModelConfig
from kto_ds.model.lora import add_adapters
from kto_ds.model.placement import FOUR_BIT_BYTES
from kto_ds.model.policy import decoder_layers
from kto_ds.model.support import DTYPES, experts_of_a_token, num_experts


class LayerWidths(NamedTuple):
    """Elements that a decoder layer makes of one token."""

    hidden: int
    query: int  # query heads x head size
    key: int  # key heads x head size; values have as many
    inner: int  # of the MLP, of all experts that a token goes to
    has_query_norm: bool


class ModelSizes(NamedTuple):
    parameters: tuple[int, ...]  # elements of each, in the model's order; a tied one stands once
    trainable: tuple[int, ...]  # of these that take a gradient
    layers: tuple[int, ...]  # elements of each decoder layer
    embedding: int
    head: int
    is_tied: bool
    trains_head: bool  # and the embedding with it
    active: int  # parameters that a token meets: all but the experts it does not go to
    vocab: int
    widths: LayerWidths
    beside: int = 0  # elements that lie whole on every rank beside the parameters

    @property
    def total(self) -> int:
        return sum(self.parameters)

    @property
    def layer(self) -> int:
        return max(self.layers, default=0)

    @property
    def trained_share(self) -> float:
        return sum(self.trainable) / self.total


def without_weights(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return the model on the meta device: all shapes, no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)


def skeleton(model: ModelConfig, config: PretrainedConfig) -> PreTrainedModel:
    """Return the model on the meta device, with its adapters where it gets any."""
    lm = without_weights(config, trust_remote_code=model.trust_remote_code)
    if model.lora is not None:
        add_adapters(lm, model.lora, seed=0)
    return lm


def model_sizes(lm: PreTrainedModel) -> ModelSizes:
    """Count the parameters of a model that has them whole, on whatever device."""
    parameters = list(lm.parameters())  # a tied one once
    embedding, head = (module.weight for module in (lm.get_input_embeddings(), lm.get_output_embeddings() or lm.get_input_embeddings()))
    layers = decoder_layers(lm)
    experts = sum(parameter.numel() for layer in layers for name, parameter in layer.named_parameters() if ".experts." in name)
    config = lm.config.get_text_config()
    idle_share = 1 - experts_of_a_token(config) / num_experts(config) if experts else 0.0
    return ModelSizes(
        parameters=_numels(parameters),
        trainable=trainable_sizes(lm),
        layers=tuple(sum(_numels(layer.parameters())) for layer in layers),
        embedding=embedding.numel(),
        head=head.numel(),
        is_tied=head is embedding,
        trains_head=head.requires_grad,
        active=sum(_numels(parameters)) - round(idle_share * experts),
        vocab=head.shape[0],
        widths=_widths(config, {name for layer in layers[:1] for name, _ in layer.named_parameters()}),
    )


def sizes_in_memory(sizes: ModelSizes, lm: PreTrainedModel, model: ModelConfig) -> ModelSizes:
    """Return the sizes as memory sees them. With model.load_in_4bit: elements of model.dtype that packed matrices take, and beside them their scales and the one that is whole at a time."""
    if not model.load_in_4bit:
        return sizes
    weight_bytes = DTYPES[model.dtype].itemsize
    head = lm.get_output_embeddings()
    matrices = {id(module.weight): module.weight.numel() for module in lm.modules() if type(module) is nn.Linear and module is not head and not module.weight.requires_grad}
    scales = (FOUR_BIT_BYTES - 0.5) * sum(matrices.values())

    def held(parameters: Iterable[nn.Parameter]) -> tuple[int, ...]:
        return tuple(math.ceil(matrices[id(parameter)] / 2 / weight_bytes) if id(parameter) in matrices else parameter.numel() for parameter in parameters)

    return sizes._replace(
        parameters=held(lm.parameters()), layers=tuple(sum(held(layer.parameters())) for layer in decoder_layers(lm)),
        beside=round(scales / weight_bytes) + max(matrices.values(), default=0),
    )  # fmt: skip


def trainable_sizes(lm: PreTrainedModel) -> tuple[int, ...]:
    """Return the elements of every parameter that the optimizer holds states of, in the model's order. Adapters enter here."""
    return _numels(parameter for parameter in lm.parameters() if parameter.requires_grad)


def _numels(parameters) -> tuple[int, ...]:
    return tuple(parameter.numel() for parameter in parameters)


def _widths(config: PretrainedConfig, names: set[str]) -> LayerWidths:
    hidden, heads = _number(config, "hidden_size"), _number(config, "num_attention_heads")
    head_size = _number(config, "head_dim", default=hidden // heads)
    inner = _number(config, "intermediate_size", "ffn_dim", "n_inner", default=4 * hidden)
    if copies := experts_of_a_token(config):
        inner = copies * _number(config, "moe_intermediate_size", default=inner) + _number(config, "shared_expert_intermediate_size", default=0)
    return LayerWidths(hidden, heads * head_size, _number(config, "num_key_value_heads", default=heads) * head_size, inner, any("q_norm" in name for name in names))


def _number(config: PretrainedConfig, *names: str, default: int = 1) -> int:
    """Return the first of these entries that is a number above 0."""
    # As attributes, not as entries: some families have names of their own, which transformers maps.
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), default)
