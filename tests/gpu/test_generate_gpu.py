"""Generation on a CUDA device: a token at a time, from keys and values that are kept, gives the logits of a whole forward, with every kernel."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, Qwen3Config

from kto_ds.data.continuation import continuation_batch
from kto_ds.errors import UserError
from kto_ds.model.attention import Memory, choose_backend, register_attention
from kto_ds.model.policy import Policy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SMALL = {"vocab_size": 1009, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}


@pytest.mark.parametrize("backend", ["flash_attention_2", "torch_varlen", "sdpa"])
@pytest.mark.parametrize("config", [Qwen3Config(**SMALL), MistralConfig(**SMALL, sliding_window=9)], ids=lambda config: config.model_type)
@torch.no_grad()
def test_a_token_at_a_time_is_a_whole_forward(config, backend):
    device = torch.device("cuda")
    try:
        choose_backend(backend, device=device, dtype=torch.bfloat16)
    except UserError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    policy = Policy(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=register_attention(backend)).to(device))
    rng = np.random.default_rng(0)
    prompts, tokens = [rng.integers(1009, size=length) for length in (33, 1, 12)], rng.integers(1009, size=(3, 6))
    memory = Memory()
    for done in range(tokens.shape[1]):
        found = policy(continuation_batch(prompts, tokens[:, :done], "packed").to(device), memory=memory)
        whole = [np.concatenate([prompt, own[:done]]) for prompt, own in zip(prompts, tokens)]
        expected = policy(continuation_batch(whole, tokens[:, :0], "packed").to(device), memory=Memory())
        assert (found - expected).norm() <= 2e-2 * expected.norm(), done
