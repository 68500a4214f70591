"""Models that two ranks of ZeRO-3 read together: the same weights as from_pretrained reads, in little memory, every byte once."""

import json
import os
from pathlib import Path

import pytest
import torch

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.distributed import loading, ranks
from tests.unit.test_stream import rewrite, save_model

pytestmark = pytest.mark.distributed

GATHERS_ALL, SECONDARY, ON_HOST = {"stage3_param_persistence_threshold": 0}, {"zero_hpz_partition_size": 2}, {"offload_param": {"device": "cpu"}}


def test_two_ranks_hold_what_from_pretrained_reads(tmp_path: Path):
    cases = [
        (save_model(tmp_path / family, family, file_dtype=file_dtype), dtype, zero)
        for family, file_dtype, dtype, zero in [
            ("llama", torch.float32, "float32", GATHERS_ALL),
            ("qwen2", torch.float32, "bfloat16", {}),
            ("qwen3", torch.bfloat16, "bfloat16", SECONDARY),
            ("gemma3_text", torch.bfloat16, "float32", ON_HOST),
            ("qwen3_moe", torch.bfloat16, "bfloat16", GATHERS_ALL),
        ]
    ]
    command = json.dumps([(str(folder), dtype, zero) for folder, dtype, zero in cases])
    output = ranks.require_success([command], log=tmp_path / "log", program=loading.compare_with_from_pretrained)
    assert output.count(" GB/s\n") == len(cases) and "notice" not in output


def test_damaged_files_are_refused_on_all_ranks(tmp_path: Path):
    def one_file(name: str, change) -> Path:
        return rewrite(save_model(tmp_path / name, "llama", file_dtype=torch.float32), change)

    cut = one_file("cut", lambda weights: None) / "model.safetensors"
    os.truncate(cut, cut.stat().st_size - 1)
    absent = save_model(tmp_path / "absent", "llama", file_dtype=torch.float32)
    next(absent.glob("*-00002-of-*")).unlink()
    cases = {
        cut.parent: "cannot load .*cut: .*incomplete metadata",
        absent: "1 of . weight files are not in .*absent",
        one_file("lacking", lambda weights: weights.pop("model.norm.weight")): "1 weights are missing from .*lacking or have another shape, the first: model.norm.weight",
        one_file("shape", lambda weights: weights.update({"model.norm.weight": torch.zeros(3)})): r"1 weights are missing .* the first: \('model.norm.weight', \(3,\), \(32,\)\)",
    }
    output = ranks.require_success([json.dumps([(str(folder), text) for folder, text in cases.items()])], log=tmp_path / "log", program=loading.refuse)
    assert "GB/s" not in output


SHARD = 100_000_000  # bytes


def save_big_model(folder: Path) -> int:
    """Save 1.5 GB of bfloat16 weights in files of SHARD bytes, one tensor being larger; return the bytes."""
    shape = dict(vocab_size=32000, hidden_size=2048, intermediate_size=5504, num_hidden_layers=12, num_attention_heads=16, num_key_value_heads=16)
    config = LlamaConfig(**shape, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    state = shapes_of(config)
    split = split_torch_state_dict_into_shards(state, max_shard_size=SHARD)
    noise = torch.randn(1_000_000).bfloat16().repeat(70)
    for number, (name, keys) in enumerate(split.filename_to_tensors.items()):
        save_file({key: noise[number : number + state[key].numel()].clone().view(state[key].shape) for key in keys}, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": split.metadata, "weight_map": split.tensor_to_filename}))
    return sum(tensor.nbytes for tensor in state.values())


def shapes_of(config: LlamaConfig) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()


def run_for_long(program, command: list, log: Path, num_ranks: int) -> None:
    with ranks.Ranks([json.dumps(command)], log=log, num_ranks=num_ranks, program=program) as started:
        assert started.wait(ranks.COMMANDS_SECONDS) == [0] * num_ranks, started.output()[-4000:]


@pytest.mark.slow
def test_a_rank_needs_little_beside_its_partition_and_reads_it_once(tmp_path: Path):
    """The bound: two files of the model, which is 16 files large, above the partition. Peaks are the kernel's (VmHWM), mapped files included."""
    size = save_big_model(tmp_path / "model")
    run_for_long(loading.measure, [str(tmp_path / "model"), "bfloat16", "streamed", str(tmp_path / "rank")], tmp_path / "log", num_ranks=2)
    measured = [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(2)]
    for figures in measured:
        assert abs(figures["partition"] - size / 2) < 0.01 * size
        assert figures["peak"] - figures["partition"] < 2 * SHARD, measured
    assert sum(figures["read"] for figures in measured) < 1.02 * size


def save_big_checkpoint(folder: Path, config: LlamaConfig, num_ranks: int) -> dict[str, torch.Tensor]:
    """Write what export reads of a ZeRO-3 checkpoint, as DeepSpeed lays it out, of random float32 weights; return them in bfloat16."""
    shapes, noise, parts, weights = shapes_of(config), torch.randn(1_000_003).repeat(10), [[] for _ in range(num_ranks)], {}
    for number, (name, tensor) in enumerate(shapes.items()):
        whole = noise[number : number + tensor.numel()]
        weights[name] = whole.view(tensor.shape).bfloat16()
        size = -(-tensor.numel() // num_ranks)
        for rank, part in enumerate(parts):
            part.append(torch.nn.functional.pad(whole[rank * size : (rank + 1) * size], (0, max(0, (rank + 1) * size - tensor.numel()))))
    (folder / "state").mkdir(parents=True)
    model = {"module": {}, "buffer_names": [], "param_shapes": [{f"lm.{name}": tensor.shape for name, tensor in shapes.items()}], "shared_params": {}, "ds_version": "0.19.8"}
    for rank, part in enumerate(parts):
        torch.save(model, folder / "state" / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        optimizer = {"zero_stage": 3, "partition_count": num_ranks, "fp32_flat_groups": [torch.cat(part)]}
        torch.save({"optimizer_state_dict": optimizer}, folder / "state" / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return weights


@pytest.mark.slow
def test_export_holds_a_file_a_layer_and_its_largest_tensor(tmp_path: Path):
    """The checkpoint is 470 MB, the export 240 MB in files of 50 MB. A tensor is in float32 while it is put together and looked at. Pages of the mapped checkpoint do not count: the system takes them back when it likes."""
    config = LlamaConfig(vocab_size=8000, hidden_size=1024, intermediate_size=2752, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path / "config")
    weights = save_big_checkpoint(tmp_path / "checkpoint", config, num_ranks=2)
    shard = 50_000_000
    run_for_long(loading.measure_export, [str(tmp_path / "config"), str(tmp_path / "checkpoint"), "by layer", shard, str(tmp_path / "out")], tmp_path / "log", num_ranks=1)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    found = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert len(files) > 4 and found.keys() == weights.keys() and all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    layer = 2 * (4 * 1024 * 1024 + 3 * 1024 * 2752)  # bytes, in bfloat16
    assert json.loads((tmp_path / "out.json").read_text())["anonymous"] < shard + layer + 2 * 4 * 8000 * 1024
