"""Weights read part by part, against transformers' own from_pretrained: the same bits, in every family, layout of files and dtype."""

import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kto_ds.errors import UserError
from kto_ds.model.stream import Partitioning, missing_weights, plan_sources, read_partitioned
from kto_ds.model.weight_files import WeightFiles, open_weights

SHAPE = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=24, max_position_embeddings=64, pad_token_id=0)
EXPERTS = dict(moe_intermediate_size=12, num_experts=3, num_experts_per_tok=2)
FAMILIES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma2": {},
    "gemma3_text": {},
    "mistral": {},
    "olmo2": {},
    "phi3": {},
    "qwen3_moe": EXPERTS,
    "olmoe": EXPERTS,
    "mixtral": {"num_local_experts": 3},
    "gpt_oss": {"num_local_experts": 3, "layer_types": ["sliding_attention", "full_attention"]},
}


def save_model(folder: Path, family: str, *, file_dtype: torch.dtype, **entries) -> Path:
    """Save a tiny model of random weights in files of 10 kB; norms and biases too are random."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SHAPE, **FAMILIES[family], **entries})
    lm = AutoModelForCausalLM.from_config(config, dtype=file_dtype)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.normal_()
    lm.save_pretrained(folder, max_shard_size="10KB")
    return folder


def files_of(folder: Path) -> WeightFiles:
    return open_weights(folder, sorted(path.name for path in folder.glob("*.safetensors")))


def empty_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)


def part(numel: int, rank: int, num_ranks: int) -> tuple[int, int]:
    size = -(-numel // num_ranks)
    return min(rank * size, numel), min((rank + 1) * size, numel)


def read_by_ranks(folder: Path, dtype: torch.dtype, num_ranks: int) -> tuple[dict[str, torch.Tensor], int]:
    """Return the state put together from what each rank has read, and the bytes that all have read. What a rank did not read is NaN."""
    whole, num_bytes = {}, []
    for rank in range(num_ranks):
        lm = empty_model(folder, dtype)
        files = files_of(folder)._replace(on_read=num_bytes.append)
        sources = plan_sources(lm, files)
        assert missing_weights(lm, sources) == []
        partitioning = Partitioning(dtype, torch.device("cpu"), lambda numel, rank=rank: [part(numel, rank, num_ranks)], lambda parameter: None)
        read_partitioned(lm, sources, files, partitioning)
        for name, tensor in lm.state_dict(keep_vars=True).items():
            flat = whole.setdefault(name, torch.full(tensor.shape, torch.nan, dtype=tensor.dtype)).view(-1)
            start, end = part(tensor.numel(), rank, num_ranks) if isinstance(tensor, nn.Parameter) else (0, tensor.numel())
            flat[start:end] = tensor.detach().reshape(-1)[start:end]
    return whole, sum(num_bytes)


def require_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("file_dtype", [torch.float32, torch.bfloat16], ids=["fp32-files", "bf16-files"])
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_three_ranks_are_what_from_pretrained_reads(tmp_path: Path, family: str, file_dtype: torch.dtype):
    folder = save_model(tmp_path, family, file_dtype=file_dtype)
    assert len(list(folder.glob("*.safetensors"))) > 2
    for dtype in (torch.bfloat16, torch.float32):
        found, num_bytes = read_by_ranks(folder, dtype, num_ranks=3)
        require_equal(found, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict())
        assert num_bytes == files_of(folder).num_bytes, "not every byte is read once over all ranks"


def rewrite(folder: Path, change) -> Path:
    """Put all weights of a model into one file, after `change` has been at them."""
    weights = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    change(weights)
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        path.unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_tied_weight_is_read_by_whichever_name_the_files_have(tmp_path: Path):
    folder = save_model(tmp_path, "qwen2", file_dtype=torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()

    def both(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    def head_only(weights: dict[str, torch.Tensor]) -> None:
        del weights["model.embed_tokens.weight"]

    for change in (both, head_only):
        require_equal(read_by_ranks(rewrite(folder, change), torch.float32, num_ranks=2)[0], expected)


def test_a_tied_weight_that_the_files_have_twice_and_differently_is_refused(tmp_path: Path):
    folder = rewrite(save_model(tmp_path, "qwen2", file_dtype=torch.float32), lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"] + 1}))
    with pytest.raises(UserError, match="lm_head.weight.* are one parameter by the model's config, and differ in its files"):
        read_by_ranks(folder, torch.float32, num_ranks=2)


def test_what_is_missing_or_of_another_shape_is_named(tmp_path: Path):
    def damage(weights: dict[str, torch.Tensor]) -> None:
        del weights["model.layers.1.self_attn.q_proj.weight"]
        weights["model.norm.weight"] = torch.zeros(31)
        weights["model.layers.7.of_no_use"] = torch.zeros(3)

    folder = rewrite(save_model(tmp_path, "llama", file_dtype=torch.float32), damage)
    lm = empty_model(folder, torch.float32)
    assert missing_weights(lm, plan_sources(lm, files_of(folder))) == ["model.layers.1.self_attn.q_proj.weight", "('model.norm.weight', (31,), (32,))"]


def test_a_missing_expert_is_noticed(tmp_path: Path):
    folder = rewrite(save_model(tmp_path, "qwen3_moe", file_dtype=torch.float32), lambda weights: weights.pop("model.layers.0.mlp.experts.1.down_proj.weight"))
    lm = empty_model(folder, torch.float32)
    [problem] = missing_weights(lm, plan_sources(lm, files_of(folder)))
    assert problem == "('model.layers.0.mlp.experts.down_proj', (2, 32, 12), (3, 32, 12))"


@pytest.mark.parametrize("damage", ["cut", "longer", "header"])
def test_a_header_that_does_not_fit_its_file_is_refused_before_any_weight_is_read(tmp_path: Path, damage: str):
    path = rewrite(save_model(tmp_path, "llama", file_dtype=torch.float32), lambda weights: None) / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-1], "longer": content + b"0", "header": b"\xff" * 8 + content[8:]}[damage])
    with pytest.raises(SafetensorError):
        files_of(tmp_path)


def test_a_file_that_becomes_shorter_while_it_is_read_is_an_error(tmp_path: Path):
    folder = save_model(tmp_path, "llama", file_dtype=torch.float32)
    files = files_of(folder)
    for path in folder.glob("*.safetensors"):
        os.truncate(path, 2000)
    lm = empty_model(folder, torch.float32)
    with pytest.raises(OSError, match="shorter"):
        read_partitioned(lm, plan_sources(lm, files), files, Partitioning(torch.float32, torch.device("cpu"), lambda numel: [(0, numel)], lambda parameter: None))
