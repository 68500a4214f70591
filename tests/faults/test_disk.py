"""A disk that is full, a limit on the size of files, a folder that may not be written to: one message soon, nothing lost, and with space again the same end."""

import functools
import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.distributed import ranks
from tests.distributed.tiny_run import config_of
from tests.faults.ledger import tally
from tests.faults.points import STAGED, Point, call_at, has_happened, mark
from tests.faults.state import final_state, newest_intact, step_of
from tests.faults.test_kill_points import contents

pytestmark = pytest.mark.distributed

SECONDS = 60  # until all ranks have ended
DISK_MIB = 24  # room for the run, and little more
BALLAST = "ballast"
PAGE = 4096
DEBRIS = (".tmp-step-*", "*.tmp")


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """Mount something at a folder for as long as the block runs; skip where that is not allowed."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "kto-faults") as folder:
        yield folder


def fill(disk: Path, leave: int) -> None:
    """Take all space of a disk but `leave` bytes."""
    status = os.statvfs(disk)
    descriptor = os.open(disk / BALLAST, os.O_WRONLY | os.O_CREAT)
    os.posix_fallocate(descriptor, 0, status.f_bavail * status.f_frsize - leave)
    os.close(descriptor)


def fill_at(rank: int, *, point: Point, on_rank: int, disk: Path, leave: int, folder: Path) -> None:
    if rank == on_rank:
        call_at(point, functools.partial(_fill, disk, leave, folder))


def _fill(disk: Path, leave: int, folder: Path) -> None:
    mark(folder, f"{leave} bytes left")
    fill(disk, leave)


def limit_files(rank: int, *, num_bytes: int, limited: tuple[int, ...]) -> None:
    """No file of these ranks may get larger: a quota, seen from inside."""
    if rank not in limited:
        return
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def require_refusal(command: list[str], log: Path, *, num_ranks: int, place: Path, before: Callable[[int], None] = ranks.nothing) -> str:
    """The command must end soon on all ranks, with one message that names the place; return what was printed."""
    began = time.monotonic()
    with ranks.Ranks(command, log=log, num_ranks=num_ranks, before=before) as started:
        exit_codes = started.wait(SECONDS)
        output = started.output()
    assert time.monotonic() - began < SECONDS and all(code in (1, 2) for code in exit_codes), f"{exit_codes}\n{output[-3000:]}"
    errors = [line for line in output.splitlines() if "kto-ds: error:" in line and not line.startswith("[rank ")]
    assert len(errors) == 1 and "Traceback" not in output, output[-3000:]
    assert str(place) in errors[0] and "bytes" in errors[0], errors
    return output


# Name -> (place in the run, rank that reaches it, bytes that are left, newest checkpoint then): most fall into the third save, of step 6.
FULL = {
    "before the save": (Point("", "kto_ds.runtime.checkpoint.save_checkpoint", nth=3), 0, 16 * PAGE, 4),
    "while DeepSpeed saves, rank 0": (Point("", "torch.save", "before", STAGED, nth=5), 0, 16 * PAGE, 4),
    "while DeepSpeed saves, rank 1": (Point("", "torch.save", "after", STAGED, nth=5), 1, 16 * PAGE, 4),
    "before the manifest": (Point("", "kto_ds.artifacts.seal", "before", STAGED, nth=3), 0, 0, 4),
    "before a record is logged": (Point("", "kto_ds.report.sinks.MetricsFile.log", nth=8), 0, 0, 6),
}


@pytest.mark.parametrize("when", [name if name == "while DeepSpeed saves, rank 1" else pytest.param(name, marks=pytest.mark.slow) for name in FULL])
def test_train_on_a_full_disk(tiny, unbroken, small_disk, tmp_path, when):
    point, on_rank, leave, newest_step = FULL[when]
    run, folder = small_disk / "run", tmp_path / "fault"
    folder.mkdir()
    command = ["train", *config_of(tiny, output_dir=run)]
    with tally("R9", "train on a small tmpfs that is full from a named place on; then with space again") as counts:
        before = functools.partial(fill_at, point=point, on_rank=on_rank, disk=small_disk, leave=leave, folder=folder)
        counts.injected += 1
        output = require_refusal(command, tmp_path / "log", num_ranks=2, place=run, before=before)
        assert has_happened(folder) and ("bytes needed" in output or when != "before the save")
        newest = newest_intact(run)
        assert newest is not None and step_of(newest) == newest_step
        assert not [path for pattern in DEBRIS for path in run.rglob(pattern)], "what was begun takes up space"
        (small_disk / BALLAST).unlink()
        assert f"resuming at step {newest_step + 1} of 12" in ranks.require_success(command, log=tmp_path / "log")
        assert final_state(run) == unbroken.state
        counts.survived += 1


FULL_ARTEFACT = {
    "prepare": [Point("", "kto_ds.artifacts.seal"), Point("", "kto_ds.staging.write_resume")],
    "precompute-ref": [Point("", "kto_ds.data.reference.write_shard"), Point("", "kto_ds.artifacts.seal")],
    "export": [Point("", "kto_ds.model.save.write_model")],
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "point"), [pytest.param(name, point, id=f"{name}, {point.target}") for name, points in FULL_ARTEFACT.items() for point in points])
def test_an_artefact_on_a_full_disk(tiny, unbroken, small_disk, tmp_path, name, point):
    run, folder, num_ranks = small_disk / "run", tmp_path / "fault", 2 if name == "precompute-ref" else 1
    folder.mkdir()
    places = {"prepare": {"data__artifact": run / "artefact"}, "precompute-ref": {"reference__artifact": run / "artefact"}, "export": {}}[name]
    if name == "export":
        subprocess.run(["cp", "-r", str(unbroken.run), str(run)], check=True)
        subprocess.run(["rm", "-rf", str(run / "export")], check=True)
    command = [name, *config_of(tiny, output_dir=run, **places)]
    target = run / ("export" if name == "export" else "artefact")
    with tally("R9", "prepare, precompute-ref and export on a full disk; then with space again") as counts:
        before = functools.partial(fill_at, point=point, on_rank=0, disk=small_disk, leave=0, folder=folder)
        counts.injected += 1
        require_refusal(command, tmp_path / "log", num_ranks=num_ranks, place=target, before=before)
        assert has_happened(folder) and not target.exists()
        (small_disk / BALLAST).unlink()
        ranks.require_success(command, log=tmp_path / "log", num_ranks=num_ranks)
        if name != "export":
            assert contents(target) == contents(tiny / ("dataset" if name == "prepare" else "reference"))
        counts.survived += 1


@pytest.mark.slow
@pytest.mark.parametrize("limited", [(0, 1), (0,), (1,)], ids=["both ranks", "rank 0", "rank 1"])
def test_a_limit_on_the_size_of_files(tiny, unbroken, tmp_path, limited):
    """EFBIG, as from a quota, on the first file of the first save that is larger."""
    run = tmp_path / "run"
    command = ["train", *config_of(tiny, output_dir=run)]
    with tally("R9", "RLIMIT_FSIZE below the size of a checkpoint's file; then without it") as counts:
        counts.injected += 1
        require_refusal(command, tmp_path / "log", num_ranks=2, place=run, before=functools.partial(limit_files, num_bytes=64 << 10, limited=limited))
        assert newest_intact(run) is None and not list(run.rglob(".tmp-step-*"))
        ranks.require_success(command, log=tmp_path / "log")
        assert final_state(run) == unbroken.state
        counts.survived += 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_ranks"), [("prepare", 1), ("precompute-ref", 2), ("train", 2), ("export", 1)])
def test_a_folder_that_is_read_only(tiny, unbroken, tmp_path, name, num_ranks):
    """A bind mount, which keeps root out too."""
    place = tmp_path / "place"
    place.mkdir()
    if name == "export":
        subprocess.run(["cp", "-r", str(unbroken.run), str(place / "run")], check=True)
        subprocess.run(["rm", "-rf", str(place / "run" / "export")], check=True)
    command = [name, *config_of(tiny, output_dir=place / "run", **{"prepare": {"data__artifact": place / "dataset"}, "precompute-ref": {"reference__artifact": place / "reference"}}.get(name, {}))]
    with tally("R10", "output on a read-only bind mount, each command") as counts:
        with mounted(place, "--bind", str(place)):
            subprocess.run(["mount", "-o", "remount,bind,ro", str(place)], check=True)
            counts.injected += 1
            with ranks.Ranks(command, log=tmp_path / "log", num_ranks=num_ranks) as started:
                assert set(started.wait(SECONDS)) == {2}, started.output()[-3000:]
                output = started.output()
            assert output.count("kto-ds: error:") - output.count("[rank 1]") == 1 and "Read-only" in output and "Traceback" not in output, output[-3000:]
            assert str(place) in output
        ranks.require_success(command, log=tmp_path / "log", num_ranks=num_ranks)
        counts.survived += 1
