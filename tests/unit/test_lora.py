"""LoRA against transformers' own forward with peft's own adapters: log-probs, gradients, files, merged weights; and what is refused."""

import json
import sys
from pathlib import Path

import peft
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, Qwen3Config

from kto_ds.cli import read_config
from kto_ds.config import LoraConfig, ModelConfig, RunConfig
from kto_ds.data.batch import make_batch
from kto_ds.data.packing import make_units
from kto_ds.errors import UserError
from kto_ds.model.flops import backward_flops, forward_flops, model_shape
from kto_ds.model.load import load_policy
from kto_ds.model.lora import add_adapters, find_adapter, merge_adapters, require_lora_served, write_adapter
from kto_ds.model.placement import weight_bytes
from kto_ds.model.policy import Policy
from kto_ds.model.support import DTYPES, read_model_config
from kto_ds.runtime.engine import _load_trained, _require_gradient, _trained_state
from kto_ds.stages.identity import reference_model
from kto_ds.stages.resume import FIXED, changes
from tests.unit.test_policy import naive_logps, policy_logps, random_split, relative

VOCAB = 101
SMALL = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {"llama": LlamaConfig(**SMALL, tie_word_embeddings=False), "qwen3_tied": Qwen3Config(**SMALL, head_dim=8, tie_word_embeddings=True)}
EVERY = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
CPU = torch.device("cpu")


def save_model(folder: Path, config: PretrainedConfig) -> ModelConfig:
    """Write a random model and return the section that names it."""
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1) + (parameter.dim() == 1))
    lm.save_pretrained(folder)
    return ModelConfig(path=str(folder), dtype="float32")


def load(model: ModelConfig, *, layout: str = "prefix_shared", checkpointing: bool = False, **named) -> Policy:
    return load_policy(model, read_model_config(model), layout=layout, backend="sdpa", gradient_checkpointing=checkpointing, **named)


def adapters_of(policy: Policy) -> dict[str, torch.nn.Parameter]:
    return {name.removeprefix("lm."): parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}


def draw(adapters: dict[str, torch.nn.Parameter]) -> None:
    """Give all adapters values, as if they had been trained."""
    generator = torch.Generator().manual_seed(5)
    for parameter in adapters.values():
        parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


def plain_peft(folder: Path, lora: LoraConfig, adapters: dict[str, torch.nn.Parameter]) -> peft.PeftModel:
    """The base model in float64 under peft's own wrapper, with the same adapters."""
    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float64)
    targets = "all-linear" if lora.target_modules == ["all-linear"] else lora.target_modules
    config = peft.LoraConfig(r=lora.r, lora_alpha=lora.lora_alpha, use_rslora=lora.use_rslora, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    own = {name.removeprefix("base_model.model."): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert own.keys() == adapters.keys()
    for name, parameter in own.items():
        parameter.data.copy_(adapters[name])
    return model


@pytest.mark.parametrize("name, layout, checkpointing, lora", [
    ("llama", "prefix_shared", True, LoraConfig(r=3)),
    ("llama", "padded", False, LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "layers.1.mlp.down_proj"])),
    ("qwen3_tied", "packed", True, LoraConfig(r=2, target_modules="all-linear")),
])  # fmt: skip
def test_log_probs_and_gradients_are_those_of_peft_on_every_pair_alone(tmp_path, name, layout, checkpointing, lora):
    split, model = random_split(1), save_model(tmp_path, CONFIGS[name]).model_copy(update={"lora": lora})
    policy = load(model, layout=layout, checkpointing=checkpointing)
    adapters = adapters_of(policy)
    draw(adapters)
    plain = plain_peft(tmp_path, lora, adapters)
    weights = torch.linspace(-1, 2, 2 * split.num_examples)
    expected, found = naive_logps(plain, split), policy_logps(policy, split, layout)
    (expected * weights.double()).sum().backward()
    (found * weights).sum().backward()

    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    gradients = {name.removeprefix("base_model.model."): parameter.grad for name, parameter in plain.named_parameters() if parameter.requires_grad}
    assert len(adapters) == (2 * 2 * 7 if lora.target_modules == ["all-linear"] else 2 * (2 + 1))
    for name, parameter in adapters.items():
        assert gradients[name].norm() > 1e-3 and relative(parameter.grad, gradients[name]) < 1e-5, name
    assert not [name for name, parameter in policy.named_parameters() if parameter.grad is not None and not parameter.requires_grad], "a frozen weight got a gradient"


