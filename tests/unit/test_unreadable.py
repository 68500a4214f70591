"""A file that cannot be read is not a damaged one: one message names it, and nothing is renamed, deleted or made anew."""

import errno
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kto_ds import cli
from kto_ds.artifacts import MANIFEST, RESUME, damaged_files, describe_folder, incomplete_path, read_json, read_manifest, require_intact, seal, state_of, unlisted_files
from kto_ds.data.reference import committed_shards, plan_of
from kto_ds.errors import KtoError, Unreadable
from kto_ds.runtime import peers
from kto_ds.runtime.collectives import start
from kto_ds.runtime.restore import newest_verified
from kto_ds.runtime.retention import KIND, folder_bytes, list_checkpoints, step_folders
from kto_ds.runtime.unpickling import foreign_objects
from kto_ds.staging import resume_state
from tests.faults.injected import deny
from tests.unit.test_precompute import base, content_of, folder, run  # noqa: F401: fixtures

REASONS = (errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE)


@pytest.fixture
def artefact(tmp_path) -> Path:
    (tmp_path / "artefact").mkdir()
    (tmp_path / "artefact" / "rows.bin").write_bytes(b"0123456789")
    seal(tmp_path / "artefact", {"kind": "test"}, describe_folder(tmp_path / "artefact"))
    return tmp_path / "artefact"


def require_told(action: Callable[[], object], path: Path, reason: int) -> None:
    with pytest.raises(Unreadable) as caught:
        action()
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith(f"{path}: cannot be read on host {os.uname().nodename}: {os.strerror(reason)}\n  remedy: ")


@pytest.mark.parametrize("reason", REASONS, ids=errno.errorcode.get)
def test_a_file_that_cannot_be_read_is_not_damaged(artefact, monkeypatch, reason):
    manifest = read_manifest(artefact, kind="test", remedy="")
    deny(r"rows\.bin", reason, monkeypatch.setattr)
    require_told(lambda: damaged_files(artefact, manifest), artefact / "rows.bin", reason)
    require_told(lambda: require_intact(artefact, manifest, remedy=""), artefact / "rows.bin", reason)


@pytest.mark.parametrize("reason", REASONS, ids=errno.errorcode.get)
def test_neither_is_a_manifest(artefact, monkeypatch, reason):
    deny(MANIFEST, reason, monkeypatch.setattr)
    require_told(lambda: read_manifest(artefact, kind="test", remedy=""), artefact / MANIFEST, reason)
    assert state_of(artefact) == "sealed"


def test_what_must_not_be_looked_at_is_not_missing(artefact, monkeypatch):
    manifest = read_manifest(artefact, kind="test", remedy="")
    deny(r"artefact/", errno.EACCES, monkeypatch.setattr, functions=("lstat", "stat", "open"))
    require_told(lambda: state_of(artefact), artefact / MANIFEST, errno.EACCES)
    require_told(lambda: damaged_files(artefact, manifest), artefact / "rows.bin", errno.EACCES)
    monkeypatch.undo()
    deny(r"artefact$", errno.EIO, monkeypatch.setattr, functions=("scandir", "listdir"))
    require_told(lambda: unlisted_files(artefact, manifest), artefact, errno.EIO)


@pytest.mark.parametrize("reason", [errno.ENOENT, errno.ENOTDIR])
def test_what_is_missing_is_damage(artefact, monkeypatch, reason):
    manifest = read_manifest(artefact, kind="test", remedy="")
    deny(r"rows\.bin", reason, monkeypatch.setattr)
    assert damaged_files(artefact, manifest) == ["'rows.bin' is missing"]


def test_the_watch_goes_on_where_the_files_of_ranks_cannot_be_read(tmp_path, monkeypatch):
    peers.write_beat(tmp_path, peers.Beat(3, "host", 1, "step", 5, 1.5))
    deny(r"rank3", errno.ESTALE, monkeypatch.setattr)
    assert peers.read_beat(tmp_path, peers.this_process(3)) is None and peers.read_end(tmp_path, peers.this_process(3), token="now") is None


# checkpoints


