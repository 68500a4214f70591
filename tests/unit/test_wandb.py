"""What the process beside training puts into a wandb run, read back from the file of an offline one."""

import json
import os
import re
import threading
import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from kto_ds.artifacts import describe_folder, seal
from kto_ds.config import ReportConfig, WandbConfig
from kto_ds.report import wandb_alerts, wandb_follow
from kto_ds.report.metric_names import panel_names
from kto_ds.report.metrics_file import read_records
from kto_ds.report.samples_file import Sample
from kto_ds.report.sinks import open_sinks
from kto_ds.report.wandb_alerts import Alert, StillRanks
from kto_ds.report.wandb_follow import SAMPLE_COLUMNS, STATUS_SECONDS, named, samples_by_split
from kto_ds.report.wandb_process import FINISH_SECONDS, WandbProcess, wandb_order
from kto_ds.runtime.watch import LOST_SECONDS
from tests.faults.wandb_files import entries_of, history_of
from tests.unit.log_records import eval_record, train_record

BUSY_SECONDS = 300  # that a process may take on a machine that is busy with others


def wandb_run(folder: Path, mode: str, records: list[dict], *, is_good: bool = True, **order) -> list[str]:
    """Run the process beside a record of these lines to its end and return what it told."""
    told: list[str] = []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    process = WandbProcess(wandb_order(WandbConfig(), mode, output_dir=folder, run_config={"seed": 1, "loss": {"beta": 0.1}}, finish_seconds=BUSY_SECONDS, **order), tell=told.append)
    for record in records:
        process.log(record)
    assert process.close(BUSY_SECONDS, is_good=is_good), told
    return told


def offline_file(folder: Path) -> Path:
    [file] = (folder / "wandb").glob("offline-run-*/*.wandb")
    return file


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
    no_credentials.setattr("kto_ds.report.sinks.CLOSE_SECONDS", BUSY_SECONDS)
    ids, files = [], []
    for done_steps, records in starts:
        with open_sinks(output_dir=tmp_path, total_steps=3, done_steps=done_steps, report=ReportConfig(wandb=WandbConfig(mode="offline")), run_config={}) as sinks:
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
    with open_sinks(output_dir=tmp_path, total_steps=3, done_steps=done_steps, report=ReportConfig(), run_config={}):
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


def test_the_page_shows_settings_that_there_are():
    page = (Path(__file__).parents[2] / "docs" / "watching.md").read_text(encoding="utf-8")
    wandb, tensorboard = [ReportConfig.model_validate(YAML(typ="safe").load(block)["report"]) for block in re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)]
    assert wandb.wandb.mode == "online" and tensorboard.tensorboard


# what a run of it holds


def sealed(folder: Path, kind: str, **more) -> Path:
    folder.mkdir(parents=True)
    (folder / "data").write_text(kind)
    seal(folder, {"kind": kind, **more}, describe_folder(folder))
    return folder


def sample(step: int, **more) -> dict:
    return {"split": "eval", "step": step, "row": "rows.jsonl:3", "prompt": "p", "completion": f"at {step}", "before": "b", "label": True, "dataset_reward": 0.25, **more}


