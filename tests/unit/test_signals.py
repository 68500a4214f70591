"""When a run is to stop: wall times, and who a signal reaches."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kto_ds.errors import Preempted, UserError
from kto_ds.runtime.signals import STOPPING, WallTime, interruptible, listening, wall_seconds

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("0.5", 0.5), ("00:01:30", 90), ("1:00:00", 3600), ("2-03:04:05", 2 * 86400 + 3 * 3600 + 4 * 60 + 5)])
def test_wall_times_are_seconds_or_as_slurm_writes_them(text, seconds):
    assert wall_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-5", "soon", "nan", "inf", "1:00", "1-2", "00:00:00", "1:2:3"])
def test_what_is_no_wall_time_is_refused(text):
    with pytest.raises(UserError, match="no wall time"):
        wall_seconds(text)


def test_the_wall_time_leaves_room_for_the_longest_step_and_save():
    now = [100.0]
    wall_time = WallTime(60, started=100.0, clock=lambda: now[0])
    assert not wall_time.is_over()
    for step, save in ((4, 10), (6, 3)):
        wall_time.took(step=step)
        wall_time.took(save=save)
    now[0] = 100 + 60 - 16
    assert not wall_time.is_over()
    now[0] += 0.1
    assert wall_time.is_over()


def test_without_a_limit_there_is_no_end():
    wall_time = WallTime(None, started=0.0)
    wall_time.took(step=1e9)
    assert not wall_time.is_over()


@pytest.mark.parametrize("signum", STOPPING)
def test_a_signal_is_heard_while_the_main_thread_waits(signum):
    """The main thread sits in a lock that no signal wakes, as it does in a collective."""
    before = signal.getsignal(signum)
    heard, came = [], threading.Event()

    def hear(signal_heard):
        heard.append((signal_heard, threading.current_thread() is threading.main_thread()))
        came.set()

    with listening(hear):
        os.kill(os.getpid(), signum)
        assert came.wait(10)
    assert heard == [(signum, False)]
    assert signal.getsignal(signum) is before


def test_a_single_process_is_interrupted_at_once():
    began = time.monotonic()
    with pytest.raises(Preempted, match="SIGTERM: the work is kept; start the same command again"), interruptible("the work is kept"):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("signum", STOPPING)
@pytest.mark.parametrize("library", ["pydantic", "torch"])  # the first is imported ahead of `program`, the second by a stage
def test_a_signal_during_imports_ends_with_75(tmp_path, library, signum):
    """The library takes long, and any exception for something that it can do without, as some do."""
    (tmp_path / f"{library}.py").write_text("import time\nprint('imports', flush=True)\ntry:\n    time.sleep(30)\nexcept BaseException:\n    pass\nraise SystemExit(9)\n")
    (tmp_path / "run.yaml").write_text("output_dir: run\nmodel: {path: m}\ndata: {train: [{path: rows.jsonl}]}\n")
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "kto_ds", "train", "--config", "run.yaml"]
    with subprocess.Popen(command, cwd=tmp_path, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as started:
        assert started.stdout.readline() == "imports\n"
        started.send_signal(signum)
        told = started.communicate(timeout=20)[1]
    assert (started.returncode, told.count("\n")) == (75, 1) and f"{signum.name}: stopped before anything was begun" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("signum", STOPPING)
def test_a_signal_on_the_way_out_changes_nothing(tmp_path, signum):
    """The interpreter takes long to leave, as with many libraries in it."""
    (tmp_path / "sitecustomize.py").write_text("import os, time\nclass Slow:\n    def __del__(self, write=os.write, sleep=time.sleep):\n        write(1, b'leaves\\n')\n        sleep(1)\nslow = Slow()\n")
    (tmp_path / "run.yaml").write_text("output_dir: run\nmodel: {path: m}\ndata: {train: [{path: rows.jsonl}]}\n")
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "kto_ds", "train", "--config", "run.yaml", "--print-config"]
    with subprocess.Popen(command, cwd=tmp_path, env=variables, text=True, stdout=subprocess.PIPE) as started:
        while started.stdout.readline() != "leaves\n":
            assert started.poll() is None
        started.send_signal(signum)
        assert started.wait(20) == 0