@pytest.fixture
def checkpoints(tmp_path) -> Path:
    for step in (2, 4):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        (folder / "state").mkdir(parents=True)
        (folder / "state" / "rank0.bin").write_bytes(bytes(100))
        manifest = {"kind": KIND, "step": step, "world_size": 1, "zero": {}, "config": {}, "identity": {}, "plan": "", "progress": {}}
        seal(folder, manifest, describe_folder(folder))
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("name", ["state/rank0.bin", MANIFEST])
def test_a_checkpoint_is_not_passed_over(checkpoints, monkeypatch, name):
    world, before = start(timeout_seconds=60), sorted(checkpoints.rglob("*"))
    newest = checkpoints / "step-00000004"
    with monkeypatch.context() as patch:
        deny(f"00000004/{name}", errno.EIO, patch.setattr)
        require_told(lambda: newest_verified(checkpoints, world, sets_aside=True), newest / name, errno.EIO)
    assert sorted(checkpoints.rglob("*")) == before
    assert newest_verified(checkpoints, world, sets_aside=True).folder == newest
    (newest / name).unlink()
    assert newest_verified(checkpoints, world, sets_aside=True).folder.name == "step-00000002"
    assert newest.with_name(f"{newest.name}.corrupt.1").is_dir()


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(checkpoints, monkeypatch):
    deny(r"checkpoints$", errno.EACCES, monkeypatch.setattr, functions=("scandir", "listdir"))
    for look in (step_folders, list_checkpoints):
        require_told(lambda look=look: look(checkpoints), checkpoints, errno.EACCES)


def test_a_save_goes_on_beside_an_older_one_that_cannot_be_read(checkpoints, monkeypatch):
    deny(f"00000002/{MANIFEST}", errno.EIO, monkeypatch.setattr)
    assert folder_bytes(checkpoints / "step-00000002") == 0


def test_a_state_that_cannot_be_opened_holds_no_code(tmp_path, monkeypatch):
    (tmp_path / "state.pt").write_bytes(b"x")
    assert len(foreign_objects(tmp_path / "state.pt")) == 1
    deny(r"state\.pt", errno.EACCES, monkeypatch.setattr)
    require_told(lambda: foreign_objects(tmp_path / "state.pt"), tmp_path / "state.pt", errno.EACCES)


# what took hours to score


def require_untouched(folder: Path, place: Path, what: str, capsys, patch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """precompute-ref, which would make the artefact anew, ends with one message and changes nothing."""
    before = content_of(place)
    deny(what, errno.EACCES, patch.setattr)
    capsys.readouterr()
    assert run(folder, "precompute-ref") == 2
    told = capsys.readouterr()
    assert told.err.count("kto-ds: error: ") == 1 and "cannot be read on host" in told.err and "Permission denied" in told.err and "scoring" not in told.out
    patch.undo()
    assert content_of(place) == before


@pytest.mark.parametrize("what", [r"reference/scored-000001", rf"reference/{MANIFEST}"])
def test_log_probs_that_cannot_be_read_are_not_scored_anew(folder, capsys, monkeypatch, what):  # noqa: F811
    require_untouched(folder, folder / "run" / "reference", what, capsys, monkeypatch)
    assert run(folder, "precompute-ref") == 0 and "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("what", [r"reference\.incomplete/scored-000001", rf"reference\.incomplete/{RESUME}"])
def test_unfinished_work_that_cannot_be_read_is_not_deleted(folder, capsys, monkeypatch, what):  # noqa: F811
    final = folder / "run" / "reference"
    shutil.rmtree(final)
    monkeypatch.setattr("kto_ds.stages.precompute_ref.seal", fail)
    assert run(folder, "precompute-ref") == 1
    monkeypatch.undo()
    unfinished = incomplete_path(final)
    assert len(committed_shards(unfinished, plan_of(resume_state(unfinished)))) > 1
    require_untouched(folder, unfinished, what, capsys, monkeypatch)
    assert run(folder, "precompute-ref") == 0
    assert "cut short" in capsys.readouterr().out


def fail(*arguments: object) -> None:
    raise KtoError("killed here")


def test_a_dataset_that_cannot_be_read_is_refused_by_name(folder, capsys, monkeypatch):  # noqa: F811
    deny(r"dataset/train/prompt_of\.npy", errno.EIO, monkeypatch.setattr)
    capsys.readouterr()
    for command in ("train", "verify"):
        assert cli.run([command, "--config", str(folder / "run.yaml")]) == 2
        told = capsys.readouterr().err
        assert told.count("kto-ds: error: ") == 1 and "prompt_of.npy: cannot be read on host" in told and "kto-ds prepare" not in told


def test_json_that_is_missing_is_still_a_matter_of_its_reader(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_json(tmp_path / "none.json")
    assert io.open is open, "both are denied alike"