def test_fresh_adapters_are_those_of_peft_and_change_nothing(tmp_path):
    split, base = random_split(1), save_model(tmp_path, CONFIGS["llama"])
    policies = [load(base.model_copy(update={"lora": LoraConfig(r=3)}), seed=seed) for seed in (7, 7, 8)]
    with torch.no_grad():
        assert torch.equal(policy_logps(policies[0], split, "prefix_shared"), policy_logps(load(base), split, "prefix_shared"))
    one, same, other = map(adapters_of, policies)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert all(torch.equal(one[name], other[name]) == ("lora_B" in name) for name in one)
    torch.manual_seed(7)
    own = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path), peft.LoraConfig(r=3, lora_alpha=32, target_modules=EVERY))
    assert all(torch.equal(one[name.removeprefix("base_model.model.")], parameter) for name, parameter in own.named_parameters() if parameter.requires_grad)


def test_an_exported_adapter_is_that_of_peft_and_comes_back(tmp_path):
    split, lora = random_split(1), LoraConfig(r=3, use_rslora=True)
    base = save_model(tmp_path / "base", CONFIGS["qwen3_tied"])
    policy = load(base.model_copy(update={"lora": lora}))
    adapters = adapters_of(policy)
    draw(adapters)
    write_adapter(tmp_path, lora, {**{name: parameter.detach() for name, parameter in adapters.items()}, "model.buffer": torch.zeros(1)}, base=base.path, revision=None)
    with torch.no_grad():
        expected = policy_logps(policy, split, "prefix_shared")
        loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
        assert sorted(loaded.peft_config["default"].target_modules) == EVERY and loaded.peft_config["default"].base_model_name_or_path == base.path
        torch.testing.assert_close(naive_logps(loaded, split), expected, rtol=1e-4, atol=1e-4)
        adapter = find_adapter(str(tmp_path))
        assert adapter == (tmp_path, base.path, None) and find_adapter(base.path) is None
        assert torch.equal(policy_logps(load(base, adapter=adapter.folder), split, "prefix_shared"), expected)


@pytest.mark.parametrize("config", [CONFIGS["llama"], GPT2Config(vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=4)], ids=["linear", "conv1d"])
def test_merged_weights_are_those_that_peft_merges(tmp_path, config):
    save_model(tmp_path, config)
    lora, lm = LoraConfig(r=3, lora_alpha=5), AutoModelForCausalLM.from_pretrained(tmp_path)
    add_adapters(lm, lora, seed=0)
    adapters = {name: parameter for name, parameter in lm.named_parameters() if parameter.requires_grad}
    draw(adapters)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    merge_adapters(merged, lora, adapters)
    expected = plain_peft(tmp_path, lora, adapters).merge_and_unload()
    untouched = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    for (name, found), (_, wanted) in zip(merged.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
        assert torch.equal(found, untouched[name]) == (f"{name.removesuffix('.weight')}.lora_A.default.weight" not in adapters), name


def test_a_frozen_tied_head_is_saved_under_neither_of_its_names():
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(CONFIGS["qwen3_tied"])
    add_adapters(lm, LoraConfig(r=2), seed=0)
    policy = Policy(lm)
    state = _trained_state(policy, exclude_frozen_parameters=True)
    assert state.keys() == {f"lm.{name}" for name in adapters_of(policy)}
    _load_trained({name: torch.ones_like(tensor) for name, tensor in state.items()}, policy)
    assert all(bool((parameter == 1).all()) for parameter in adapters_of(policy).values())
    for changed in ({**state, "lm.other": torch.zeros(1)}, dict(list(state.items())[1:])):
        with pytest.raises(AssertionError, match="another model"):
            _load_trained(changed, policy)


@pytest.mark.parametrize("lora", [None, LoraConfig(r=3)])
def test_operations_of_a_step_are_those_that_torch_counts(tmp_path, lora):
    split, model = random_split(1), save_model(tmp_path, CONFIGS["llama"]).model_copy(update={"lora": lora})
    policy = load(model, layout="packed")
    policy.decoder_layers[0].register_forward_pre_hook(_require_gradient)
    lengths = dict(pair_prompts=split.pair_prompts, pair_lengths=split.pair_lengths, prompt_lengths=split.prompt_lengths)
    units = make_units(torch.arange(split.num_examples).numpy(), layout="packed", max_tokens=1000, **lengths)
    if sum(unit.tokens for unit in units) % 2:  # such a row is filled up, and torch would count what fills it
        units.remove(next(unit for unit in units if unit.tokens % 2))
    batch = make_batch(units, split, "packed")
    assert batch.input_ids.numel() == sum(unit.tokens for unit in units)
    shape = model_shape(policy, policy.lm.config)._replace(windows=())  # attention has no weights, and is the same with adapters
    counts = []
    for run in (lambda: policy(batch).sum(), lambda: logps.backward()):
        with FlopCounterMode(display=False) as counter:
            logps = run() if not counts else (run(), logps)[1]
        counts.append(sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm)))
    forward = forward_flops(shape, units, split)
    # The head computes its logits again, and adds to its weight's gradient in place, which torch does not count.
    assert counts == [forward.total, backward_flops(shape, units, split) + forward.head - (forward.head if lora is None else 0)]
    assert (counts[1] - forward.head < 1.3 * forward.total) == (lora is not None)


