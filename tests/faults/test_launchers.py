"""R12: what becomes of a run when its launcher is killed, asked to stop, or loses a rank; nothing may be left behind that nobody ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from tests.distributed.runs import ROOT, environment, free_port, launcher
from tests.distributed.tiny_run import config_of, status_of
from tests.faults.ledger import record
from tests.faults.state import checkpoints_of, newest_intact

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ORPHAN_SECONDS = 60
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
# Long enough that no step ends before the fault: 400 epochs of 4 steps.
LONG = dict(train__num_train_epochs=400, checkpoint__save_steps=50, eval__eval_steps=10_000)


class Started(NamedTuple):
    runner: subprocess.Popen
    launcher: int  # process that started the ranks; the runner itself under torchrun
    ranks: list[int]
    log: Path

    def output(self) -> str:
        return self.log.read_text(errors="replace")


def is_alive(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@contextmanager
def started(tiny: Path, run: Path, kind: str) -> Iterator[Started]:
    """Start training under a launcher, wait until two steps are behind, and leave no process."""
    command = [*launcher(2), "--module", "kto_ds"] if kind == "deepspeed" else [*TORCHRUN, free_port(), "-m", "kto_ds"]
    log = run.with_name(f"{run.name}.log")
    with open(log, "wb") as file:
        runner = subprocess.Popen(
            [*command, "train", *config_of(tiny, output_dir=run, **LONG)], env=environment(), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    pids: list[int] = [runner.pid]
    try:
        deadline = time.monotonic() + 180
        while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < 2:
            assert runner.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.2)
        processes = psutil.Process(runner.pid).children(recursive=True)
        ranks = [process for process in processes if "RANK" in process.environ() and "kto_ds" in process.cmdline()]
        pids += [process.pid for process in processes]
        by_rank = sorted(ranks, key=lambda process: int(process.environ()["RANK"]))
        assert len(by_rank) == 2, processes
        yield Started(runner, by_rank[0].ppid(), [process.pid for process in by_rank], log)
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                if is_alive(pid):
                    os.kill(pid, signal.SIGKILL)
        runner.wait()


def seconds_to_the_end(found: Started) -> float:
    """Wait for the end of the runner and of all ranks; AssertionError when one outlives it."""
    began = time.monotonic()
    while (left := [pid for pid in found.ranks if is_alive(pid)]) or found.runner.poll() is None:
        assert time.monotonic() - began < ORPHAN_SECONDS, f"still there: {left}\n{found.output()[-4000:]}"
        time.sleep(0.1)
    return time.monotonic() - began


# What is done to whom, and what the run says of it afterwards.
STOPS = [("TERM of the runner", signal.SIGTERM, "runner"), ("kill -9 of the runner", signal.SIGKILL, "runner"), ("kill -9 of the launcher", signal.SIGKILL, "launcher"),
         ("TERM of the launcher", signal.SIGTERM, "launcher"), ("USR1 to a rank", signal.SIGUSR1, "rank 1")]  # fmt: skip
STOCK = {
    "TERM of the runner": "ranks go on as orphans", "kill -9 of the launcher": "the runner exits 0, ranks go on", "kill -9 of a rank": "rc 247, 39 s when the other ignores SIGTERM",
    "TERM of the launcher": "one rank at a time, 30 s each",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["deepspeed", "torchrun"])
@pytest.mark.parametrize("what, signum, whom", STOPS, ids=[what for what, *_ in STOPS])
def test_a_run_that_loses_its_launcher_saves_and_ends(tiny, tmp_path, kind, what, signum, whom):
    run = tmp_path / "run"
    with started(tiny, run, kind) as found:
        os.kill({"runner": found.runner.pid, "launcher": found.launcher, "rank 1": found.ranks[1]}[whom], signum)
        seconds = seconds_to_the_end(found)
        assert status_of(run)["state"] == "preempted", found.output()[-4000:]
        assert newest_intact(run) is not None and len(checkpoints_of(run)) == 1, "it saved where it was"
        if whom == "rank 1" and kind == "deepspeed":
            assert found.runner.returncode == 75, "the launcher passes on what a rank ends with"
        record("R12", f"{kind}: {what}", injected=1, survived=1, seconds=seconds, stock=STOCK.get(what, "") if kind == "deepspeed" else "")


@pytest.mark.parametrize("kind", ["deepspeed", "torchrun"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_run_that_loses_a_rank_fails(tiny, tmp_path, kind, victim):
    run = tmp_path / "run"
    with started(tiny, run, kind) as found:
        os.kill(found.ranks[victim], signal.SIGKILL)
        seconds = seconds_to_the_end(found)
        assert found.runner.returncode != 0
        assert status_of(run)["state"] == "failed", found.output()[-4000:]
        assert f"a rank died: rank {victim}" in status_of(run)["reason"]
        assert not checkpoints_of(run), "there was nobody to save with"
        record("R12", f"{kind}: kill -9 of a rank", injected=1, survived=1, seconds=seconds, stock=STOCK["kill -9 of a rank"] if kind == "deepspeed" else "")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda signum: signum.name)
def test_the_launch_script_hands_on_signals_and_exit_codes(tiny, tmp_path, signum):
    run = tmp_path / "run"
    command = ["bash", str(ROOT / "launch" / "single_node.sh"), str(tiny / "run.yaml"), *config_of(tiny, output_dir=run, **LONG)[2:]]
    with open(tmp_path / "log", "wb") as log:
        script = subprocess.Popen(command, env={**environment(), "NUM_RANKS": "2", "MASTER_PORT": free_port()}, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 180
        while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < 2:
            assert script.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-4000:]
            time.sleep(0.2)
        script.send_signal(signum)
        began = time.monotonic()
        assert script.wait(ORPHAN_SECONDS) == 75, (tmp_path / "log").read_text()[-4000:]
        assert status_of(run)["state"] == "preempted" and newest_intact(run) is not None
        record("R12", f"launch/single_node.sh: {signum.name}", injected=1, survived=1, seconds=time.monotonic() - began)
    finally:
        if script.poll() is None:
            for process in [*psutil.Process(script.pid).children(recursive=True), script]:
                with suppress(psutil.NoSuchProcess, ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