def test_a_run_has_sections_axes_samples_lineage_and_alerts(tmp_path, no_credentials):
    sources = {kind: sealed(tmp_path / kind, kind) for kind in ("dataset", "reference")}
    for step in (2, 4):
        sealed(tmp_path / "checkpoints" / f"step-{step:08d}", "checkpoint", step=step)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.safetensors").write_bytes(b"weights" * 100)
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(sample(step)) + "\n" for step in (0, 2, 2)))
    (tmp_path / "status.json").write_text(json.dumps({"state": "failed", "step": 4, "exit_code": 3, "reason": "NumericsError: step 5: bad"}))
    records = [train_record(1), train_record(2, tokens_per_second=10.0, skipped_steps=1, **{"logratios/chosen": [1, 2]}), eval_record(2), train_record(3, skipped_steps=2)]
    wandb_run(tmp_path, "offline", records, is_good=False, sources=sources, watch_from=2)

    file = offline_file(tmp_path)
    rows = history_of(file)
    [table] = [row["eval/samples/path"] for row in rows if "eval/samples/path" in row]
    numbers = [{name: value for name, value in row.items() if not name.startswith("eval/samples/")} for row in rows]
    wanted = [named(record) for record in records]
    assert numbers == [*wanted[:-1], {**wanted[-1], "eval/step": 2}], "a table has no row of its own, and the steps of its split as its axis"
    content = json.loads((file.parent / "files" / table).read_text())
    assert {*SAMPLE_COLUMNS} < Sample.__annotations__.keys()
    assert content["columns"] == ["step", "row", "label", "prompt", "before", "completion", "dataset_reward"]
    assert content["data"] == [[step, "rows.jsonl:3", True, "p", "b", f"at {step}", 0.25] for step in (0, 2, 2)]
    axes = {metric.name or metric.glob_name: metric.step_metric for metric in entries_of(file, "metric")}
    assert axes | {"train/*": "train/step", "speed/*": "train/step", "memory/*": "train/step", "count/*": "train/step", "eval/*": "eval/step"} == axes
    assert [(alert.title, alert.level) for alert in entries_of(file, "alert")] == [("steps left out", "WARN"), ("run failed", "ERROR")]
    assert "step 3: 2 updates" in entries_of(file, "alert")[0].text and "NumericsError: step 5: bad" in entries_of(file, "alert")[1].text
    assert entries_of(file, "exit")[-1].exit_code == 1
    found = {artifact.name.split("-")[0]: artifact for artifact in entries_of(file, "artifact")}
    assert {kind: artifact.use_after_commit for kind, artifact in found.items() if kind != "run"} == {"dataset": True, "reference": True, "checkpoint": False, "export": False}
    for kind, folder in {**sources, "checkpoint": tmp_path / "checkpoints" / "step-00000004"}.items():
        digest = json.loads((folder / "manifest.json").read_text())["digest"]
        [entry] = found[kind].manifest.contents
        assert (entry.path, entry.ref, entry.local_path) == (digest, f"kto-ds://{folder}", ""), "nothing is uploaded, and no byte read"
    assert {"step-4", "latest"} == set(found["checkpoint"].aliases)
    assert json.loads(found["export"].metadata)["bytes"] == 700


def test_an_export_is_noted_in_the_run_of_its_record(tmp_path, no_credentials):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text("{}")
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "run_id").write_text("1234")
    wandb_run(tmp_path, "offline", [train_record(1)], export=tmp_path / "export")
    file = offline_file(tmp_path)
    assert file.parent.name.endswith("-1234") and history_of(file) == []
    assert [artifact.name for artifact in entries_of(file, "artifact")] == ["export-1234"]
    assert entries_of(file, "exit")[-1].exit_code == 0 and entries_of(file, "alert") == []


@pytest.mark.parametrize(("state", "exit_code"), [("failed", 1), ("completed", 0)])
def test_an_upload_afterwards_tells_how_the_run_ended_and_alerts_nobody(tmp_path, no_credentials, state, exit_code):
    (tmp_path / "status.json").write_text(json.dumps({"state": state, "step": 4, "exit_code": 3, "reason": "NumericsError: step 5: bad"}))
    wandb_run(tmp_path, "offline", [train_record(1, skipped_steps=1)])
    assert entries_of(offline_file(tmp_path), "exit")[-1].exit_code == exit_code and entries_of(offline_file(tmp_path), "alert") == []


def test_names_of_panels():
    record = train_record(3, tokens_per_second=5.0, mfu=0.4, peak_memory_gib=2.0, learning_rate=1e-6, **{"seconds/kl": 0.5, "count/chosen": 4, "logratios/chosen": [1]})
    assert panel_names(record) == {
        "train/epoch": 0.06, "train/loss": 0.4831, "train/kl": 0.12, "train/rewards/margins": 0.31, "speed/tokens_per_second": 5.0, "speed/seconds": 1.5, "speed/mfu": 0.4,
        "memory/peak_memory_gib": 2.0, "train/learning_rate": 1e-6, "speed/seconds/kl": 0.5, "count/chosen": 4,
    }  # fmt: skip
    assert named({"split": "eval/maths", "step": 3, "loss": 0.5, "count/chosen": 2}) == {"eval/maths/step": 3, "eval/maths/loss": 0.5, "eval/maths/count/chosen": 2}