def test_the_size_of_4_bit_weights(tmp_path):
    model = save_model(tmp_path, CONFIGS["llama"])
    whole, quantised = (weight_bytes(Path(model.path), ["model.safetensors"], "bfloat16", vocab_size_in_4bit=size) for size in (None, VOCAB))
    matrices = 2 * (2 * 24 * 24 + 2 * 12 * 24 + 3 * 24 * 36)
    assert quantised == int(whole - matrices * (2 - 0.516))


@pytest.mark.parametrize("dtype, tolerance, gradient_tolerance", [("float32", 1e-5, 1e-4), ("bfloat16", 1e-2, 0.2)])
def test_4_bit_weights_are_those_that_bitsandbytes_gives_back(tmp_path, dtype, tolerance, gradient_tolerance):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    split, config = random_split(1), LlamaConfig(**{**SMALL, "hidden_size": 64, "intermediate_size": 128})
    model = save_model(tmp_path, config).model_copy(update={"lora": LoraConfig(r=3), "load_in_4bit": True, "dtype": dtype})
    policy = load(model, checkpointing=True, device=CPU)
    adapters = adapters_of(policy)
    draw(adapters)
    plain = plain_peft(tmp_path, model.lora, adapters)
    quantised = {name: module for name, module in policy.lm.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    for name, module in quantised.items():
        plain.base_model.model.get_submodule(name).weight.data.copy_(bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state))
    expected, found = naive_logps(plain, split), policy_logps(policy, split, "prefix_shared")
    (expected.sum() / 100).backward()
    (found.sum() / 100).backward()
    assert len(quantised) == 2 * 7 and {parameter.dtype for parameter in policy.parameters()} == {DTYPES[dtype]}, "ZeRO-3 wants one dtype"
    assert relative(found.detach(), expected.detach()) < tolerance
    gradients = {name.removeprefix("base_model.model."): parameter.grad for name, parameter in plain.named_parameters() if parameter.requires_grad}
    found_gradient, gradient = (torch.cat([part[name].flatten().double() for name in adapters]) for part in ({name: p.grad for name, p in adapters.items()}, gradients))
    assert relative(found_gradient, gradient) < gradient_tolerance
    shape = model_shape(policy, config)
    assert shape.frozen_layer_weights == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128) and shape.layer_weights - shape.frozen_layer_weights == sum(p.numel() for p in adapters.values())


# config


