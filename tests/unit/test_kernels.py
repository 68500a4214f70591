"""Which kernels a model gets, why not others, and that no other model gets them. Their values need a GPU: tests/gpu/test_kernels_gpu.py."""

import sys
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from kto_ds.errors import UserError
from kto_ds.model.kernels import FAMILIES, choose_kernels, use_liger

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)  # no GPU is touched
INSTALLED = find_spec("liger_kernel") is not None and find_spec("triton") is not None
SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {config.model_type: config(**SMALL) for config in (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config)}


class Homonym(LlamaConfig):
    """A model with code of its own that calls itself a llama."""


def test_torch_is_always_there_and_auto_takes_what_can_run():
    assert choose_kernels("torch", CONFIGS["llama"], CUDA) == choose_kernels("torch", GPT2Config(), CPU) == "torch"
    assert choose_kernels("auto", CONFIGS["llama"], CPU) == choose_kernels("auto", GPT2Config(), CUDA) == choose_kernels("auto", Homonym(), CUDA) == "torch"
    assert CONFIGS.keys() == set(FAMILIES)
    for config in CONFIGS.values():
        assert choose_kernels("auto", config, CUDA) == ("liger" if INSTALLED else "torch")


@pytest.mark.parametrize(
    ("config", "device", "why"),
    [
        (CONFIGS["llama"], CPU, "need a CUDA device, and this is cpu"),
        (GPT2Config(), CUDA, "used with llama, mistral, qwen2, qwen3, not with gpt2"),
        (Homonym(), CUDA, "used with llama, mistral, qwen2, qwen3, not with llama"),
    ],
)
def test_liger_that_is_asked_for_and_cannot_run_is_refused(config, device, why):
    with pytest.raises(UserError, match=why) as refused:
        choose_kernels("liger", config, device)
    assert refused.value.where == "model.kernels" and refused.value.remedy == "set model.kernels: auto"


@pytest.mark.skipif(INSTALLED, reason="liger-kernel is installed")
def test_liger_that_is_asked_for_and_not_installed_is_refused():
    with pytest.raises(UserError, match="liger-kernel is not installed") as refused:
        choose_kernels("liger", CONFIGS["llama"], CUDA)
    assert refused.value.remedy.startswith("pip install liger-kernel")


@pytest.mark.skipif(not INSTALLED, reason="liger-kernel is not installed")
@pytest.mark.parametrize("family", FAMILIES)
def test_one_model_gets_the_kernels_and_no_other_does(family):
    earlier, lm = (AutoModelForCausalLM.from_config(CONFIGS[family]) for _ in range(2))
    module = sys.modules[type(lm).__module__]
    before = dict(vars(module))
    use_liger(lm)
    later = AutoModelForCausalLM.from_config(CONFIGS[family])
    assert vars(module) == before
    layer, plain = lm.model.layers[1], type(earlier.model.layers[1].self_attn).forward.__globals__
    for part in (lm.model.norm, layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
        assert part.forward.__func__.__module__.startswith("liger_kernel."), type(part)
    assert layer.self_attn.forward.__globals__["apply_rotary_pos_emb"].__module__.startswith("liger_kernel.")
    assert plain["apply_rotary_pos_emb"].__module__ == module.__name__
    for other in (earlier, later):
        assert not [part for part in other.modules() if "forward" in vars(part) or type(part).__module__.startswith("liger_kernel.")]
    assert "forward" not in vars(lm)  # its loss would be fused
