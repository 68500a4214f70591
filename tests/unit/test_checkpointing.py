"""Checkpointed layers: the same gradients to the bit, less kept, and with offload nothing but the layers' inputs in host memory."""

import gc
import itertools
import weakref

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, CTRLConfig, LlamaConfig, PreTrainedModel

from kto_ds.config import ModelConfig
from kto_ds.errors import UserError
from kto_ds.model.checkpointing import Waiting, checkpoint_layers

LAYERS, TOKENS, HIDDEN = 4, 13, 24
CONFIG = LlamaConfig(vocab_size=61, hidden_size=HIDDEN, intermediate_size=36, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
EVERY = {1: [0, 1, 2, 3], 2: [0, 2], 3: [0, 3], 5: [0]}  # which layers are checkpointed
WAYS = [(every, offload) for every in EVERY for offload in (False, True)]


def build(every: int | None = None, offload: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(CONFIG).train()
    if every:
        checkpoint_layers(lm, every=every, offload=offload)
    return lm


def forward(lm: PreTrainedModel) -> Tensor:
    return lm(torch.arange(TOKENS)[None]).logits.square().mean()


def gradients(lm: PreTrainedModel) -> dict[str, Tensor]:
    forward(lm).backward()
    return {name: parameter.grad for name, parameter in lm.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(("every", "offload"), WAYS)
def test_gradients_are_the_same_to_the_bit(every, offload):
    expected, found = gradients(build()), gradients(build(every, offload))
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("offload", [False, True])
def test_several_graphs_at_once_and_a_second_backward(offload):
    expected = gradients(build())
    lm = build(2, offload)
    first, dropped, second = forward(lm), forward(lm), forward(lm)
    del dropped
    first.backward(retain_graph=True), first.backward(), second.backward()
    for name, parameter in lm.named_parameters():
        torch.testing.assert_close(parameter.grad, 3 * expected[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("offload", [False, True])
def test_frozen_embeddings_do_not_cut_the_gradient_off(offload):
    # As with adapters: no input of the first layer requires a gradient.
    found = []
    for lm in (build(), build(1, offload)):
        lm.requires_grad_(False)
        lm.model.layers[0].self_attn.q_proj.requires_grad_(True)
        found.append(gradients(lm))
    assert found[0].keys() == found[1].keys() == {"model.layers.0.self_attn.q_proj.weight"}
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def kept_bytes(lm: PreTrainedModel) -> int:
    """Bytes that a forward keeps on the device for backward, weights apart, every memory once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in lm.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # held, so that no other tensor gets its place
        return tensor.detach()  # the tensor itself would hold its graph, and the graph the tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(lm)
    return sum(storage.nbytes() for place, storage in kept.items() if place not in weights)


def test_what_is_kept_falls_with_every_layer_that_is_checkpointed():
    inputs = TOKENS * HIDDEN * 4  # bytes of one layer's
    angles = 2 * TOKENS * HIDDEN // 4 * 4  # of the rotary embedding, which all layers share
    without = kept_bytes(build())
    saving = {every: without - kept_bytes(build(every)) for every in EVERY}
    assert saving[1] > 0.75 * without  # the rest is the last norm and the head of a tiny model
    for every, layers in EVERY.items():
        assert saving[every] == len(layers) * saving[5] + angles * (len(layers) == LAYERS), f"every {every}"
        # The input of a layer that runs as ever is kept by its norm; that of a checkpointed one goes to the host.
        assert without - kept_bytes(build(every, offload=True)) == saving[every] + len(layers) * inputs, f"every {every}, offload"


def waiting() -> list[Waiting]:
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) is Waiting]


@pytest.mark.parametrize(("every", "offload"), [(1, False), (1, True), (3, True)])
def test_with_offload_the_inputs_leave_and_nothing_else_does(every, offload):
    lm, inputs = build(every, offload), {}
    for number, layer in enumerate(lm.model.layers):
        layer.register_forward_pre_hook(lambda module, args, number=number: inputs.update({number: (weakref.ref(args[0]), args[0].detach().clone())}))
    loss = forward(lm)
    gone = [number for number, (there, _) in inputs.items() if there() is None]
    copies = [thing.host for thing in waiting()]
    if not offload:
        assert gone == [] and copies == []
        return
    assert gone == EVERY[every] and len(copies) == len(gone)
    assert all(any(torch.equal(copy, inputs[number][1]) for copy in copies) for number in gone)
    loss.backward()
    del loss, copies
    assert waiting() == []


def test_nothing_waits_without_gradients_or_when_a_graph_is_dropped():
    lm = build(1, offload=True)
    with torch.no_grad():
        loss = forward(lm)
    assert waiting() == [] and not loss.requires_grad
    loss = forward(lm)
    assert len(waiting()) == LAYERS
    del loss
    assert waiting() == []


def test_a_model_without_such_layers_is_refused():
    lm = AutoModelForCausalLM.from_config(CTRLConfig(vocab_size=7, n_positions=4, n_embd=4, dff=4, n_layer=1, n_head=1))
    with pytest.raises(UserError, match="CTRLLMHeadModel has no layers that can be checkpointed"):
        checkpoint_layers(lm, every=1, offload=False)


@pytest.mark.parametrize(("key", "value"), [("gradient_checkpointing_every", 2), ("gradient_checkpointing_offload", True)])
def test_settings_of_what_is_switched_off_are_refused(key, value):
    with pytest.raises(ValidationError, match=rf"{key}(.|\n)*no layer is checkpointed with gradient_checkpointing: false"):
        ModelConfig(path="m", gradient_checkpointing=False, **{key: value})
    for checkpointing, setting in itertools.product([True, False], [value, ModelConfig.model_fields[key].default]):
        if checkpointing or setting != value:
            assert ModelConfig(path="m", gradient_checkpointing=checkpointing, **{key: setting}).gradient_checkpointing == checkpointing
