"""Every family of models that docs/models.md promises, as a tiny random model read from disk the way a run reads it, against transformers' own forward
of each prompt and completion alone."""

from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from kto_ds.config import ModelConfig
from kto_ds.errors import UserError
from kto_ds.model.load import load_policy
from kto_ds.model.policy import Policy
from kto_ds.model.scoring import Serving, choose_serving
from kto_ds.model.support import read_model_config
from tests.unit.test_policy import VOCAB, naive_logps, policy_logps, random_split, relative

SMALL = {
    "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WINDOWED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}  # sequences have up to 25 tokens
EXPERTS = {"num_experts": 16, "num_local_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "router_aux_loss_coef": 0.05}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention"], "partial_rotary_factor": 0.5,
}  # fmt: skip
# name -> (config class, entries besides SMALL, layout that auto chooses)
FAMILIES = {
    "llama": ("LlamaConfig", {}, "prefix_shared"),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}, "prefix_shared"),
    "qwen3": ("Qwen3Config", {}, "prefix_shared"),
    "mistral": ("MistralConfig", {"sliding_window": 5}, "prefix_shared"),
    "gemma": ("GemmaConfig", {}, "prefix_shared"),
    "gemma2": ("Gemma2Config", {**WINDOWED, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}, "padded"),
    "gemma3": ("Gemma3TextConfig", {**WINDOWED, "query_pre_attn_scalar": 8}, "prefix_shared"),
    "olmo": ("OlmoConfig", {"clip_qkv": 0.5}, "prefix_shared"),
    "olmo2": ("Olmo2Config", {}, "prefix_shared"),
    "olmo3": ("Olmo3Config", WINDOWED, "prefix_shared"),
    "granite": ("GraniteConfig", {"logits_scaling": 1.7, "attention_multiplier": 0.3, "embedding_multiplier": 2.0, "residual_multiplier": 0.7}, "prefix_shared"),
    "cohere": ("CohereConfig", {"logit_scale": 0.4}, "prefix_shared"),
    "cohere2": ("Cohere2Config", {**WINDOWED, "logit_scale": 0.4}, "prefix_shared"),
    "qwen2_moe": ("Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 20}, "prefix_shared"),
    "qwen3_moe": ("Qwen3MoeConfig", EXPERTS, "prefix_shared"),
    "mixtral": ("MixtralConfig", {**EXPERTS, "router_jitter_noise": 0.1}, "prefix_shared"),
    "olmoe": ("OlmoeConfig", {**EXPERTS, "head_dim": 6}, "prefix_shared"),
    "gpt_oss": ("GptOssConfig", {**EXPERTS, **WINDOWED, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, "prefix_shared"),
    "qwen3_next": ("Qwen3NextConfig", {**EXPERTS, **LINEAR, "shared_expert_intermediate_size": 20}, "padded"),
    "qwen3_5": ("Qwen3_5TextConfig", LINEAR, "padded"),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", {**EXPERTS, **LINEAR, "shared_expert_intermediate_size": 20}, "padded"),
}  # fmt: skip


def config_of(name: str) -> PretrainedConfig:
    class_name, entries, _ = FAMILIES[name]
    return getattr(transformers, class_name)(**{**SMALL, "tie_word_embeddings": False, **entries})


def save_model(name: str, folder: Path) -> Path:
    """Write a model of the family with weights large enough that attention and routing are not flat."""
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config_of(name))
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1) + (parameter.dim() == 1))
    lm.save_pretrained(folder)
    return folder


def load(folder: Path, **options) -> tuple[Policy, Serving]:
    """Return the policy as training serves it on a CPU, in float32."""
    model = ModelConfig(path=str(folder), dtype="float32", **options)
    config = read_model_config(model)
    serving = choose_serving(model, config, torch.device("cpu"))
    return load_policy(model, config, layout=serving.layout, backend=serving.backend, gradient_checkpointing=model.gradient_checkpointing), serving


def plain_model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager").double()


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probs_and_gradients_are_those_of_transformers(name, tmp_path):
    split = random_split(1)
    policy, serving = load(save_model(name, tmp_path))
    plain = plain_model(tmp_path)
    assert serving.layout == FAMILIES[name][2]
    weights = torch.linspace(-1, 2, 2 * split.num_examples)
    expected, found = naive_logps(plain, split), policy_logps(policy, split, serving.layout)
    (expected * weights.double()).sum().backward()
    (found * weights).sum().backward()

    # Linear attention is float32 in the oracle too.
    rounding = 2e-4 if "linear_attention" in FAMILIES[name][1].get("layer_types", []) else 1e-5
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=2 * rounding)
    gradients = {name.removeprefix("lm."): parameter.grad for name, parameter in policy.named_parameters()}
    plain_gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in gradients.items():
        assert relative(gradient, plain_gradients[name]) < 3 * rounding, name


def test_of_a_model_that_also_sees_the_language_model_is_read(tmp_path):
    torch.manual_seed(0)
    vision = transformers.Qwen3_5VisionConfig(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=24, num_position_embeddings=16)
    whole = transformers.Qwen3_5ForConditionalGeneration(transformers.Qwen3_5Config(text_config=config_of("qwen3_5").to_dict(), vision_config=vision.to_dict()))
    whole.save_pretrained(tmp_path)
    split = random_split(1)
    policy, serving = load(tmp_path)
    assert (policy.lm.config.model_type, serving.layout) == ("qwen3_5_text", "padded")
    with torch.no_grad():
        torch.testing.assert_close(policy_logps(policy, split, "padded").double(), naive_logps(whole.double(), split), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_attention_sinks_in_the_other_layouts(layout, tmp_path):
    split = random_split(1)
    policy, _ = load(save_model("gpt_oss", tmp_path), layout=layout)
    with torch.no_grad():
        torch.testing.assert_close(policy_logps(policy, split, layout).double(), naive_logps(plain_model(tmp_path), split), rtol=1e-5, atol=2e-5)


def test_flash_kernels_are_refused_where_there_are_sinks(tmp_path):
    config_of("gpt_oss").save_pretrained(tmp_path)
    model = ModelConfig(path=str(tmp_path))
    config = read_model_config(model)
    serving = choose_serving(model, config, torch.device("cuda", 0))  # which only decides
    assert serving.backend == "sdpa" and "attention sinks" in serving.notice
    with pytest.raises(UserError, match="cannot run here on cuda in torch.bfloat16 for a model with attention sinks; usable: sdpa"):
        choose_serving(ModelConfig(path=str(tmp_path), attention="torch_varlen"), config, torch.device("cuda", 0))
