"""wandb that is unreachable, asks, dies, or cannot write: training ends the same, as soon, with every record in metrics.jsonl, and one line of warning at most."""

import json
import os
import shutil
import socket
import stat
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from kto_ds.report import wandb_process
from kto_ds.report.wandb_follow import named
from kto_ds.stages import train
from tests.distributed import ranks
from tests.distributed.tiny_run import config_of
from tests.faults.ledger import record
from tests.faults.state import final_state
from tests.faults.wandb_files import history_of

pytestmark = pytest.mark.distributed

STARTED_LATER = 1.0  # seconds at most that wandb may hold up the start of training
ENDED_LATER = wandb_process.CLOSE_SECONDS + 5


@pytest.fixture
def no_credentials(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    return {"HOME": str(home), "NETRC": str(home / "netrc")}


def lines_about_wandb(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith(("wandb", "warning: wandb", "notice: wandb"))]  # and not with the path of a test


def train_beside(tiny: Path, run: Path, *, mode: str = "online", before=ranks.nothing, **variables: str) -> str:
    command = ["train", *config_of(tiny, output_dir=run, report__wandb__mode=mode)]
    exit_codes, output = ranks.run(command, log=run.with_suffix(".log"), before=before, **variables)
    assert exit_codes == [0, 0], output[-4000:]
    assert "Traceback" not in output
    return output


def require_same(unbroken, run: Path, output: str, *, warning: str) -> None:
    """The same weights, moments, metrics and status as without wandb, and one line that says what is with it."""
    assert final_state(run) == unbroken.state
    assert len(lines_about_wandb(output)) == 1, lines_about_wandb(output)
    assert lines_about_wandb(output)[0].startswith("warning: wandb") and warning in output


@pytest.mark.slow
def test_a_server_that_never_answers(tiny, unbroken, tmp_path, no_credentials):
    """It takes the connection and says nothing; training has long ended when wandb gives up."""
    note = tmp_path / "opened"
    with socket.create_server(("127.0.0.1", 0)) as server:
        began = time.monotonic()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        output = train_beside(tiny, tmp_path / "run", before=partial(measure_opening, note=note), WANDB_BASE_URL=url, WANDB_API_KEY="0" * 40, **no_credentials)
        seconds = time.monotonic() - began
        server.settimeout(0)
        server.accept()  # or nobody has tried
    require_same(unbroken, tmp_path / "run", output, warning="has not taken everything within 10 s")
    opened = json.loads(note.read_text())
    assert opened["seconds"] < STARTED_LATER and seconds < 3 * unbroken.seconds + ENDED_LATER
    require_given_up(opened["pid"], within=wandb_process.FINISH_SECONDS + 15)
    record("R18", "server that never answers", injected=1, survived=1, seconds=seconds)


def measure_opening(rank: int, *, note: Path) -> None:
    """Note how long training waits until all that it writes to is open, and the process beside it."""
    opened = train.open_sinks

    def timed(**named_arguments):
        began = time.monotonic()
        sinks = opened(**named_arguments)
        seconds = time.monotonic() - began
        if rank == 0:
            note.write_text(json.dumps({"seconds": seconds, "pid": psutil.Process().children()[0].pid}))
        return sinks

    train.open_sinks = timed


def require_given_up(pid: int, *, within: float) -> None:
    """The process that was left to itself is still there, and ends by itself, with all that it has started."""
    process = psutil.Process(pid)
    left = [process, *process.children(recursive=True)]
    assert wandb_process.PROGRAM in process.cmdline()
    _, alive = psutil.wait_procs(left, timeout=within)
    assert not alive, alive


@pytest.mark.slow
def test_no_key_and_nobody_to_ask(tiny, unbroken, tmp_path, no_credentials):
    output = train_beside(tiny, tmp_path / "run", **no_credentials)
    require_same(unbroken, tmp_path / "run", output, warning="no API key")
    [file] = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert history_of(file) == [named(entry) for entry in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    record("R18", "no key, stdin closed", injected=1, survived=1, seconds=0.0)


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def kill_wandb(rank: int, *, program: str, note: Path) -> None:
    """Kill wandb's own process, or ours beside it, in the middle of the run: at step 6, once it is there and has begun to write."""
    whole_step = train.train_step

    def killing_step(engine, work, *arguments, **named_arguments):
        if rank == 0 and work.step == 6:
            deadline = time.monotonic() + 60
            while not list(note.parent.glob("run/wandb/*/*.wandb")):
                assert time.monotonic() < deadline, "wandb has not begun"
                time.sleep(0.05)
            # A process that it is just starting has its command line for a moment.
            victims = [process for process in psutil.Process().children(recursive=True) if program in " ".join(process.cmdline())]
            for victim in victims:
                victim.kill()
            note.write_text(str(victims[0].pid))
        return whole_step(engine, work, *arguments, **named_arguments)

    train.train_step = killing_step


@pytest.mark.parametrize("program", ["wandb-core", pytest.param(wandb_process.PROGRAM, marks=pytest.mark.slow)])
def test_wandb_is_killed_in_the_middle(tiny, unbroken, tmp_path, no_credentials, program):
    note = tmp_path / "killed"
    began = time.monotonic()
    output = train_beside(tiny, tmp_path / "run", mode="offline", before=partial(kill_wandb, program=program, note=note), **no_credentials)
    assert note.exists(), "nothing was killed"
    assert final_state(tmp_path / "run") == unbroken.state
    warnings = [line for line in lines_about_wandb(output) if line.startswith("warning")]
    assert len(warnings) == 1 and len(lines_about_wandb(output)) <= 2, lines_about_wandb(output)
    record("R18", f"{program} killed", injected=1, survived=1, seconds=time.monotonic() - began)


def a_file_in_its_place(run: Path) -> None:
    run.mkdir()
    (run / "wandb").write_text("")


def limited_python(rank: int, *, folder: Path) -> None:
    """Let the process beside training write no file beyond 4 KiB: what a full disk is to it, while training itself has room."""
    wrapper = folder / f"python{rank}"
    wrapper.write_text(f'#!/bin/bash\ntrap "" XFSZ\nulimit -f 4\nexec {sys.executable} "$@"\n')
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    sys.executable = str(wrapper)


@pytest.mark.slow
def test_a_file_in_the_place_of_its_folder(tiny, unbroken, tmp_path, no_credentials):
    a_file_in_its_place(tmp_path / "run")
    output = train_beside(tiny, tmp_path / "run", mode="offline", **no_credentials)
    require_same(unbroken, tmp_path / "run", output, warning="wandb is off; metrics.jsonl goes on: FileExistsError")
    record("R18", "a file in the place of its folder", injected=1, survived=1, seconds=0.0)


@pytest.mark.slow
def test_no_room_for_its_files(tiny, unbroken, tmp_path, no_credentials):
    output = train_beside(tiny, tmp_path / "run", mode="offline", before=partial(limited_python, folder=tmp_path), **no_credentials)
    assert final_state(tmp_path / "run") == unbroken.state
    assert [path for path in (tmp_path / "run" / "wandb").rglob("*") if path.is_file()], "wandb has not even begun"
    assert max(path.stat().st_size for path in (tmp_path / "run" / "wandb").rglob("*") if path.is_file()) == 4096, "nothing met the limit"
    warnings = [line for line in lines_about_wandb(output) if line.startswith("warning")]
    assert len(warnings) <= 1 and len(lines_about_wandb(output)) <= 2, lines_about_wandb(output)
    record("R18", "no room for its files", injected=1, survived=1, seconds=0.0)


def test_afterwards_all_records_are_uploaded(tiny, unbroken, tmp_path, no_credentials):
    """To a folder, as there is no server here: every record of the run is there, in its order, with every value."""
    run = tmp_path / "run"
    shutil.copytree(unbroken.run, run)
    command = ["report", *config_of(tiny, output_dir=run), "--wandb-sync"]
    output = ranks.require_success(command, log=tmp_path / "log", num_ranks=1, WANDB_MODE="offline", **no_credentials)
    [file] = (run / "wandb").glob("offline-run-*/*.wandb")
    wanted = read_jsonl(run / "metrics.jsonl")
    assert history_of(file) == [named(entry) for entry in wanted] and len(wanted) == 15
    assert f"all {len(wanted)} records" in output
    record("R18", "uploaded afterwards", injected=1, survived=1, seconds=0.0)
