"""LoRA with Liger's kernels and QLoRA on one CUDA device: kernels, whole runs, files. Skips without a device; QLoRA without bitsandbytes too."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from kto_ds.config import LoraConfig, ModelConfig
from kto_ds.model.load import load_policy
from kto_ds.model.support import read_model_config
from tests.distributed.runs import read_metrics, write_zero
from tests.distributed.tiny_run import NUM_STEPS, config_of, make_tiny_run
from tests.faults.fed import go_back_to
from tests.faults.state import final_state, newest_intact
from tests.gpu.test_resume_gpu import in_one_process

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
NEEDS_4BIT = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")

DEVICE = torch.device("cuda", 0)
SMALL = {"vocab_size": 1009, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}
# Of the norm, over all adapters together.
TOLERANCE = {"float32": 1e-4, "bfloat16": 6e-2}


@pytest.fixture(autouse=True)
def needs_peft():
    pytest.importorskip("peft")


def adapters_of(policy) -> dict[str, torch.nn.Parameter]:
    return {name.removeprefix("lm."): parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}


def load(folder: Path, dtype: str, *, kernels: str, in_4bit: bool = False):
    """A policy with drawn adapters on the device: the same whenever they are drawn."""
    model = ModelConfig(path=str(folder), dtype=dtype, lora=LoraConfig(r=8), load_in_4bit=in_4bit)
    policy = load_policy(model, read_model_config(model), layout="padded", backend="sdpa", kernels=kernels, gradient_checkpointing=True, device=DEVICE)
    generator = torch.Generator().manual_seed(5)
    for parameter in adapters_of(policy).values():
        parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return policy


def logps_and_gradients(policy, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = policy.lm.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
    logps = policy.lm.get_output_embeddings()(hidden, ids[0, 1:])
    logps.sum().backward()
    adapters = adapters_of(policy)
    assert adapters and all(parameter.grad is not None for parameter in adapters.values())
    return logps.detach(), torch.cat([parameter.grad.flatten().float() for parameter in adapters.values()])


def require_close(found: tuple, expected: tuple, tolerance: float) -> None:
    for part, wanted in zip(found, expected):
        assert (part - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("config", [LlamaConfig(**SMALL), Qwen3Config(**SMALL)], ids=lambda config: config.model_type)
def test_liger_below_adapters_gives_the_log_probs_and_gradients_of_torch(tmp_path, config, dtype):
    pytest.importorskip("liger_kernel")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    ids = torch.randint(1009, (1, 517), device=DEVICE)
    require_close(logps_and_gradients(load(tmp_path, dtype, kernels="liger"), ids), logps_and_gradients(load(tmp_path, dtype, kernels="torch"), ids), TOLERANCE[dtype])


@NEEDS_4BIT
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_4_bit_weights_are_those_that_bitsandbytes_gives_back(tmp_path, dtype):
    import bitsandbytes

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    ids = torch.randint(1009, (1, 517), device=DEVICE)
    quantised, plain = load(tmp_path, dtype, kernels="torch", in_4bit=True), load(tmp_path, "float32", kernels="torch")
    layers = {name: module for name, module in quantised.lm.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert len(layers) == 4 * 7
    for name, module in layers.items():
        plain.lm.get_submodule(name).weight.data.copy_(bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state))
    require_close(logps_and_gradients(quantised, ids), logps_and_gradients(plain, ids), TOLERANCE[dtype])


@pytest.fixture(scope="module", params=["lora", pytest.param("qlora", marks=NEEDS_4BIT)])
def run(request, tmp_path_factory) -> Path:
    """A folder with the bfloat16 runs `zero3`, `resumed`, which went on from its step 6, and `zero2`, evaluated and exported."""
    folder = make_tiny_run(tmp_path_factory.mktemp(request.param))
    settings = dict(
        model__dtype="bfloat16", model__lora__r=4, model__load_in_4bit=str(request.param == "qlora").lower(), checkpoint__save_total_limit=NUM_STEPS, optim__learning_rate=1e-2
    )
    options = lambda name, stage, **more: config_of(folder, output_dir=folder / name, deepspeed__config=write_zero(folder, stage), **settings, **more)  # noqa: E731
    output = in_one_process(folder, [["precompute-ref", *options("zero3", 3)], ["train", *options("zero3", 3)], ["train", *options("zero2", 2)]])
    assert output.count("LoRA of rank 4 on") == 2 and ("beside weights of 4 bits" in output) == (request.param == "qlora")
    shutil.copytree(folder / "zero3", folder / "resumed")
    go_back_to(folder / "resumed", 6)
    commands = [
        ["train", *options("resumed", 3)], ["export", *options("zero3", 3)], ["export", "--merge", *options("zero3", 3)],
        ["evaluate", *options("of-adapter", 3, eval__path=folder / "zero3" / "export", reference__placement="sharded")],
        ["evaluate", *options("of-merged", 3, eval__path=folder / "zero3" / "merged")],
    ]  # fmt: skip
    in_one_process(folder, commands)
    return folder


def test_a_run_learns_and_a_resumed_one_ends_like_it(run):
    losses = [record["loss"] for record in read_metrics(run / "zero3")]
    assert len(losses) == NUM_STEPS and losses[0] == pytest.approx(0.5, abs=1e-2) and losses[-1] < losses[0]
    assert [record["loss"] for record in read_metrics(run / "zero2")] == pytest.approx(losses, abs=2e-2)
    assert final_state(run / "resumed") == final_state(run / "zero3")


@pytest.mark.parametrize("name", ["zero3", "zero2"])
def test_only_adapters_are_saved(run, name):
    for path in (newest_intact(run / name) / "state").glob("*model_states.pt"):
        saved = torch.load(path, map_location="cpu", weights_only=False)
        assert saved["module"] and all(".lora_" in key for key in saved["module"]) and not saved["frozen_param_fragments"]


def test_what_is_exported_is_evaluated_as_training_did_last(run):
    last = read_metrics(run / "zero3", "eval")[-1]
    of_adapter, of_merged = (json.loads((run / name / "evaluation.json").read_text())["splits"]["eval"] for name in ("of-adapter", "of-merged"))
    for name in ("logps/chosen", "logps/rejected"):
        assert of_adapter[name] == pytest.approx(last[name], rel=2e-3), name
        assert of_merged[name] == pytest.approx(last[name], rel=2e-2), name  # after QLoRA it is the whole weights that adapters are merged into
    assert len(load_file(run / "zero3" / "export" / "adapter_model.safetensors")) == 2 * 2 * 7
