"""An optimizer of which a part stays on the device: its learning rate follows the schedule, and its moments are saved, neither of which DeepSpeed does by itself."""

import json
import shutil

import pytest
import torch

from tests.distributed.runs import TINY_ZERO3, read_metrics
from tests.distributed.tiny_run import NUM_STEPS, config_of, make_tiny_run
from tests.faults.fed import go_back_to
from tests.gpu.test_resume_gpu import STOPPED_AT, in_one_process


def cpu_adam_is_built() -> bool:
    from deepspeed.ops.op_builder import CPUAdamBuilder

    return CPUAdamBuilder().is_compatible()


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_a_partly_offloaded_run_trains_and_resumes_like_one_that_is_not(tmp_path):
    if not cpu_adam_is_built():
        pytest.skip("DeepSpeedCPUAdam cannot be compiled here")
    folder = make_tiny_run(tmp_path)
    zeros = {"whole": {}, "partial": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}
    for name, offload in zeros.items():
        (folder / f"{name}.json").write_text(json.dumps({"zero_optimization": {**TINY_ZERO3, "sub_group_size": 1000, **offload}}))
    settings = dict(model__dtype="bfloat16", checkpoint__save_total_limit=NUM_STEPS)
    train = lambda name, zero: ["train", *config_of(folder, output_dir=folder / name, deepspeed__config=folder / f"{zero}.json", **settings)]  # noqa: E731
    in_one_process(folder, [["precompute-ref", *config_of(folder, **settings)], *(train(name, name) for name in zeros)])
    whole, partial = (read_metrics(folder / name) for name in zeros)
    for ours, theirs in zip(partial, whole, strict=True):
        # A schedule that half of the weights do not follow, warming up from 0, would be off by all of the step.
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=5e-3) and ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.1)

    shutil.copytree(folder / "partial", folder / "resumed")
    go_back_to(folder / "resumed", STOPPED_AT)
    assert f"resuming at step {STOPPED_AT + 1} of" in in_one_process(folder, [train("resumed", "partial")])
    for ours, theirs in zip(read_metrics(folder / "resumed"), partial, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
