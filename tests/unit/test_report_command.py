"""`kto-ds report`: what it says of a run, from files alone."""

import json
from pathlib import Path

import pytest

from kto_ds import cli
from kto_ds.artifacts import describe_folder, seal
from tests.distributed.runs import write_config
from tests.unit.made_up_runs import records_of, write_metrics

TRAIN = {"split": "train", "step": 3, "epoch": 0.5, "loss": 0.25}


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with two log lines, a skipped step, a checkpoint of each kind, and a rank that was heard of."""
    run = tmp_path / "run"
    for name in ("step-00000002", "step-00000004", "step-00000001.corrupt.1", ".tmp-step-00000006"):
        (run / "checkpoints" / name).mkdir(parents=True)
    for name in ("step-00000002", "step-00000004"):
        folder = run / "checkpoints" / name
        (folder / "weights").write_bytes(b"x" * 1000)
        seal(folder, {"kind": "checkpoint"}, describe_folder(folder))
    (run / "checkpoints" / "step-00000004" / "weights").write_bytes(b"x" * 999)
    skipped = {"split": "train", "step": 4, "epoch": 0.6, "skipped_steps": 1}
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in (TRAIN, {**TRAIN, "split": "eval", "loss": 0.75}, skipped)) + '{"split": "tr')
    (run / "status.json").write_text(json.dumps({"state": "failed", "step": 4, "exit_code": 3, "reason": "NumericsError: step 5: bad"}))
    (run / "ranks").mkdir()
    (run / "ranks" / "rank1.json").write_text(json.dumps({"rank": 1, "host": "node7", "pid": 12, "phase": "step", "step": 5, "beat": 0}))
    write_config(tmp_path / "run.yaml", output_dir=str(run), model={"path": "m"}, data={"train": [{"path": "rows.jsonl"}]})
    return run


def report(run: Path, *options: str) -> int:
    return cli.run(["report", "--config", str(run.parent / "run.yaml"), *options])


def test_it_says_how_the_run_stands_and_draws_it(run, capsys):
    assert report(run) == 0
    printed = capsys.readouterr().out
    for text in (
        "status: failed at step 4, exit code 3", "NumericsError: step 5: bad", "train, step 4:", "eval, step 3:", "0.75", "skipped steps: 1, see numerics.jsonl",
        "checkpoint step-00000002: sealed, 1 files, 1,000 bytes", "checkpoint step-00000004: damaged: weights", "step-00000001.corrupt.1: damaged, set aside",
        ".tmp-step-00000006: not finished", "rank 1 on node7 (pid 12): step, step 5",
    ):  # fmt: skip
        assert text in printed, printed
    assert (run / "metrics.png").stat().st_size > 10_000
    assert "drawn anew: " in printed and f"{run / 'report.html'}" in printed and "NumericsError: step 5: bad" in (run / "report.html").read_text()
    assert not (run / "distributions.png").exists(), "nothing of them is logged"


def test_pictures_and_page_of_a_run_with_distributions(run):
    write_metrics(run / "metrics.jsonl", records_of(12))
    assert report(run) == 0
    assert all((run / name).read_bytes().startswith(b"\x89PNG") for name in ("metrics.png", "distributions.png"))
    assert (run / "report.html").read_text().count("<figure") > 12


def test_a_run_that_has_just_begun(run, capsys):
    (run / "metrics.jsonl").unlink()
    assert report(run) == 0
    assert "no metrics yet" in capsys.readouterr().out and not (run / "metrics.png").exists() and not (run / "report.html").exists()
    assert report(run, "--wandb-sync") == 2
    assert "there are no metrics to upload" in capsys.readouterr().err


def test_without_a_run_it_says_so(run, capsys):
    assert report(run, "--output_dir", str(run.parent / "elsewhere")) == 2
    assert "there is no run here" in capsys.readouterr().err
