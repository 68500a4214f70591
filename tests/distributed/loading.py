"""What ranks do in test_loading.py: each function is the program of a rank, and is given a JSON text."""

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import deepspeed
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kto_ds.config import ModelConfig
from kto_ds.errors import UserError
from kto_ds.model import load as load_module
from kto_ds.model.load import load_policy
from kto_ds.model.policy import Policy
from kto_ds.model.save import plan_files, write_model
from kto_ds.runtime.collectives import barrier, start, stop
from kto_ds.runtime.deepspeed_config import reading_config
from kto_ds.runtime.restore import Checkpoint, read_weights


def load(folder: str, dtype: str, zero: dict) -> Policy:
    config = reading_config({"zero_optimization": {"stage": 3, **zero}}, dtype=dtype)
    model = ModelConfig(path=folder, dtype=dtype)
    return load_policy(model, AutoConfig.from_pretrained(folder), layout="padded", backend="sdpa", gradient_checkpointing=False, partition_for=config)


def compare_with_from_pretrained(command: list[str]) -> None:
    """Load every model of a list of (folder, dtype, ZeRO section), partitioned, and compare each parameter and buffer with what transformers reads by itself."""
    world = start(timeout_seconds=100)
    for folder, dtype, zero in json.loads(command[0]):
        lm = load(folder, dtype, zero).lm
        assert all(parameter.numel() == 0 for parameter in lm.parameters())
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        parameters = dict(lm.named_parameters(remove_duplicate=False))
        assert parameters.keys() == dict(expected.named_parameters(remove_duplicate=False)).keys()
        assert len({id(parameter) for parameter in parameters.values()}) == len(list(expected.parameters())), "tied here and not there"
        for name, other in expected.named_parameters(remove_duplicate=False):
            with deepspeed.zero.GatheredParameters([parameters[name]]):
                assert parameters[name].dtype == other.dtype and torch.equal(parameters[name], other), (folder, name)
                assert parameters[name].requires_grad
            if (second := parameters[name].ds_secondary_tensor) is not None:  # ZeRO++: gathered within a node
                begin = world.rank * len(second)
                assert torch.equal(second[: other.numel() - begin], other.flatten()[begin : begin + len(second)]), (folder, name)
        buffers = dict(lm.named_buffers())
        assert buffers.keys() == dict(expected.named_buffers()).keys()
        for name, other in expected.named_buffers():
            assert buffers[name].dtype == other.dtype and torch.equal(buffers[name], other), (folder, name)
    stop()


def refuse(command: list[str]) -> None:
    """Try to load every model of a list of (folder, text), each of which must be refused with this text."""
    start(timeout_seconds=100)
    for folder, text in json.loads(command[0]):
        with pytest.raises(UserError, match=text):
            load(folder, "float32", {})
    stop()


def measure(command: list[str]) -> None:
    """Load a model, streamed or by transformers (`way`), and write down what the kernel says of it, in bytes, to `<results><rank>`."""
    folder, dtype, way, results = json.loads(command[0])
    world = start(timeout_seconds=500)
    config = reading_config({"zero_optimization": {"stage": 3}}, dtype=dtype)
    model, model_config = ModelConfig(path=folder, dtype=dtype), AutoConfig.from_pretrained(folder)
    barrier()
    before, read_before = memory(), bytes_read()
    with peak_of_anonymous_memory() as anonymous:
        if way == "streamed":
            lm = load_module._stream(model, model_config, "sdpa", config, lambda: None)
        else:
            lm = load_module._from_pretrained(model, model_config, "sdpa", config, None)
    after, read = memory(), bytes_read() - read_before
    partition = sum(parameter.ds_tensor.nbytes for parameter in lm.parameters())
    figures = {"partition": partition, "peak": after["VmHWM"] - before["VmRSS"], "anonymous": anonymous[0] - before["RssAnon"], "read": read}
    Path(f"{results}{world.rank}").write_text(json.dumps(figures))
    barrier()
    stop()


def measure_export(command: list[str]) -> None:
    """Export a checkpoint of ZeRO-3, layer by layer or whole as save_pretrained does (`way`), and write down the peak of memory that is no file's."""
    config_folder, checkpoint, way, shard_bytes, out = json.loads(command[0])
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config_folder), dtype=torch.bfloat16)
    before = memory()
    with peak_of_anonymous_memory() as anonymous:
        weights = read_weights(Checkpoint(Path(checkpoint), {"zero": {"stage": 3}}))
        read = lambda names: {name: weights[f"lm.{name}"].contiguous().bfloat16() for name in names}  # noqa: E731
        if way == "by layer":
            Path(out).mkdir()
            write_model(lm, Path(out), read, layout=plan_files(lm, shard_bytes), on_written=lambda num_bytes: None)
        else:
            lm.load_state_dict(read([name for name, _ in lm.named_parameters()]), assign=True)
            lm.save_pretrained(out, max_shard_size=shard_bytes)
    Path(f"{out}.json").write_text(json.dumps({"anonymous": anonymous[0] - before["RssAnon"]}))


def memory() -> dict[str, int]:
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {words[0].rstrip(":"): int(words[1]) << 10 for words in lines if words[-1] == "kB"}


def bytes_read() -> int:
    """What this process has asked read calls for; pages of mapped files are not among it."""
    return int(Path("/proc/self/io").read_text().split()[1])


@contextlib.contextmanager
def peak_of_anonymous_memory() -> Iterator[list[int]]:
    """Start the kernel's mark of highest residency anew, and look every few milliseconds at what is no file's: of that there is no mark."""
    Path("/proc/self/clear_refs").write_text("5")
    highest, is_over = [0], threading.Event()

    def look() -> None:
        while not is_over.wait(0.003):
            highest[0] = max(highest[0], memory()["RssAnon"])

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        yield highest
    finally:
        is_over.set()
        looking.join()
