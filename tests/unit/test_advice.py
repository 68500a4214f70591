"""Advice at the edges of what the KTO paper and TRL recommend, and the commands that print it."""

import json

import pytest

from kto_ds import cli
from kto_ds.advice import LabelCounts, advice
from kto_ds.config import LossConfig, OptimConfig
from kto_ds.doctor.findings import check_settings
from tests.distributed.runs import write_config
from tests.unit.test_plan import PUBLISHED, planned, write_run

BALANCED = LabelCounts(100, 100)


def keys(*, loss: dict | None = None, rate: float = 1e-6, batch: int = 32, adapters: bool = False, labels: LabelCounts | None = BALANCED) -> list[str]:
    return [piece.key for piece in advice(LossConfig(**(loss or {})), OptimConfig(learning_rate=rate), global_batch_size=batch, has_adapters=adapters, labels=labels)]


def test_the_defaults_need_none():
    assert keys() == [] and keys(labels=None) == []


@pytest.mark.parametrize("rate, beta, adapters, is_told", [
    (5e-7, 0.1, False, False), (4.9e-7, 0.1, False, True), (1e-6, 0.1, False, False), (1.01e-6, 0.1, False, True), (5e-6, 0.5, False, False), (5.1e-6, 1.0, False, True),
    (1e-6, 0.05, False, True), (5e-7, 0.05, False, False), (5e-7, 0.01, False, False), (2e-6, 0.2, False, False), (1e-4, 0.1, False, True),
    (1e-5, 0.1, True, False), (1.1e-5, 0.1, True, True), (5e-5, 0.5, True, False), (5.1e-5, 1.0, True, True), (5e-7, 0.1, True, False),
])  # fmt: skip
def test_the_learning_rate_is_one_for_its_beta(rate, beta, adapters, is_told):
    assert keys(loss={"beta": beta}, rate=rate, adapters=adapters) == ["optim.learning_rate"] * is_told


@pytest.mark.parametrize("beta, is_told", [(0.0099, True), (0.01, False), (1.0, False), (1.01, True)])
def test_beta_has_a_range(beta, is_told):
    assert keys(loss={"beta": beta}, rate=5e-7) == ["loss.beta"] * is_told


@pytest.mark.parametrize("batch, is_told", [(7, True), (8, False), (128, False), (129, True)])
def test_the_batch_has_a_range(batch, is_told):
    assert keys(batch=batch) == ["batch.global_batch_size"] * is_told


def test_z_needs_pairs_of_each_step():
    assert keys(loss={"kl_fraction": 0.124}) == ["loss.kl_fraction"] and keys(loss={"kl_fraction": 0.125}) == []
    assert keys(loss={"loss_type": "apo_zero_unpaired"}, batch=2) == ["batch.global_batch_size"]


@pytest.mark.parametrize("labels, loss, is_told", [
    (LabelCounts(100, 100), {}, False), (LabelCounts(134, 100), {}, False), (LabelCounts(148, 100), {}, True), (LabelCounts(89, 100), {}, True), (LabelCounts(92, 100), {}, False),
    (LabelCounts(400, 100), {"undesirable_weight": 3.0}, False), (LabelCounts(400, 100), {"undesirable_weight": "auto"}, False), (LabelCounts(100, 100), {"desirable_weight": 2.0}, True),
])  # fmt: skip
def test_labels_count_by_their_weights(labels, loss, is_told):
    assert keys(labels=labels, loss=loss) == ["loss.desirable_weight, loss.undesirable_weight"] * is_told


def test_undesirable_rows_alone_want_a_low_rate():
    [piece] = advice(LossConfig(), OptimConfig(), global_batch_size=32, has_adapters=False, labels=LabelCounts(0, 50))
    assert piece.key == "data.train" and "undesirable" in piece.what and "5e-07 rather than 1e-06" in piece.what and piece.source == "TRL docs"
    assert "rather" not in advice(LossConfig(), OptimConfig(learning_rate=5e-7), global_batch_size=32, has_adapters=False, labels=LabelCounts(0, 50))[0].what
    [piece] = advice(LossConfig(), OptimConfig(), global_batch_size=32, has_adapters=False, labels=LabelCounts(50, 0))
    assert "all examples are desirable" in piece.what and "rather" not in piece.what and piece.source == "our reading"


def test_every_piece_is_one_line_with_reason_and_source():
    pieces = advice(LossConfig(beta=2, kl_fraction=0.5), OptimConfig(learning_rate=1e-3), global_batch_size=2, has_adapters=True, labels=LabelCounts(1, 100))
    assert len(pieces) == 5
    for piece in pieces:
        line = str(piece)
        assert line.startswith(f"advice: {piece.key}: ") and line.endswith(f"({piece.source})") and "\n" not in line and ("paper" in piece.source or "TRL docs" in piece.source)


def test_plan_and_doctor_tell_it(tmp_path, capsys):
    run = write_run(tmp_path, PUBLISHED["Qwen2.5-14B"], optim={"learning_rate": 1e-4})
    plan = planned(capsys, run)
    assert len(plan["advice"]) == 1 and plan["advice"][0].startswith("advice: optim.learning_rate: 0.0001 is outside")
    assert cli.run(["plan", "--config", str(run)]) == 0
    assert plan["advice"][0] in capsys.readouterr().out
    finding = check_settings(plan["advice"])
    assert finding.verdict == "warn" and finding.found.startswith("optim.learning_rate: ") and check_settings([]).verdict == "ok"


def test_labels_are_those_of_the_data_report(tmp_path, capsys):
    from kto_ds.stages.advising import advice_lines

    config, _ = cli.read_config("train", ["--config", str(write_config(tmp_path / "run.yaml", output_dir=str(tmp_path), model={"path": "m"}, data={"train": [{"path": "x"}]}))])
    assert advice_lines(config) == []
    report = tmp_path / "dataset" / "data_report.json"
    report.parent.mkdir()
    report.write_text(json.dumps({"train": {"desirable": 900, "undesirable": 100}}))
    assert advice_lines(config)[0].startswith("advice: loss.desirable_weight, loss.undesirable_weight: desirable examples count 9 times")
    report.write_text("no json")
    assert advice_lines(config) == []