def test_keys_from_yaml_and_options(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: x\nmodel: {path: m, lora: {r: 4, target_modules: all-linear}}\ndata: {train: [{path: rows.jsonl}]}\n")
    read = lambda *more: read_config("train", ["--config", str(path), *more])[0].model.lora  # noqa: E731
    assert read() == LoraConfig(r=4) and read("--model.lora", "null") is None
    assert read("--model.lora.r", "8", "--model.lora.target_modules", '["q_proj", "v_proj"]') == LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    for more, saying in (
        (("--model.load_in_4bit", "true", "--model.lora", "null"), "model.load_in_4bit: weights of 4 bits take no gradient"), (("--model.lora.r", "0"), "model.lora.r"),
        (("--model.lora.lora_dropout", "0.1"), "model.lora.lora_dropout"), (("--model.lora.rank", "8"), "model.lora.r"),
        (("--model.lora", "true"), "model.lora: expected a section with keys such as r"), (("--model.lora.target_modules", '["q_proj", "all-linear"]'), "stands for every layer"),
    ):  # fmt: skip
        with pytest.raises(UserError) as error:
            read(*more)
        assert saying in str(error.value), str(error.value)


def test_what_a_resume_and_the_reference_make_of_the_keys(tmp_path):
    base = {"output_dir": "x", "data": {"train": [{"path": "rows.jsonl"}]}}
    plain, lora, quantised = (RunConfig.model_validate({**base, "model": {"path": "m", **more}}) for more in ({}, {"lora": {"r": 4}}, {"lora": {"r": 4}, "load_in_4bit": True}))
    found = changes(lora.model_dump(mode="json"), quantised.model_copy(update={"model": quantised.model.model_copy(update={"lora": LoraConfig(r=8)})}).model_dump(mode="json"))
    assert [change.key for change in found] == ["model.lora", "model.load_in_4bit"] and {"model.lora", "model.load_in_4bit"} <= FIXED
    assert reference_model(plain) == reference_model(lora) != reference_model(quantised)
    named = RunConfig.model_validate({**quantised.model_dump(), "reference": {"path": "m"}})
    assert reference_model(named) == reference_model(plain) and quantised.starts_from_reference and not named.starts_from_reference


# refusals


@pytest.mark.parametrize("target, saying", [
    ("lm_head", "'lm_head' names lm_head, which is no linear layer"), ("embed_tokens", "names model.embed_tokens"), ("input_layernorm", "names model.layers.0.input_layernorm"),
    ("self_attn", "names model.layers.0.self_attn"), ("c_attn", "no layer is called 'c_attn'"),
])  # fmt: skip
def test_layers_that_can_have_no_adapter(tmp_path, target, saying):
    model = save_model(tmp_path, CONFIGS["llama"]).model_copy(update={"lora": LoraConfig(target_modules=["q_proj", target])})
    (tmp_path / "model.safetensors").unlink()  # no weight is read
    with pytest.raises(UserError) as error:
        require_lora_served(model, read_model_config(model), CPU)
    assert saying in str(error.value) and "model.lora.target_modules" in str(error.value) and "gate_proj" in str(error.value)


def test_what_is_not_installed_or_not_there(tmp_path, monkeypatch):
    model = save_model(tmp_path, CONFIGS["llama"]).model_copy(update={"lora": LoraConfig()})
    config = read_model_config(model)
    with pytest.raises(UserError, match="need a CUDA device, and this is cpu"):
        require_lora_served(model.model_copy(update={"load_in_4bit": True}), config, CPU)
    require_lora_served(model, config, CPU)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"pip install 'kto-ds\[qlora\]'"):
        require_lora_served(model.model_copy(update={"load_in_4bit": True}), config, torch.device("cuda", 0))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'kto-ds\[lora\]'"):
        require_lora_served(model, config, CPU)


@pytest.mark.parametrize("config, saying", [
    (peft.LoraConfig(target_modules=["q_proj", "lm_head"]), "an adapter on the output head"),
    (peft.LoraConfig(target_modules=["q_proj"], use_dora=True), "more than plain LoRA"),
    (peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "more than plain LoRA"),
    (peft.LoraConfig(target_modules=["embed_tokens"]), "more than plain LoRA"),
    (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "only LoRA is served"),
])  # fmt: skip
def test_adapters_from_elsewhere_that_would_be_lost_in_part(tmp_path, config, saying):
    base = save_model(tmp_path / "base", CONFIGS["llama"])
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base.path), config).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(UserError) as error:
        load(base, adapter=find_adapter(str(tmp_path / "adapter")).folder)
    assert saying in str(error.value) and "merge it" in str(error.value)


def test_a_damaged_adapter_is_named(tmp_path):
    base = save_model(tmp_path / "base", CONFIGS["llama"])
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base.path), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="it is an adapter, not a model"):
        read_model_config(base.model_copy(update={"path": str(tmp_path)}))
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be put on its base model"):
        load(base, adapter=find_adapter(str(tmp_path)).folder)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="pickled weights are not read"):
        find_adapter(str(tmp_path))
    for content in ("{", "[]", json.dumps({"peft_type": "LORA"})):
        (tmp_path / "adapter_config.json").write_text(content)
        with pytest.raises(UserError, match="adapter_config.json: not the config of an adapter"):
            find_adapter(str(tmp_path))
