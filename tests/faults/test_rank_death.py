"""R13: a rank that dies, or meets an error alone, ends all of them with one message. The ranks have no launcher here that would end the others."""

import functools
import json
import os
import signal
import time

import pytest

from kto_ds.errors import NumericsError, UserError
from tests.distributed import ranks
from tests.distributed.tiny_run import config_of, status_of
from tests.faults.injected import at_point, happened_at, messages, send
from tests.faults.ledger import record
from tests.faults.points import Point
from tests.faults.state import final_state

pytestmark = pytest.mark.distributed

STEP_6 = Point("in a step", "kto_ds.runtime.engine.Engine.step", nth=6)
SAVE_6 = Point("in a save", "deepspeed.runtime.engine.DeepSpeedEngine.save_checkpoint", nth=3)
SEAL_6 = Point("while the others wait for rank 0", "kto_ds.artifacts.seal", nth=3)
SET_UP = Point("in set-up", "kto_ds.model.load.load_policy")


def fail(error: Exception) -> None:
    raise error


def train_with(tiny, folder, *, point: Point, victim: int, action) -> tuple[list[int], str, float]:
    """Train with a fault on one rank and return (exit codes, output, seconds from the fault to the end)."""
    folder.mkdir(parents=True, exist_ok=True)
    before = functools.partial(at_point, point=point, victims=(victim,), action=action, folder=folder)
    exit_codes, output = ranks.run(["train", *config_of(tiny, output_dir=folder / "run")], log=folder / "log", before=before)
    return exit_codes, output, time.time() - happened_at(folder, (victim,))


KILLS = [(STEP_6, 1), (STEP_6, 0), (SAVE_6, 1), (SAVE_6, 0), (SEAL_6, 0), (SET_UP, 1), (SET_UP, 0)]


@pytest.mark.parametrize("point, victim", [pytest.param(*case, marks=[] if case == (STEP_6, 1) else pytest.mark.slow, id=f"{case[0].phase}-{case[1]}") for case in KILLS])
def test_a_killed_rank_ends_the_other_which_names_it(tiny, unbroken, tmp_path, point, victim):
    exit_codes, output, seconds = train_with(tiny, tmp_path, point=point, victim=victim, action=functools.partial(send, 0, signal.SIGKILL, pause=1.2))
    survivor = 1 - victim
    assert exit_codes[victim] == -9 and exit_codes[survivor] == 1, output[-4000:]
    assert seconds < 10
    [message] = messages(output)
    phase = {"in a step": "step of step 6", "in a save": "saving of step 6", "while the others wait for rank 0": "saving of step 6", "in set-up": "set-up of step 0"}[point.phase]
    assert f"a rank died: rank {victim} (host " in message and f"last in {phase}" in message, message
    assert "Traceback" not in output
    assert (status_of(tmp_path / "run")["state"], status_of(tmp_path / "run")["exit_code"]) == ("failed", 1)
    assert "Thread 0x" in (tmp_path / "run" / "stacks" / f"rank{survivor}.txt").read_text()

    ranks.require_success(["train", *config_of(tiny, output_dir=tmp_path / "run")], log=tmp_path / "log")
    assert final_state(tmp_path / "run") == unbroken.state
    record("R13", f"kill -9 of rank {victim} {point.phase}", injected=1, survived=1, seconds=seconds)


def kill_and_ask_the_other(pids) -> None:
    """What a launcher does when a rank has died."""
    os.kill(int((pids / "pid0").read_text()), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_the_launchers_signal_after_a_death_is_no_preemption(tiny, tmp_path):
    before = functools.partial(at_point_and_note_pid, point=STEP_6, victims=(1,), action=functools.partial(kill_and_ask_the_other, tmp_path), folder=tmp_path)
    exit_codes, output = ranks.run(["train", *config_of(tiny, output_dir=tmp_path / "run")], log=tmp_path / "log", before=before)
    happened_at(tmp_path, (1,))
    assert exit_codes == [1, -9], output[-4000:]
    assert len(messages(output)) == 1 and "a rank died: rank 1" in messages(output)[0]
    assert status_of(tmp_path / "run")["state"] == "failed"


def at_point_and_note_pid(rank: int, *, folder, **rest) -> None:
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    at_point(rank, folder=folder, **rest)


ERRORS = [(UserError("rows are wrong", where="rows.jsonl:3"), 2), (NumericsError("a NaN was met"), 3), (ValueError("of an unforeseen kind"), 1)]


@pytest.mark.parametrize("error, exit_code", [pytest.param(*case, marks=[] if case[1] == 2 else pytest.mark.slow, id=type(case[0]).__name__) for case in ERRORS])
@pytest.mark.parametrize("point", [STEP_6, pytest.param(SET_UP, marks=pytest.mark.slow)], ids=["step", "set-up"])
def test_an_error_on_one_rank_alone_is_told_by_rank_0(tiny, tmp_path, error, exit_code, point):
    exit_codes, output, seconds = train_with(tiny, tmp_path, point=point, victim=1, action=functools.partial(fail, error))
    assert exit_codes == [exit_code, exit_code] and seconds < 30, output[-4000:]
    told = [line for line in output.splitlines() if line.startswith("kto-ds: error: ")]
    assert len(told) == 1 and told[0].startswith("kto-ds: error: [rank 1] ") and str(error) in told[0], output[-4000:]
    status = status_of(tmp_path / "run")
    assert (status["state"], status["exit_code"]) == ("failed", exit_code) and str(error) in status["reason"]
    record("R13", f"{type(error).__name__} on rank 1 alone", injected=1, survived=1, seconds=seconds)


def test_every_rank_says_where_it_is_and_that_it_is_done(unbroken):
    for rank in (0, 1):
        beat = json.loads((unbroken.run / "ranks" / f"rank{rank}.json").read_text())
        assert beat.keys() == {"rank", "host", "pid", "phase", "step", "beat"}
        assert (beat["rank"], beat["phase"], beat["step"]) == (rank, "done", 12)
    assert not list((unbroken.run / "ranks").glob("*.end"))
