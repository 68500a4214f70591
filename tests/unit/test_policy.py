"""Policy in every layout against transformers' own forward of each prompt and completion alone, in float64."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, PreTrainedModel, Qwen3Config

from kto_ds.config import ModelConfig
from kto_ds.data.batch import make_batch
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.packing import make_units, pack
from kto_ds.model.attention import register_attention
from kto_ds.model.checkpointing import checkpoint_layers
from kto_ds.model.load import load_policy
from kto_ds.model.policy import Policy, sum_by_pair
from kto_ds.model.support import read_model_config
from tests.unit.splits import make_split

LAYOUTS = ["prefix_shared", "packed", "padded"]
VOCAB = 101
SMALL = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "llama_gqa": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "qwen3_tied": Qwen3Config(**SMALL, head_dim=8, tie_word_embeddings=True),
    "mistral_window": MistralConfig(**SMALL, head_dim=6, sliding_window=5, tie_word_embeddings=False),  # sequences have up to 25 tokens
}


def random_split(seed: int) -> TokenizedSplit:
    """Odd lengths, two or three completions a prompt, completions of one token among them."""
    rng = np.random.default_rng(seed)
    lengths = [[9, 1, 13], [1, 4], [5, 5, 1], [3, 11], [12, 1, 7]]  # of the completions of each prompt
    prompts = [rng.integers(0, VOCAB, size).tolist() for size in (11, 1, 6, 9, 3)]
    rows = [(prompt, rng.integers(0, VOCAB, size).tolist()) for prompt, sizes in zip(prompts, lengths) for size in sizes]
    return make_split(
        [prompt for prompt, _ in rows], [completion for _, completion in rows], desirable=[True] * len(rows),
        max_length=25, kl_group_size=3, max_group_examples=30, shuffle=True, seed=seed,
    )  # fmt: skip


def build(config: PretrainedConfig, layout: str, *, checkpointing: bool = False) -> tuple[Policy, PreTrainedModel]:
    """Return (Policy, the same weights as a plain float64 model with eager attention)."""
    torch.manual_seed(0)
    attention = "sdpa" if layout == "padded" else register_attention("sdpa")
    lm = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention)
    with torch.no_grad():
        for parameter in lm.parameters():  # large enough that attention is not flat
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1) + (parameter.dim() == 1))
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager")
    plain.load_state_dict(lm.state_dict())
    if checkpointing:
        checkpoint_layers(lm, every=1, offload=False)
    return Policy(lm).train(), plain.double()


def naive_logps(plain: PreTrainedModel, split: TokenizedSplit) -> Tensor:
    """[2E], one forward a pair."""
    logps = []
    for pair in range(2 * split.num_examples):
        prompt, completion = (torch.tensor(np.array(part), dtype=torch.int64) for part in (split.prompt(split.pair_prompts[pair]), split.completion(pair)))
        logits = plain(input_ids=torch.cat([prompt, completion])[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        logps.append(torch.log_softmax(logits, dim=-1).gather(1, completion[:, None]).sum())
    return torch.stack(logps)


def policy_logps(policy: Policy, split: TokenizedSplit, layout: str, max_tokens: int = 64) -> Tensor:
    """[2E], in micro-batches of matched and mismatched pairs together."""
    units = make_units(
        np.arange(2 * split.num_examples), pair_prompts=split.pair_prompts, pair_lengths=split.pair_lengths, prompt_lengths=split.prompt_lengths,
        layout=layout, max_tokens=max_tokens,
    )  # fmt: skip
    micro_batches = pack(units, layout=layout, max_tokens=max_tokens)
    assert len(micro_batches) > 2
    batches = [make_batch(micro_batch, split, layout) for micro_batch in micro_batches]
    order = np.argsort(np.concatenate([batch.pair_ids for batch in batches]))
    return torch.cat([policy(batch) for batch in batches])[torch.from_numpy(order)]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_log_probs_and_gradients_are_those_of_every_pair_alone(name, layout, checkpointing):
    split = random_split(1)
    policy, plain = build(CONFIGS[name], layout, checkpointing=checkpointing)
    weights = torch.linspace(-1, 2, 2 * split.num_examples)
    expected, found = naive_logps(plain, split), policy_logps(policy, split, layout)
    (expected * weights.double()).sum().backward()
    (found * weights).sum().backward()

    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    gradients = {name.removeprefix("lm."): parameter.grad for name, parameter in policy.named_parameters()}
    plain_gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in gradients.items():
        assert relative(gradient, plain_gradients[name]) < 1e-5, name


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pair_has_the_same_log_prob_in_every_layout_and_company(name):
    split = random_split(2)
    found = []
    for layout in LAYOUTS:
        policy, _ = build(CONFIGS[name], layout)
        with torch.no_grad():
            found += [policy_logps(policy, split, layout, max_tokens) for max_tokens in (40, 64)]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["prefix_shared", "packed"])
def test_what_fills_a_row_up_changes_neither_log_probs_nor_gradients(layout):
    split, found = random_split(3), []
    units = make_units(
        np.arange(2 * split.num_examples), pair_prompts=split.pair_prompts, pair_lengths=split.pair_lengths, prompt_lengths=split.prompt_lengths,
        layout=layout, max_tokens=64,
    )  # fmt: skip
    units *= 1 + 300 // sum(unit.tokens for unit in units)  # a row beyond 256 tokens has a multiple of 4
    if sum(unit.tokens for unit in units) % 4 == 0:
        units.append(next(unit for unit in units if unit.tokens % 4))
    for micro_batches in ([units], [[unit] for unit in units]):
        batches = [make_batch(micro_batch, split, layout) for micro_batch in micro_batches]
        policy, _ = build(CONFIGS["mistral_window"], layout)
        logps = torch.cat([policy(batch) for batch in batches])
        (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
        found.append((sum(batch.input_ids.numel() for batch in batches), logps, {name: parameter.grad for name, parameter in policy.named_parameters()}))
    (filled, logps, gradients), (tokens, expected, expected_gradients) = found
    assert filled > tokens > 256
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        assert relative(gradient, expected_gradients[name]) < 1e-5, name


@pytest.mark.parametrize("layout", ["prefix_shared", "packed"])
def test_the_window_matters_at_these_lengths(layout):
    # So that the agreement above is not one of two models without a window.
    split = random_split(1)
    logps = []
    for window in (5, None):
        config = MistralConfig(**{**CONFIGS["mistral_window"].to_dict(), "sliding_window": window})
        policy, _ = build(config, layout)
        with torch.no_grad():
            logps.append(policy_logps(policy, split, layout))
    assert (logps[0] - logps[1]).abs().max() > 0.1


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_filler_gives_every_parameter_a_gradient_of_zero(name, layout, checkpointing):
    policy, _ = build(CONFIGS[name], layout, checkpointing=checkpointing)
    logps = policy(make_batch([], random_split(0), layout))
    assert logps.shape == (0,) and logps.dtype == torch.float32
    logps.sum().backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None and torch.equal(parameter.grad, torch.zeros_like(parameter)), name


@pytest.mark.parametrize("name", CONFIGS)
def test_wrapping_keeps_the_names_and_the_tie_of_the_parameters(name):
    policy, plain = build(CONFIGS[name], "packed")
    assert [name for name, _ in policy.lm.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert policy.lm.state_dict().keys() == plain.state_dict().keys()
    tied = policy.lm.get_output_embeddings().weight is policy.lm.get_input_embeddings().weight
    assert tied == CONFIGS[name].tie_word_embeddings


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_policy_read_from_disk_scores_like_the_model_that_was_saved(tmp_path: Path, name, layout):
    split = random_split(3)
    _, plain = build(CONFIGS[name], layout)
    plain.float().save_pretrained(tmp_path / "model")
    model = ModelConfig(path=str(tmp_path / "model"), dtype="float32")
    policy = load_policy(model, read_model_config(model), layout=layout, backend="sdpa", gradient_checkpointing=True, partition_for=None)
    assert policy.training and all(module.p == 0 for module in policy.modules() if isinstance(module, nn.Dropout))
    with torch.no_grad():
        torch.testing.assert_close(policy_logps(policy, split, layout).double(), naive_logps(plain.double(), split), rtol=1e-5, atol=1e-5)


def test_sum_of_a_long_completion_is_rounded_once():
    """Added one after the other in float32, the log-probs of 900 tokens of an untrained model are off by 4e-3 nats."""
    lengths = [900, 1]
    split = make_split([[1], [2]], [[3] * length for length in lengths], desirable=[True, False], max_length=1000, kl_group_size=2, max_group_examples=2, shuffle=False, seed=0)
    units = make_units(np.arange(2), pair_prompts=split.pair_prompts, pair_lengths=split.pair_lengths, prompt_lengths=split.prompt_lengths, layout="packed", max_tokens=1000)
    batch = make_batch(units, split, "packed")
    token_logps = -10.4 + 0.3 * torch.randn(901, generator=torch.Generator().manual_seed(0))
    wanted = [float(tokens.double().sum()) for tokens in token_logps.split(batch.completion_lengths.tolist())]
    assert sum_by_pair(token_logps, batch).tolist() == pytest.approx(wanted, rel=2**-24)
