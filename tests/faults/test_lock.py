"""R24: a folder has one run at a time; the second start is told whose it is."""

import functools
import os
import signal
import time

import pytest

from tests.distributed.tiny_run import config_of
from tests.faults import ranks
from tests.faults.injected import at_point, happened_at, messages
from tests.faults.ledger import record
from tests.faults.points import Point

pytestmark = pytest.mark.distributed


def test_a_second_start_is_refused_and_named_the_owner(tiny, tmp_path):
    command = ["train", *config_of(tiny, output_dir=tmp_path / "run")]
    point = Point("in a step", "kto_ds.runtime.engine.Engine.step", nth=3)
    before = functools.partial(at_point, point=point, victims=(0, 1), action=functools.partial(time.sleep, 300), folder=tmp_path)
    with ranks.Ranks(command, log=tmp_path / "first", before=before, SLURM_JOB_ID="4711") as first:
        wait_for(tmp_path / "happened0", first)
        happened_at(tmp_path, (0, 1))
        began = time.monotonic()
        exit_codes, output = ranks.run(command, log=tmp_path / "second")
        seconds = time.monotonic() - began
        assert exit_codes == [2, 2], output[-4000:]
        [message] = messages(output)
        assert f"another run is writing here: process {first.processes[0].pid} on host '{os.uname().nodename}', SLURM job '4711', since " in message, message
        assert first.is_running(), "the refused run has not disturbed the first one"
        first.kill(signal.SIGKILL)
        first.wait()
    ranks.require_success(command, log=tmp_path / "third")
    record("R24", "two starts in one folder; the owner killed, a third start", injected=2, survived=2, seconds=seconds)


def wait_for(path, started: ranks.Ranks) -> None:
    deadline = time.monotonic() + ranks.SECONDS
    while not path.exists() or not path.with_name("happened1").exists():
        assert started.is_running() and time.monotonic() < deadline, started.output()[-4000:]
        time.sleep(0.05)
