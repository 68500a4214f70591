"""The files of ds_configs/ that stage 3 can use without a GPU train the same step. Those with offload_optimizer.ratio need DeepSpeedCPUAdam beside a GPU: tests/gpu has one."""

import json
from pathlib import Path

import pytest

from kto_ds import cli
from kto_ds.runtime.deepspeed_config import read_deepspeed_config
from tests.distributed.ranks import run_commands
from tests.distributed.runs import read_metrics
from tests.distributed.tiny_run import config_of, make_tiny_run

pytestmark = pytest.mark.distributed

ON_CPU = ("zero3", "zero3_h100x16plus", "zero3_long_context")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_tiny_run(tmp_path_factory.mktemp("tiny"))


def train(folder: Path, name: str, config: str) -> list:
    return ["train", *config_of(folder, output_dir=folder / name, deepspeed__config=config, train__max_steps=2, eval__eval_steps="null")]


def require_same(folder: Path, names: list[str]) -> None:
    wanted, *others = ([(record["loss"], record["grad_norm"]) for record in read_metrics(folder / name)] for name in names)
    assert len(wanted) == 2
    for found in others:
        for (loss, norm), (same_loss, same_norm) in zip(found, wanted, strict=True):
            assert loss == pytest.approx(same_loss, rel=1e-5) and norm == pytest.approx(same_norm, rel=1e-4)


def test_files_for_clusters_take_the_step_of_zero3(folder):
    run_commands(folder, [["precompute-ref", *config_of(folder)], *(train(folder, name, name) for name in ON_CPU)], num_ranks=2)
    require_same(folder, list(ON_CPU))


@pytest.mark.slow
def test_a_second_copy_of_the_weights_takes_the_step_of_zero3(folder):
    zero = read_deepspeed_config("zero3_hpz")["zero_optimization"]
    # Two nodes of two ranks; no parameter of the tiny model would be partitioned otherwise.
    (folder / "hpz.json").write_text(json.dumps({"zero_optimization": {**zero, "zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0}}))
    run_commands(folder, [["precompute-ref", *config_of(folder)], train(folder, "whole", "zero3"), train(folder, "hpz", str(folder / "hpz.json"))], num_ranks=4)
    require_same(folder, ["whole", "hpz"])


@pytest.mark.parametrize("name, reason", [("zero3_h100x8", "without a GPU"), ("zero3_offload_optimizer_partial", "without a GPU"), ("zero3_hpz", "second copy")])
def test_files_that_cannot_work_here_say_so(folder, capsys, name, reason):
    assert cli.run(train(folder, f"refused-{name}", name)) == 2
    assert reason in capsys.readouterr().err
