"""R12: what becomes of a run when its launcher is killed, asked to stop, or loses a rank; nothing may be left behind that nobody ends."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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
        pids += [process.pid for process in psutil.Process(runner.pid).children(recursive=True)]
        ranks = [json.loads((run / "ranks" / f"rank{rank}.json").read_text())["pid"] for rank in (0, 1)]
        assert set(ranks) <= set(pids)
        yield Started(runner, psutil.Process(ranks[0]).ppid(), ranks, log)
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


def has_trained(run: Path, script: psutil.Process) -> bool:
    return (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") >= 2


def has_ranks(run: Path, script: psutil.Process) -> bool:
    """The ranks are processes, and import what they need."""
    return any(argument.startswith("--local_rank=") for process in script.children(recursive=True) for argument in process.cmdline())


def has_launcher(run: Path, script: psutil.Process) -> bool:
    return any("deepspeed" in argument for process in script.children(recursive=True) for argument in process.cmdline()[:2])


def is_in_set_up(run: Path, script: psutil.Process) -> bool:
    return (run / "ranks" / "rank1.json").exists()


@contextmanager
def script_started(tiny: Path, run: Path, has_come: Callable[[Path, psutil.Process], bool]) -> Iterator[tuple[psutil.Popen, Path]]:
    """Start launch/single_node.sh, wait for a phase of it, and leave no process."""
    command = ["bash", str(ROOT / "launch" / "single_node.sh"), str(tiny / "run.yaml"), *config_of(tiny, output_dir=run, **LONG)[2:]]
    log = run.with_name("log")
    with open(log, "wb") as file:
        variables = {**environment(), "NUM_RANKS": "2", "MASTER_PORT": free_port()}
        # A background job of a shell ignores SIGINT, and bash hands that on.
        script = psutil.Popen(command, env=variables, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    began: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 180
        came = False
        while not came:
            assert script.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            with suppress(psutil.NoSuchProcess):  # one that has just ended
                came = has_come(run, script)
            time.sleep(0.05)
        began = script.children(recursive=True)
        yield script, log
        assert not [process for process in began if is_alive(process.pid)], log.read_text()[-4000:]
    finally:
        for process in [*began, script]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        script.wait()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda signum: signum.name)
def test_the_launch_script_hands_on_signals_and_exit_codes(tiny, tmp_path, signum):
    run = tmp_path / "run"
    with script_started(tiny, run, has_trained) as (script, log):
        script.send_signal(signum)
        began = time.monotonic()
        assert script.wait(ORPHAN_SECONDS) == 75, log.read_text()[-4000:]
        assert status_of(run)["state"] == "preempted" and newest_intact(run) is not None
        record("R12", f"launch/single_node.sh: {signum.name}", injected=1, survived=1, seconds=time.monotonic() - began)


@pytest.mark.parametrize("has_come", [has_launcher, has_ranks, is_in_set_up])
@pytest.mark.parametrize("later", [0.0, 1.5])
def test_the_launch_script_hands_on_signals_of_its_first_seconds(tiny, tmp_path, has_come, later):
    run = tmp_path / "run"
    with script_started(tiny, run, has_come) as (script, log):
        time.sleep(later)
        script.send_signal(signal.SIGUSR1)
        began = time.monotonic()
        assert script.wait(ORPHAN_SECONDS) == 75, log.read_text()[-4000:]
        assert not (run / "status.json").exists() or status_of(run)["state"] == "preempted"
        record("R12", f"launch/single_node.sh: SIGUSR1 once it {has_come.__name__.replace('_', ' ')}", injected=1, survived=1, seconds=time.monotonic() - began)
