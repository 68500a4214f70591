"""R24: a folder has one run at a time; the second start is told whose it is."""

import functools
import os
import signal
import time

import pytest

from kto_ds.runtime.watch import SETTLE_SECONDS
from tests.distributed import ranks
from tests.distributed.tiny_run import config_of
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


@pytest.mark.slow
def test_a_second_precompute_ref_does_not_disturb_the_first(tiny, tmp_path):
    began = time.monotonic()
    command = ["precompute-ref", *config_of(tiny, output_dir=tmp_path / "run", reference__artifact=tmp_path / "reference")]
    point = Point("in a shard", "kto_ds.stages.precompute_ref.score_shard")
    before = functools.partial(at_point, point=point, victims=(0, 1), action=functools.partial(wait_until, tmp_path / "go_on"), folder=tmp_path)
    with ranks.Ranks(command, log=tmp_path / "first", before=before) as first:
        wait_for(tmp_path / "happened0", first)
        exit_codes, output = ranks.run(command, log=tmp_path / "second")
        assert exit_codes == [2, 2] and "another run is writing here" in output, output[-4000:]
        time.sleep(2 * SETTLE_SECONDS)  # in which the first one would have ended like a rank of the second
        (tmp_path / "go_on").touch()
        assert first.wait() == [0, 0], first.output()[-4000:]
    assert (tmp_path / "reference" / "manifest.json").is_file()
    record("R24", "two starts of precompute-ref", injected=1, survived=1, seconds=time.monotonic() - began)


def wait_until(path) -> None:
    while not path.exists():
        time.sleep(0.05)


def wait_for(path, started: ranks.Ranks) -> None:
    deadline = time.monotonic() + ranks.SECONDS
    while not path.exists() or not path.with_name("happened1").exists():
        assert started.is_running() and time.monotonic() < deadline, started.output()[-4000:]
        time.sleep(0.05)
