"""Liger's kernels on a CUDA device against transformers' own, through the whole policy. Skips without one, or without liger-kernel."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from kto_ds.model.checkpointing import checkpoint_layers
from kto_ds.model.kernels import use_liger
from kto_ds.model.logprobs import LogprobHead

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SMALL = {"vocab_size": 1009, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}
CONFIGS = [config(**{key: value for key, value in SMALL.items() if key != "head_dim" or config is not Qwen2Config}) for config in (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config)]
# Of the norm. In bfloat16 two of transformers' own ways of attention differ by 3.3e-2 in the worst gradient of these models, that of a norm of Qwen3's keys.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}


def logps_and_gradients(lm, ids):
    hidden = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
    logps = lm.get_output_embeddings()(hidden, ids[0, 1:])
    logps.sum().backward()
    return {"logps": logps.detach(), **{name: parameter.grad for name, parameter in lm.named_parameters()}}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_liger_gives_the_log_probs_and_gradients_of_torch(config, dtype):
    pytest.importorskip("liger_kernel")
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config, dtype=dtype).cuda().train()
    plain.set_output_embeddings(LogprobHead(plain.get_output_embeddings().weight))
    liger = copy.deepcopy(plain)
    use_liger(liger)
    ids = torch.randint(1009, (1, 517), device="cuda")
    expected, found = logps_and_gradients(plain, ids), logps_and_gradients(liger, ids)
    for name, value in expected.items():
        assert (found[name].float() - value.float()).norm() <= TOLERANCE[dtype] * value.float().norm(), name


@pytest.mark.parametrize("every", [1, 2])
def test_inputs_that_wait_in_host_memory_come_back_unchanged(every):
    """Several micro-batches of different lengths, so that copies of one run beside the layers of the next."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(CONFIGS[0], dtype=torch.bfloat16).cuda().train()
    plain.set_output_embeddings(LogprobHead(plain.get_output_embeddings().weight))
    offloaded = copy.deepcopy(plain)
    checkpoint_layers(plain, every=every, offload=False)
    checkpoint_layers(offloaded, every=every, offload=True)
    for length in (4096, 517, 2048):
        ids = torch.randint(1009, (1, length), device="cuda")
        expected, found = logps_and_gradients(plain, ids), logps_and_gradients(offloaded, ids)
        assert torch.equal(found["logps"], expected["logps"])
        for name, value in expected.items():
            # On CUDA some gradients are added up in an order that changes from run to run, each time rounded to bfloat16.
            assert (found[name].float() - value.float()).norm() <= 2**-8 * value.float().norm(), name


def test_inputs_that_wait_in_host_memory_take_none_of_the_device():
    peaks = []
    for offload in (False, True):
        lm = AutoModelForCausalLM.from_config(LlamaConfig(**{**SMALL, "num_hidden_layers": 24}), dtype=torch.bfloat16).cuda().train()
        lm.set_output_embeddings(LogprobHead(lm.get_output_embeddings().weight))
        checkpoint_layers(lm, every=1, offload=offload)
        logps_and_gradients(lm, torch.randint(1009, (1, 64), device="cuda"))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        logps_and_gradients(lm, torch.randint(1009, (1, 8192), device="cuda"))
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del lm
    inputs = 24 * 8192 * 256 * 2
    assert peaks[0] - peaks[1] > 0.6 * inputs  # a few of them are there at a time
