import io
import json
import os
import pty
import termios
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes

from kto_ds.config import WandbConfig
from kto_ds.errors import Preempted, UserError
from kto_ds.report.console import Console, duration
from kto_ds.report.metrics_file import MetricsFile, read_records
from kto_ds.report.plots import plot_metrics
from kto_ds.report.sinks import Sinks, open_sinks
from kto_ds.report.status import RunStatus
from kto_ds.report.throughput import Clock, Lap, StepTimer, Work, peak_memory_gib, speed_metrics, sum_of_laps, summary
from kto_ds.report.wandb_process import WandbProcess, wandb_order
from kto_ds.report.wandb_upload import named
from tests.faults.wandb_files import history_of


def train_record(step: int, **more: float) -> dict:
    return {"split": "train", "step": step, "epoch": step / 50, "loss": 0.4831, "kl": 0.12, "rewards/margins": 0.31, **more}


def eval_record(step: int) -> dict:
    return {"split": "eval", "step": step, "loss": 0.5, "kl": 0.1, "rewards/auc": 0.75}


def terminal_output(records: list[dict], total_steps: int) -> str:
    """Return what a Console writes to a real pseudo-terminal."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 120))
    with os.fdopen(follower, "w") as stream:
        console = Console(total_steps, stream=stream)
        for record in records:
            console.log(record)
        console.close()
    written = b""
    try:
        while chunk := os.read(leader, 4096):
            written += chunk
    except OSError:  # how Linux ends a pseudo-terminal whose other side is closed
        pass
    os.close(leader)
    return written.decode()


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
    disabled = WandbConfig()
    for done_steps, expected in ((0, [1, 2]), (1, [1, 2]), (0, [1, 2])):
        with open_sinks(output_dir=tmp_path, total_steps=2, done_steps=done_steps, wandb=disabled, run_config={}) as sinks:
            for step in range(done_steps + 1, 3):
                sinks.log(train_record(step))
        assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == expected
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
    assert capsys.readouterr().out.count("step 2/2") == 3


def test_other_ranks_have_no_sinks():
    with Sinks([]) as sinks:
        sinks.log(train_record(1))


# console


def test_without_a_terminal_a_record_is_one_plain_line():
    stream = io.StringIO()
    console = Console(300, stream=stream)
    console.log(train_record(12, learning_rate=2e-4, grad_norm=1.2345, tokens_per_second=5812.4))
    console.log(eval_record(12))
    console.close()
    train, evaluation = stream.getvalue().splitlines()
    assert train.startswith("step 12/300  epoch 0.24  loss 0.4831  kl 0.12  margin 0.31  lr 2.0e-04  grad 1.23  tok/s 5,812  eta ")
    assert evaluation == "eval  step 12/300  loss 0.5000  kl 0.1  auc 0.750"


def test_a_terminal_gets_a_bar_and_evaluation_lines_of_their_own():
    shown = terminal_output([train_record(1), eval_record(1), train_record(2)], total_steps=2)
    assert "eval  step 1/2  loss 0.5000" in shown
    assert "2/2" in shown and "loss 0.4831  margin 0.31  kl 0.12" in shown


@pytest.mark.parametrize(
    "seconds, text", [(0, "0s"), (45.9, "45s"), (60, "1m00s"), (192, "3m12s"), (3840, "1h04m"), (86399, "23h59m"), (183600, "2d03h")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


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
    text = summary(sum_of_laps(laps), [1.25, 3.5], peak_flops=1e12)
    assert text == "since this start 1,500 tokens in 10.0 s: 150 tokens/s, 0.25 TFLOP/s a rank, MFU 25.0%, HFU 30.0%; 1.25 to 3.50 GiB at the peak on each rank; kl 20%, policy 60%, update 15%, host 5%"
    assert "MFU" not in summary(sum_of_laps(laps), [1.25], peak_flops=None)


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


# wandb


def wandb_run(folder: Path, mode: str, records: list[dict]) -> list[str]:
    """Run the process beside a record of these lines to its end and return what it told."""
    told: list[str] = []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    order = wandb_order(WandbConfig(), mode, output_dir=folder, run_config={"seed": 1, "loss": {"beta": 0.1}})
    process = WandbProcess(order, tell=told.append)
    for record in records:
        process.log(record)
    assert process.close(60), told
    return told


@pytest.fixture
def no_credentials(monkeypatch, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    for name in [name for name in os.environ if name.startswith("WANDB_")] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    return monkeypatch


def test_a_wandb_run_holds_one_record_and_no_line_of_another(tmp_path, no_credentials, capsys):
    """A start that goes on where the record ends has the same wandb run; one that takes lines back has a run of its own, with all lines."""
    starts = [(0, [train_record(1), eval_record(1), train_record(2)]), (2, [train_record(3)]), (1, [train_record(2, loss=0.25)])]
    no_credentials.setattr("kto_ds.report.sinks.CLOSE_SECONDS", 60)  # for a machine that is busy
    ids, files = [], []
    for done_steps, records in starts:
        with open_sinks(output_dir=tmp_path, total_steps=3, done_steps=done_steps, wandb=WandbConfig(mode="offline"), run_config={}) as sinks:
            for record in records:
                sinks.log(record)
        ids.append((tmp_path / "wandb" / "run_id").read_text())
        # offline-run-TIME-ID
        [file] = {*(tmp_path / "wandb").glob("offline-run-*/*.wandb")} - {*files}
        assert file.parent.name.split("-")[3] == ids[-1] and history_of(file) == [named(record) for record in read_records(tmp_path / "metrics.jsonl")]
        files.append(file)
    assert ids[0] == ids[1] != ids[2]
    assert wandb_order(WandbConfig(), "online", output_dir=tmp_path, run_config={})["run_id"] == ids[2]


@pytest.mark.parametrize(("done_steps", "is_kept"), [(2, True), (1, False), (0, False)])
def test_a_start_without_wandb_tells_the_next_one_whether_its_run_still_fits(tmp_path, done_steps, is_kept):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "run_id").write_text("1234")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(train_record(step)) + "\n" for step in (1, 2)))
    with open_sinks(output_dir=tmp_path, total_steps=3, done_steps=done_steps, wandb=WandbConfig(), run_config={}):
        pass
    assert (wandb_order(WandbConfig(), "online", output_dir=tmp_path, run_config={})["run_id"] == "1234") == is_kept


def test_online_without_a_key_goes_offline_and_asks_nothing(tmp_path, no_credentials):
    told = wandb_run(tmp_path, "online", [train_record(1)])
    assert len(told) == 1 and told[0].startswith("warning: wandb goes offline") and "no API key" in told[0]
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.slow
def test_online_without_a_server_goes_offline_in_half_a_minute(tmp_path, no_credentials):
    no_credentials.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    no_credentials.setenv("WANDB_API_KEY", "0" * 40)
    told = wandb_run(tmp_path, "online", [train_record(1)])
    assert len(told) == 1 and told[0].startswith("warning: wandb goes offline")
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
