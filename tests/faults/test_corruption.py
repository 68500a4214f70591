"""Damage to checkpoints: it is found, named and set aside, the checkpoint before it is used, and the run ends as if nothing had been."""

import errno
import io
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from kto_ds import cli
from kto_ds.runtime.collectives import start
from kto_ds.runtime.restore import newest_verified
from tests.distributed import ranks
from tests.distributed.tiny_run import config_of
from tests.faults.injected import deny, messages
from tests.faults.ledger import record, tally
from tests.faults.state import checkpoints_of, final_state, step_of

pytestmark = pytest.mark.distributed

SEED = 20261121


def flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    bit = chance.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def cut_to_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_by_a_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def cut_to_nothing(path: Path) -> None:
    path.write_bytes(b"")


def grown_by_a_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def all_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def end_of_zeros(path: Path) -> None:
    """As a file that had its size before the machine went down, but not all of its content."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2].ljust(len(content), b"\0"))


def deleted(path: Path) -> None:
    path.unlink()


def swapped(path: Path) -> None:
    """Two files of one checkpoint change names: those of two ranks, or the generators and a state; a manifest is that of the checkpoint before."""
    if path.name == "manifest.json":
        other = path.parents[1] / f"step-{step_of(path.parent) - 2:08d}" / path.name
        path.write_bytes(other.read_bytes())
        return
    names = {"zero_pp_rank_0_": "zero_pp_rank_1_", "zero_pp_rank_1_": "zero_pp_rank_0_"}
    other = next((path.with_name(path.name.replace(one, two)) for one, two in names.items() if one in path.name), None) or sorted(path.parent.rglob("*.pt"))[0]
    ours, theirs = path.read_bytes(), other.read_bytes()
    assert ours != theirs
    path.write_bytes(theirs)
    other.write_bytes(ours)


FAULTS = (cut_to_half, cut_by_a_byte, cut_to_nothing, grown_by_a_byte, all_zeros, end_of_zeros, deleted, swapped)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def damaged_run(unbroken, tmp_path_factory) -> Path:
    """A copy of the unbroken run, for tests in this process that put back what they damage."""
    return Path(shutil.copytree(unbroken.run, tmp_path_factory.mktemp("damaged") / "run"))


@contextmanager
def put_back(run: Path, sound: Path) -> Iterator[Path]:
    """Yield the newest checkpoint, and replace it after the block by the sound one; the one before it is put back too."""
    try:
        yield checkpoints_of(run)[-1]
    finally:
        shutil.rmtree(run / "checkpoints")
        shutil.copytree(sound / "checkpoints", run / "checkpoints")


def require_found(tiny: Path, run: Path, path: Path, capsys) -> None:
    """verify refuses the newest checkpoint by name, and a resume takes the one before it, says which file is why, and deletes nothing."""
    newest, before = checkpoints_of(run)[-1], checkpoints_of(run)[-2]
    capsys.readouterr()
    if (newest / "manifest.json").exists():  # verify looks at what is sealed
        assert cli.run(["verify", *config_of(tiny, output_dir=run)]) == 2
        assert str(newest) in capsys.readouterr().err
    chosen = newest_verified(run / "checkpoints", start(timeout_seconds=60), sets_aside=True)
    assert chosen is not None and chosen.folder == before
    printed = capsys.readouterr().out
    assert newest.name in printed and (path.name in printed or path.name == "manifest.json"), printed
    assert newest.with_name(f"{newest.name}.corrupt.1").is_dir()


@pytest.mark.parametrize("num_flips", [60, pytest.param(600, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_found(tiny, unbroken, damaged_run, capsys, num_flips):
    """Over all files in turn, at random places. What torch.load makes of the same bytes is counted beside it."""
    chance = random.Random(f"{SEED} {num_flips}")
    names = [path.relative_to(damaged_run).as_posix() for path in files_of(checkpoints_of(damaged_run)[-1])]
    noticed = loaded = 0
    with tally("R6", f"one flipped bit in a file of the newest checkpoint, all files in turn, seed {SEED}", stock="torch.load raised at 0 of 300, safetensors at 0 of 300") as counts:
        for number in range(num_flips):
            with put_back(damaged_run, unbroken.run):
                path = damaged_run / names[number % len(names)]
                flip(path, chance)
                counts.injected += 1
                if path.suffix == ".pt":
                    loaded += 1
                    noticed += not loads(path.read_bytes())
                require_found(tiny, damaged_run, path, capsys)
                counts.survived += 1
    with capsys.disabled():
        print(f"\n{num_flips} flipped bits (seed {SEED}) in {len(names)} files found; torch.load raised at {noticed} of the {loaded} in .pt files")


def loads(content: bytes) -> bool:
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=False)
    except Exception:
        return False
    return True


def test_every_fault_of_a_whole_file_is_found(tiny, unbroken, damaged_run, capsys):
    with tally("R7", "a file of the newest checkpoint cut, zeroed, grown, deleted or swapped: every file") as counts:
        for name in [path.relative_to(damaged_run).as_posix() for path in files_of(checkpoints_of(damaged_run)[-1])]:
            for fault in FAULTS:
                with put_back(damaged_run, unbroken.run):
                    fault(damaged_run / name)
                    counts.injected += 1
                    require_found(tiny, damaged_run, damaged_run / name, capsys)
                    counts.survived += 1


def flipped(path: Path) -> None:
    flip(path, random.Random(SEED))


KINDS = {"model": "state/zero_pp_rank_0_*model_states.pt", "optimizer": "state/*rank_1*optim_states.pt", "generators": "rng.safetensors", "manifest": "manifest.json"}
QUICK = {("optimizer", flipped)}


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        pytest.param(kind, fault, id=f"{kind}, {fault.__name__}", marks=[] if (kind, fault) in QUICK else pytest.mark.slow)
        for kind in KINDS for fault in (flipped, *FAULTS)
    ],
)  # fmt: skip
def test_a_run_ends_the_same(tiny, unbroken, tmp_path, kind: str, fault: Callable):
    """The whole way: damage, resume from the checkpoint before, the steps again, the same end."""
    run = Path(shutil.copytree(unbroken.run, tmp_path / "run"))
    newest = checkpoints_of(run)[-1]
    [path] = newest.glob(KINDS[kind])
    with tally("R6" if fault is flipped else "R7", f"{'one flipped bit' if fault is flipped else 'a file damaged as a whole'}, then the run to its end") as counts:
        fault(path)
        counts.injected += 1
        output = ranks.require_success(["train", *config_of(tiny, output_dir=run)], log=tmp_path / "log")
        assert "resuming at step 11 of 12" in output, output[-3000:]
        assert final_state(run) == unbroken.state
        counts.survived += 1


def deny_one_rank(rank: int, *, victim: int, pattern: str, reason: int) -> None:
    if rank == victim:
        deny(pattern, reason)


UNREADABLE = [(1, r"step-00000012/state/.*\.pt", errno.EIO), (0, r"step-00000012/manifest\.json", errno.EACCES)]


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "pattern", "reason"), UNREADABLE)
def test_what_one_rank_cannot_read_is_not_damaged(tiny, unbroken, tmp_path, victim, pattern, reason):
    """A disk, a mount or a right of one machine: all ranks end with one message, nothing is set aside, and the same command goes on once it is mended."""
    run = Path(shutil.copytree(unbroken.run, tmp_path / "run"))
    before, command = files_of(run / "checkpoints"), ["train", *config_of(tiny, output_dir=run)]
    exit_codes, output = ranks.run(command, log=tmp_path / "log", before=partial(deny_one_rank, victim=victim, pattern=pattern, reason=reason))
    assert exit_codes == [2, 2], output[-3000:]
    [message] = messages(output)
    assert re.fullmatch(rf"kto-ds: error: \S+{pattern}: cannot be read on host \S+: {os.strerror(reason)}", message), message
    assert files_of(run / "checkpoints") == before
    ranks.require_success(command, log=tmp_path / "log")
    assert final_state(run) == unbroken.state
    record("R7", f"a file that cannot be read, {errno.errorcode[reason]}", injected=1, survived=1, seconds=0.0)


@pytest.mark.slow
def test_a_file_too_many_changes_nothing_and_is_named(tiny, unbroken, tmp_path, capsys):
    """A shard of a third rank that lies there would be read by whoever counts files."""
    with tally("R7", "a file too many in the newest checkpoint") as counts:
        for number, name in enumerate(("state/zero_pp_rank_2_mp_rank_00_optim_states.pt", "state/zero_pp_rank_2_mp_rank_00_model_states.pt", "notes.txt")):
            run = Path(shutil.copytree(unbroken.run, tmp_path / f"run{number}"))
            newest = checkpoints_of(run)[-1]
            counts.injected += 1
            shutil.copy(next(newest.glob(KINDS["optimizer"])), newest / name)
            capsys.readouterr()
            assert cli.run(["verify", *config_of(tiny, output_dir=run)]) == 2
            assert Path(name).name in capsys.readouterr().out
            ranks.require_success(["train", *config_of(tiny, output_dir=run)], log=tmp_path / "log")
            assert final_state(run) == unbroken.state
            counts.survived += 1
