"""A run on one CUDA device that is stopped and goes on: ends bit for bit like the one that was not; after a conversion of its state, as near as rounding lets it."""

import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kto_ds.runtime import collectives
from kto_ds.runtime.rng import derive_rng, restore_rng, rng_state
from tests.distributed.runs import ROOT, TINY_ZERO3, free_port, launch, read_metrics, write_zero
from tests.distributed.tiny_run import NUM_STEPS, config_of, make_tiny_run
from tests.faults.fed import go_back_to
from tests.faults.state import final_state, newest_intact

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = torch.device("cuda", 0)
STOPPED_AT = 6  # of 12 steps; the second of three epochs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder in which the run `unbroken` lies, in bfloat16 under ZeRO-3, and two that stopped in its middle and have gone on: `resumed`, `converted`."""
    folder = make_tiny_run(tmp_path_factory.mktemp("tiny"))
    other_zero = folder / "other.json"
    other_zero.write_text(json.dumps({"zero_optimization": {**TINY_ZERO3, "stage3_prefetch_bucket_size": 10_000}}))
    settings = dict(model__dtype="bfloat16", checkpoint__save_total_limit=NUM_STEPS)
    train = lambda name, zero: ["train", *config_of(folder, output_dir=folder / name, deepspeed__config=zero, **settings)]  # noqa: E731
    own_zero = write_zero(folder, 3)
    in_one_process(folder, [["precompute-ref", *config_of(folder, **settings)], train("unbroken", own_zero)])
    for name in ("resumed", "converted"):
        shutil.copytree(folder / "unbroken", folder / name)
        go_back_to(folder / name, STOPPED_AT)
    output = in_one_process(folder, [train("resumed", own_zero), train("converted", other_zero)])
    assert output.count(f"resuming at step {STOPPED_AT + 1} of") == 2 and output.count("for another ZeRO section") == 1, output[-4000:]
    return folder


def in_one_process(folder: Path, commands: list[list]) -> str:
    """Run kto-ds commands as the only rank there is, and return what they printed."""
    (folder / "commands.json").write_text(json.dumps([[str(part) for part in command] for command in commands]))
    done = launch([sys.executable, str(ROOT / "tests" / "distributed" / "worker.py"), str(folder / "commands.json"), str(folder / "results.json")])
    assert done.returncode == 0 and not any(result["exit_code"] for result in json.loads((folder / "results.json").read_text())), done.stdout[-6000:]
    return done.stdout


def test_a_resumed_run_ends_like_the_unbroken_one(run):
    """Masters, moments, steps, schedule, generators, metrics. No segment is longer than a block of keys, so attention adds up in one order."""
    wanted = final_state(run / "unbroken")
    assert wanted["step"] == NUM_STEPS and len(wanted["metrics"]["train"]) == NUM_STEPS
    assert f"rank0/{DEVICE.type}" in load_file(newest_intact(run / "unbroken") / "rng.safetensors")
    assert final_state(run / "resumed") == wanted


def test_a_converted_state_goes_on_with_the_same_losses_and_steps(run):
    wanted, found = (read_metrics(run / name) for name in ("unbroken", "converted"))
    for name in ("loss", "grad_norm", "learning_rate"):
        np.testing.assert_allclose([record[name] for record in found], [record[name] for record in wanted], rtol=1e-3, err_msg=name)
    wanted, found = (optimizer_state(run / name) for name in ("unbroken", "converted"))
    assert found["param_groups"] == wanted["param_groups"] and found["state"].keys() == wanted["state"].keys()
    for key, moments in wanted["state"].items():
        assert float(found["state"][key]["step"]) == float(moments["step"]) == NUM_STEPS
        torch.testing.assert_close(found["state"][key]["exp_avg"], moments["exp_avg"], rtol=1e-2, atol=1e-6)


def optimizer_state(run: Path) -> dict:
    """Return Adam's own state dict in the last checkpoint."""
    (path,) = (newest_intact(run) / "state").glob("*optim_states.pt")
    return torch.load(path, map_location="cpu", weights_only=False)["optimizer_state_dict"]["optimizer_state_dict"]


def draw() -> tuple:
    return torch.rand(5, device=DEVICE).tolist(), torch.rand(5).tolist(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()


def test_every_generator_comes_back_from_a_file(tmp_path):
    derive_rng(7, 3, 0, DEVICE)
    draw()
    save_file(rng_state(DEVICE), tmp_path / "rng")
    wanted = draw()
    assert all(before != after for before, after in zip(wanted, draw()))
    restore_rng(load_file(tmp_path / "rng"), DEVICE)
    assert draw() == wanted


def test_generators_are_derived_from_seed_step_and_rank():
    drawn = []
    for seed, step, rank in [(7, 3, 0), (7, 3, 0), (8, 3, 0), (7, 4, 0), (7, 3, 1)]:
        derive_rng(seed, step, rank, DEVICE)
        drawn.append(draw())
    assert drawn[0] == drawn[1]
    for numbers in zip(*drawn[1:]):  # of one generator
        assert len(set(map(str, numbers))) == 4


def test_collectives_of_the_only_rank(monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, value)
    world = collectives.start(timeout_seconds=60)
    try:
        assert world == (0, 1, DEVICE) and torch.distributed.get_backend() == "nccl"
        assert collectives.sum_across_ranks(torch.arange(3.0, device=DEVICE)).tolist() == [0, 1, 2]
        assert collectives.any_across_ranks(True, DEVICE) and not collectives.any_across_ranks(False, DEVICE)
        assert collectives.gather_objects({"a": 1}) == [{"a": 1}] and collectives.on_main_rank(lambda: "done") == "done"
        collectives.barrier()
        assert 0 < collectives.free_memory(world) <= torch.cuda.get_device_properties(DEVICE).total_memory
    finally:
        collectives.stop()
