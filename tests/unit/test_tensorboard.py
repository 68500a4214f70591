"""TensorBoard's files, read back by TensorBoard's own reader."""

import sys
from pathlib import Path

import pytest

from kto_ds.config import ReportConfig
from kto_ds.errors import UserError
from kto_ds.report.sinks import open_sinks
from kto_ds.report.tensorboard import TensorBoard, require_tensorboard

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of the writer's thread, where a disk is full
ON = ReportConfig(tensorboard=True)


def record(step: int, loss: float) -> dict:
    return {"split": "train", "step": step, "loss": loss, "seconds": 5.0}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def train(folder: Path, report: ReportConfig, done_steps: int, losses: list[float]) -> None:
    with open_sinks(output_dir=folder, total_steps=4, done_steps=done_steps, report=report, run_config={}) as sinks:
        for step, loss in enumerate(losses, start=done_steps + 1):
            sinks.log(record(step, loss))


def test_no_step_is_there_twice_after_a_resume_from_an_earlier_checkpoint(tmp_path):
    train(tmp_path, ON, 0, [1.0, 2.0, 3.0])
    train(tmp_path, ON, 1, [0.5, 0.25, 0.125])
    assert scalars(tmp_path / "tensorboard") == {
        "train/loss": [(1, 1.0), (2, 0.5), (3, 0.25), (4, 0.125)], "speed/seconds": [(step, 5.0) for step in (1, 2, 3, 4)]
    }  # fmt: skip
    train(tmp_path, ON, 0, [8.0])
    assert scalars(tmp_path / "tensorboard")["train/loss"] == [(1, 8.0)]


def test_a_run_that_began_without_it_is_there_from_its_first_step(tmp_path):
    train(tmp_path, ReportConfig(), 0, [1.0, 2.0])
    train(tmp_path, ON, 2, [3.0])
    assert scalars(tmp_path / "tensorboard")["train/loss"] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_start_without_it_leaves_no_gap(tmp_path):
    train(tmp_path, ON, 0, [1.0])
    train(tmp_path, ReportConfig(), 1, [2.0])
    for done_steps in (2, 3):
        train(tmp_path, ON, done_steps, [done_steps + 1.0])
        assert scalars(tmp_path / "tensorboard")["train/loss"] == [(step, float(step)) for step in range(1, done_steps + 2)]


def test_a_disk_that_fails_ends_it_with_one_warning(tmp_path):
    told: list[str] = []
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", Path("/dev/full") / "x"):
        TensorBoard(folder, known=[], tell=told.append).log(record(1, 1.0))
    assert len(told) == 2 and all(line.startswith("warning: TensorBoard is off from here on; metrics.jsonl goes on") for line in told)
    view = TensorBoard(tmp_path / "view", known=[], tell=told.append)
    view._writer.file_writer.event_writer._async_writer._writer._writer = open("/dev/full", "wb", buffering=0)  # what a full disk is to its thread
    view.log(record(1, 1.0))
    view.log(record(2, 1.0))
    view.close()
    assert len(told) == 3 and "No space left on device" in told[2]


def test_without_the_package_it_says_what_to_install(monkeypatch):
    require_tensorboard()
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match="report.tensorboard: the package tensorboard is not installed\n  remedy: pip install 'kto-ds.tensorboard.'"):
        require_tensorboard()
