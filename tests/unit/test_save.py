"""Models written layer by layer, against transformers' own save_pretrained: the same files, or, where it stacks experts, the same tensors under the same names."""

import errno
import json
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kto_ds.model.save import plan_files, write_model
from tests.unit.test_stream import FAMILIES, SHAPE

STACKED = {"qwen3_moe", "olmoe", "mixtral"}  # transformers puts all experts of a layer into one file, as views of one tensor


def models(family: str, **entries) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return a tiny model of random weights, and the same without memory."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SHAPE, **FAMILIES[family], **entries})
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.normal_()
    with torch.device("meta"):
        return lm, AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def write_by_layers(lm: PreTrainedModel, empty: PreTrainedModel, folder: Path, max_shard_size: str) -> list[list[str]]:
    """Write a model and return what was asked for, in turn."""
    asked, state = [], lm.state_dict()
    written = []

    def read(names: list[str]) -> dict[str, Tensor]:
        asked.append(names)
        return {name: state[name].clone() for name in names}

    folder.mkdir()
    layout = plan_files(empty, max_shard_size)
    write_model(empty, folder, read, layout=layout, on_written=written.append)
    assert sum(written) == layout.num_bytes and len(written) == len(layout.files)
    return asked


def all_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("max_shard_size", ["10KB", "5GB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_files_are_those_of_save_pretrained(tmp_path: Path, family: str, max_shard_size: str):
    lm, empty = models(family)
    lm.save_pretrained(tmp_path / "expected", max_shard_size=max_shard_size)
    asked = write_by_layers(lm, empty, tmp_path / "found", max_shard_size)
    found, expected = all_tensors(tmp_path / "found"), all_tensors(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    if family not in STACKED or max_shard_size == "5GB":
        files = {path.name: path.read_bytes() for path in (tmp_path / "expected").iterdir()}
        assert {path.name: path.read_bytes() for path in (tmp_path / "found").iterdir()} == files
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "found").state_dict()
    assert all(torch.equal(reloaded[name], tensor) for name, tensor in lm.state_dict().items())
    names = [name for layer in asked for name in layer]
    assert len(names) == len(set(names)), "a weight was read twice"
    assert all(len({name.split("layers.")[1].split(".")[0] for name in layer if "layers." in name}) <= 1 for layer in asked), "more than a layer was read at once"


def test_experts_are_spread_over_files_of_the_size_asked_for(tmp_path: Path):
    lm, empty = models("qwen3_moe", num_experts=64)
    write_by_layers(lm, empty, tmp_path / "found", "40KB")
    sizes = [path.stat().st_size for path in (tmp_path / "found").glob("*.safetensors")]
    assert len(sizes) > 5 and max(sizes) < 50_000  # 40 kB and the header
    index = json.loads((tmp_path / "found" / "model.safetensors.index.json").read_text())
    assert "model.layers.1.mlp.experts.63.up_proj.weight" in index["weight_map"]


def test_a_limit_on_the_size_of_files_is_an_error_of_the_system(tmp_path: Path):
    """As a full disk is: safetensors has an error of its own for both."""
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError) as error:
            write_by_layers(*models("llama"), tmp_path / "found", "5GB")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.errno == errno.EFBIG and error.value.filename == str(tmp_path / "found" / "model.safetensors")