def test_samples_by_split(tmp_path):
    path = tmp_path / "samples.jsonl"
    assert samples_by_split(path) == {}
    written = [sample(0), sample(0, split="other"), sample(2)]
    path.write_text("".join(json.dumps(one) + "\n" for one in written) + '{"split": "ev')
    assert samples_by_split(path) == {"eval": [written[0], written[2]], "other": [written[1]]}


class KeptRun:
    """Takes what a wandb run would."""

    step = 0

    def __init__(self):
        self.tables: list[int] = []  # rows of each

    def define_metric(self, *args, **kwargs):
        pass

    def log(self, values: dict, step: int) -> None:
        self.tables += [len(table.data) for name, table in values.items() if name.endswith("/samples")]


def test_samples_are_read_when_they_are_new(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_follow, "POLL_SECONDS", 0.01)
    reads: list[Path] = []
    monkeypatch.setattr(wandb_follow, "samples_by_split", lambda path: [reads.append(path), samples_by_split(path)][1])
    (tmp_path / "metrics.jsonl").write_text(json.dumps(train_record(1)) + "\n")
    run, ended = KeptRun(), threading.Event()
    following = threading.Thread(target=wandb_follow.follow, args=(run, tmp_path, ended), kwargs={"watch_from": None, "stall_seconds": 600})
    following.start()
    for steps in ([0], [0, 2]):
        (tmp_path / "new").write_text("".join(json.dumps(sample(step)) + "\n" for step in steps))
        (tmp_path / "new").rename(tmp_path / "samples.jsonl")
        time.sleep(1)
    ended.set()
    following.join()
    assert run.tables == [1, 2] and len(reads) == 2


def write_beat(folder: Path, rank: int, **more) -> None:
    beat = {"rank": rank, "host": "node7", "pid": 1, "phase": "step", "step": 40, "beat": 1000.0, **more}
    (folder / f"rank{rank}.json").write_text(json.dumps(beat))


def test_a_rank_that_stands_still_is_told_once_until_it_moves(tmp_path):
    ranks = StillRanks(tmp_path, stall_seconds=600)
    assert ranks.look(1000.0) is None
    write_beat(tmp_path, 0, beat=2000.0)
    write_beat(tmp_path, 1)
    write_beat(tmp_path, 2, beat=1.0, phase="done")
    (tmp_path / "rank3.json").write_text("{")
    assert ranks.look(1100.0) is None and ranks.look(1599.0) is None
    assert ranks.look(1720.0) == Alert("no progress", "rank 1 on node7, step of step 40: no progress for 12m00s", "WARN")
    assert ranks.look(1800.0) is None
    write_beat(tmp_path, 1, beat=1850.0)
    assert ranks.look(1860.0) is None
    assert ranks.look(2500.0).text.endswith("no progress for 10m50s")


@pytest.mark.parametrize(
    ("status", "title"), [({"state": "completed"}, None), ({"state": "preempted"}, None), ({"state": "failed", "step": 4}, "run failed"), ({"state": "running"}, "run is gone")]
)
def test_how_a_run_ended_by_its_status(tmp_path, status, title):
    (tmp_path / "status.json").write_text(json.dumps(status))
    alert = wandb_alerts.of_end(tmp_path / "status.json")
    assert alert == title if title is None else alert.title == title
    assert wandb_alerts.has_ended(tmp_path / "status.json") == (status["state"] != "running")


def test_an_error_of_a_collective_has_time_to_be_told_as_such():
    assert LOST_SECONDS + 10 <= STATUS_SECONDS <= FINISH_SECONDS / 2


def test_only_left_out_steps_of_a_record_raise_an_alert():
    assert wandb_alerts.of_record(train_record(1)) is None and wandb_alerts.of_record(train_record(1, skipped_steps=0)) is None
    assert wandb_alerts.of_record(train_record(7, skipped_steps=2)).text.startswith("step 7: 2 updates")
