"""A run that goes on from any of its save points ends bit for bit like the one that was never stopped."""

import shutil

import pytest

from tests.distributed import ranks
from tests.distributed.runs import write_zero
from tests.distributed.tiny_run import NUM_STEPS, SAVE_STEPS, config_of
from tests.faults.fed import go_back_to
from tests.faults.ledger import tally
from tests.faults.state import final_state

pytestmark = pytest.mark.distributed

SAVE_POINTS = list(range(SAVE_STEPS, NUM_STEPS, SAVE_STEPS))
METHOD = "resume from every save point of 12 steps, 2 ranks: masters, moments, steps, generators, metrics"


@pytest.mark.parametrize(("stage", "dtype", "save_points"), [
    (3, "float32", [2, 10]),
    *(pytest.param(stage, dtype, SAVE_POINTS, marks=pytest.mark.slow) for stage in (2, 3) for dtype in ("float32", "bfloat16")),
])  # fmt: skip
def test_every_save_point_leads_to_the_same_end(tiny, tmp_path, stage, dtype, save_points):
    settings = dict(deepspeed__config=write_zero(tmp_path, stage), model__dtype=dtype, reference__artifact=tmp_path / "reference", checkpoint__save_total_limit=NUM_STEPS)
    command = lambda name: ["train", *config_of(tiny, output_dir=tmp_path / name, **settings)]  # noqa: E731
    if dtype == "bfloat16":
        ranks.require_success(["precompute-ref", *config_of(tiny, **settings)], log=tmp_path / "log", num_ranks=1)
    else:
        shutil.copytree(tiny / "reference", tmp_path / "reference")
    with tally("R1", METHOD, stock="without saved generators: losses differ from the first step after the resume") as counts:
        ranks.require_success(command("unbroken"), log=tmp_path / "log")
        wanted = final_state(tmp_path / "unbroken")
        assert wanted["step"] == NUM_STEPS and len(wanted["checkpoints"]) == NUM_STEPS // SAVE_STEPS and "rng.safetensors" in wanted["other files"]
        for step in save_points:
            shutil.copytree(tmp_path / "unbroken", tmp_path / f"from-{step}")
            go_back_to(tmp_path / f"from-{step}", step)
            counts.injected += 1
            assert f"resuming at step {step + 1} of" in ranks.require_success(command(f"from-{step}"), log=tmp_path / "log")
            assert final_state(tmp_path / f"from-{step}") == wanted, f"from step {step}"
            counts.survived += 1
