"""Where the tokens of a mixture of experts go: sums and load-balancing loss against transformers' own, on its own forward of padded sequences."""

import sys

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from kto_ds.config import OptimConfig
from kto_ds.data.batch import make_batch
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.packing import make_units, pack
from kto_ds.errors import UserError
from kto_ds.model.routers import RouterLoad
from kto_ds.runtime.engine import Engine
from kto_ds.stages.balance import balance_of, expert_shares, part_of_loss
from tests.unit.test_families import config_of, load, plain_model, save_model
from tests.unit.test_policy import random_split, relative

NAMES = ["qwen2_moe", "qwen3_moe", "mixtral", "gpt_oss", "olmoe", "qwen3_next", "qwen3_5_moe"]


def batches_of(split: TokenizedSplit, layout: str, max_tokens: int):
    pairs = torch.arange(split.num_examples).numpy()
    units = make_units(
        pairs, pair_prompts=split.pair_prompts, pair_lengths=split.pair_lengths, prompt_lengths=split.prompt_lengths, layout=layout, max_tokens=max_tokens
    )
    return [make_batch(micro_batch, split, layout) for micro_batch in pack(units, layout=layout, max_tokens=max_tokens)]


def transformers_aux_loss(plain: PreTrainedModel, split: TokenizedSplit) -> Tensor:
    """[], of all matched pairs of the split as one padded batch."""
    [batch] = batches_of(split, "padded", 10_000)
    logits = plain.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, output_router_logits=True).router_logits
    function = vars(sys.modules[type(plain).__module__])["load_balancing_loss_func"]
    return function(tuple(logits), plain.config.num_experts, plain.config.num_experts_per_tok, batch.attention_mask)


def gradients_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("lm."): parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None and parameter.grad.any()}


@pytest.mark.parametrize(("name", "checkpointing"), [(name, True) for name in NAMES] + [("qwen3_moe", False)])
def test_loss_and_gradient_are_those_of_transformers_however_the_step_is_split(name, checkpointing, tmp_path):
    split = random_split(1)
    folder = save_model(name, tmp_path)
    plain = plain_model(folder)
    expected = transformers_aux_loss(plain, split)
    expected.backward()
    expected = expected.detach()
    num_tokens = int((split.prompt_lengths[split.prompt_of] + split.matched_lengths).sum())

    policy, serving = load(folder, gradient_checkpointing=checkpointing)
    for max_tokens in (10_000, 40):
        policy.zero_grad()
        batches = [*batches_of(split, serving.layout, max_tokens), make_batch([], split, serving.layout)]
        with torch.no_grad():
            loads = [policy(batch, with_load=True)[1] for batch in batches]
        load_of_step = RouterLoad(*(sum(parts) for parts in zip(*loads)))
        shares = expert_shares(load_of_step)
        assert balance_of(load_of_step).aux_loss == pytest.approx(float(expected), rel=1e-5)
        parts = []
        for batch in batches:
            logps, load_of_batch = policy(batch, with_load=True)
            parts.append(part_of_loss(shares, load_of_batch, num_tokens))
            (0 * logps.sum() + parts[-1]).backward()
        assert len(parts) == 2 if max_tokens > 40 else len(parts) > 3
        assert float(sum(parts).detach()) == pytest.approx(float(expected), rel=1e-5)
        found, wanted = gradients_of(policy), gradients_of(plain)
        assert found.keys() == wanted.keys() and len(found) > 5
        for parameter, gradient in wanted.items():
            assert relative(found[parameter], gradient) < 1e-4, parameter


def test_experts_without_a_layer_that_has_them_are_refused(tmp_path):
    config = config_of("qwen3_moe")
    config.mlp_only_layers = list(range(config.num_hidden_layers))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="16 experts by its config, but no layer that routes tokens to them"):
        load(tmp_path)


def test_under_zero3_experts_must_lie_in_layers_that_are_gathered_whole(tmp_path):
    policy, _ = load(save_model("mixtral", tmp_path))
    policy.router_meter.routers.append(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="MixtralForCausalLM has experts outside of the layers"):
        Engine(policy, {"zero_optimization": {"stage": 3}}, OptimConfig(), 1)
