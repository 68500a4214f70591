"""kill -9 at named places of every command, in every rank: the same command again ends as if nothing had been."""

import shutil
from pathlib import Path

import pytest

from tests.distributed import ranks
from tests.distributed.tiny_run import SAVE_STEPS, config_of
from tests.faults.ledger import tally
from tests.faults.points import EXPORT, PRECOMPUTE, PREPARE, TRAIN, Point, kill_once
from tests.faults.state import final_state, newest_intact, step_of, steps_begun

pytestmark = pytest.mark.distributed

STOCK = "DeepSpeed, same tag saved again: `latest` could not be loaded after 8 of 12 kills"
QUICK = {"manifest written, not renamed", "merge: before the rename"}


def quick_or_slow(points: list[Point], num_ranks: int) -> list:
    """All points in all ranks; the fast run takes some of them, in the last rank."""
    return [
        pytest.param(point, victim, id=f"{point.phase}, rank {victim}", marks=[] if point.phase in QUICK and victim == num_ranks - 1 else pytest.mark.slow)
        for point in points for victim in range(num_ranks)
    ]  # fmt: skip


@pytest.mark.parametrize(("point", "victim"), quick_or_slow(TRAIN, 2))
def test_train(tiny, unbroken, tmp_path, point, victim):
    run = tmp_path / "run"
    command = ["train", *config_of(tiny, output_dir=run)]
    with tally("R2", "kill -9 of one rank at a named place, then the same command", stock=STOCK) as counts:
        kill_once(command, point, victim, tmp_path / "fault", 2)
        counts.injected += 1
        newest = newest_intact(run)
        assert newest is not None and steps_begun(run) - step_of(newest) <= SAVE_STEPS
        output = ranks.require_success(command, log=tmp_path / "log")
        assert f"resuming at step {step_of(newest) + 1} of 12" in output
        assert final_state(run) == unbroken.state
        counts.survived += 1


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(("point", "victim"), quick_or_slow(PRECOMPUTE, 2))
def test_precompute_ref(tiny, tmp_path, point, victim):
    """The artefact is the one that one rank made in peace, to the byte."""
    reference = tmp_path / "reference"
    command = ["precompute-ref", *config_of(tiny, reference__artifact=reference)]
    with tally("R4", "kill -9 of one rank of precompute-ref at a named place, then the same command") as counts:
        kill_once(command, point, victim, tmp_path / "fault", 2)
        counts.injected += 1
        ranks.require_success(command, log=tmp_path / "log")
        assert contents(reference) == contents(tiny / "reference")
        counts.survived += 1


@pytest.mark.parametrize("point", [pytest.param(point, id=point.phase, marks=pytest.mark.slow) for point in EXPORT])
def test_export(tiny, unbroken, tmp_path, point):
    wanted, run = unbroken.run / "export", tmp_path / "run"
    if not wanted.exists():
        ranks.require_success(["export", *config_of(tiny, output_dir=unbroken.run)], log=tmp_path / "log", num_ranks=1)
    shutil.copytree(unbroken.run, run, ignore=shutil.ignore_patterns("export"))
    command = ["export", *config_of(tiny, output_dir=run)]
    with tally("R2", "kill -9 of export and of prepare at a named place, then the same command") as counts:
        kill_once(command, point, 0, tmp_path / "fault", 1)
        counts.injected += 1
        ranks.require_success(command, log=tmp_path / "log", num_ranks=1)
        name = "README.md"  # its title is the name of the run
        found = contents(run / "export")
        assert found.pop(name) and {**contents(wanted), name: b""} == {**found, name: b""} and len(found) >= 4
        assert final_state(run) == unbroken.state, "export changes nothing"
        counts.survived += 1


@pytest.mark.parametrize("point", [pytest.param(point, id=point.phase, marks=pytest.mark.slow) for point in PREPARE])
def test_prepare(tiny, tmp_path, point):
    command = ["prepare", *config_of(tiny, output_dir=tmp_path / "run", data__artifact=tmp_path / "dataset")]
    with tally("R2", "kill -9 of export and of prepare at a named place, then the same command") as counts:
        kill_once(command, point, 0, tmp_path / "fault", 1)
        counts.injected += 1
        ranks.require_success(command, log=tmp_path / "log", num_ranks=1)
        assert contents(tmp_path / "dataset") == contents(tiny / "dataset")
        counts.survived += 1
