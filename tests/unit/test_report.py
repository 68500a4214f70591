import json
import os

import pytest
import torch
from matplotlib.axes import Axes

from kto_ds.config import ReportConfig
from kto_ds.errors import Preempted, UserError
from kto_ds.report.metrics_file import MetricsFile, read_records
from kto_ds.report.plots import plot_metrics
from kto_ds.report.sinks import Sinks, open_sinks
from kto_ds.report.status import RunStatus
from kto_ds.report.throughput import Clock, Lap, StepTimer, Work, peak_memory_gib, speed_metrics, speed_rows, sum_of_laps
from tests.unit.log_records import eval_record, train_record

# metrics.jsonl


def test_records_are_on_disk_as_soon_as_they_are_logged(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.log(train_record(1))
    assert (tmp_path / "metrics.jsonl").read_text() == json.dumps(train_record(1)) + "\n"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused_and_leaves_no_trace(tmp_path, value):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    with pytest.raises(AssertionError, match="grad_norm is .* at step 7"):
        metrics.log(train_record(7, grad_norm=value))
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("torn", ["", '{"split": "train", "step": 3, "lo', '{"split": "train", "step": 2}', "\0\0\0\n"])
def test_resume_drops_later_steps_and_a_torn_line(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    written = [train_record(1, loss=0.1 + 0.2), train_record(2), eval_record(2), train_record(3)]
    path.write_text("".join(json.dumps(record) + "\n" for record in written) + torn)
    metrics = MetricsFile(path)
    metrics.drop_after(2)
    metrics.log(train_record(3, loss=0.25))
    assert read_records(path) == [*written[:3], train_record(3, loss=0.25)]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_fresh_start_empties_the_record_and_a_resumed_one_keeps_it(tmp_path, capsys):
    for done_steps, expected in ((0, [1, 2]), (1, [1, 2]), (0, [1, 2])):
        with open_sinks(output_dir=tmp_path, total_steps=2, done_steps=done_steps, report=ReportConfig(), run_config={}) as sinks:
            for step in range(done_steps + 1, 3):
                sinks.log(train_record(step))
        assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == expected
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
    assert capsys.readouterr().out.count("step 2/2") == 3


def test_other_ranks_have_no_sinks():
    with Sinks([]) as sinks:
        sinks.log(train_record(1))


# throughput


def test_every_moment_belongs_to_a_phase_and_pauses_to_none():
    now = [100.0]
    timer = StepTimer(Clock(lambda: now[0], lambda begin, end: end - begin))
    for phase, seconds in (("kl", 1), ("policy", 4), ("update", 2), ("paused", 50), ("host", 0.5), ("kl", 2)):
        timer.begin(phase)
        now[0] += seconds
    timer.add(Work(300, 6e12, 8e12))
    timer.add(Work(500, 2e12, 2e12))
    lap = timer.lap()
    assert lap == ({"kl": 3, "policy": 4, "update": 2, "host": 0.5}, (800, 8e12, 10e12))
    now[0] += 1
    assert timer.lap() == ({"kl": 1, "policy": 0, "update": 0, "host": 0}, (0, 0, 0)), "the phase goes on"
    metrics = speed_metrics(lap, num_steps=2, num_ranks=4, peak_flops=1e12)
    assert metrics["tokens_per_second"] == pytest.approx(800 / 9.5) and metrics["seconds"] == 4.75 and metrics["seconds/kl"] == 1.5
    assert metrics["mfu"] == pytest.approx(8 / 9.5 / 4) and metrics["hfu"] == pytest.approx(10 / 9.5 / 4) and metrics["tflops"] == pytest.approx(8 / 9.5 / 4)
    assert "mfu" not in speed_metrics(lap, num_steps=2, num_ranks=4, peak_flops=None)


def test_the_summary_says_speed_memory_and_where_the_time_went():
    laps = [Lap({"kl": 1.0, "policy": 5.0, "update": 1.5, "host": 0.0}, Work(1000, 4e12, 5e12)), Lap({"kl": 1.0, "policy": 1.0, "update": 0.0, "host": 0.5}, Work(500, 1e12, 1e12))]
    assert dict(speed_rows(sum_of_laps(laps), [1.25, 3.5], peak_flops=1e12)) == {
        "speed": "150 tokens/s since this start (1,500 tokens in 10.0 s), 0.25 TFLOP/s a rank, MFU 25.0%, HFU 30.0%",
        "time": "kl 20%, policy 60%, update 15%, host 5%",
        "memory": "1.25 to 3.50 GiB at the peak on each rank",
    }
    alone = dict(speed_rows(sum_of_laps(laps), [1.25], peak_flops=None))
    assert "MFU" not in alone["speed"] and alone["memory"] == "1.25 GiB at the peak"


def test_peak_memory_sees_a_quarter_gib():
    before = peak_memory_gib(torch.device("cpu"))
    held = torch.ones(2**26)  # 0.25 GiB of float32
    after = peak_memory_gib(torch.device("cpu"))
    assert held.sum() > 0
    assert 0.05 < before < 64 and before <= after < before + 0.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_of_a_gpu():
    torch.ones(2**28, device="cuda")
    assert 1 <= peak_memory_gib(torch.device("cuda")) < 200


# plots


@pytest.mark.parametrize("num_records", [0, 1, 40])
def test_plot_of_whatever_was_logged(tmp_path, num_records):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(1, num_records + 1):
        metrics.log(train_record(step, kl_stderr=0.1, grad_norm=1.0, learning_rate=1e-6) if step > 1 else {"split": "train", "step": step, "loss": 0.5})
    metrics.close()
    plot_metrics(tmp_path / "metrics.jsonl", tmp_path / "metrics.png")
    assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG")


def test_several_evaluation_splits_are_told_apart_in_one_plot(tmp_path, monkeypatch):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (10, 20):
        metrics.log(train_record(step, **{"rewards/chosen": 0.1}))
        for split in ("eval/maths", "eval/held_out"):
            metrics.log({**eval_record(step), "split": split, "rewards/chosen": 0.1})
    metrics.close()
    legends = []
    monkeypatch.setattr(Axes, "legend", lambda axis: legends.append((axis.get_title(loc="left"), axis.get_legend_handles_labels()[1])))
    plot_metrics(tmp_path / "metrics.jsonl", tmp_path / "metrics.png")
    assert ("loss", ["train", "eval/maths", "eval/held_out"]) in legends and ("rewards", ["chosen", "eval/maths", "eval/held_out"]) in legends


# status.json


def test_the_status_is_written_when_it_changes_or_gets_old(tmp_path):
    now = [100.0]
    status = RunStatus(tmp_path / "status.json", is_main=True, clock=lambda: now[0])
    found = []
    with pytest.raises(UserError), status.until_the_end():
        for step, seconds in ((0, 0), (1, 1), (2, 3.9), (3, 0.1), (4, 1)):
            now[0] += seconds
            status.running(step)
            found.append(json.loads((tmp_path / "status.json").read_text())["step"])
        raise UserError("stop")
    assert found == [0, 0, 0, 3, 3]
    assert json.loads((tmp_path / "status.json").read_text()) == {"state": "failed", "step": 4, "exit_code": 2, "reason": "UserError: stop"}


def test_status_tells_a_preemption_from_a_failure(tmp_path):
    status = RunStatus(tmp_path / "status.json", is_main=True)
    with pytest.raises(Preempted), status.until_the_end():
        status.running(7)
        raise Preempted("SIGTERM")
    assert json.loads((tmp_path / "status.json").read_text()) == {"state": "preempted", "step": 7, "exit_code": 75, "reason": "Preempted: SIGTERM"}


def test_the_first_end_of_a_status_is_the_last(tmp_path):
    with RunStatus(tmp_path / "status.json", is_main=True).until_the_end() as status:
        status.end("failed", 1, "no progress")
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"


def test_other_ranks_write_no_status(tmp_path):
    with RunStatus(tmp_path / "status.json", is_main=False).until_the_end() as status:
        status.running(1)
    assert list(tmp_path.iterdir()) == []
