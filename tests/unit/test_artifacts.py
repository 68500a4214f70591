"""Artefacts are whole or absent, and damage or a mix-up is found before anything is read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kto_ds.artifacts import (
    can_resume,
    damaged_files,
    describe_folder,
    digest_of,
    file_digest,
    folder_digest,
    incomplete_path,
    move_into_place,
    read_manifest,
    recover,
    require_intact,
    require_match,
    resumable_folder,
    seal,
    staged_folder,
    write_atomically,
)  # fmt: skip
from kto_ds.errors import UserError

REMEDY = "run it again"


def make_artifact(folder: Path, content: bytes = b"0123456789", kind: str = "test") -> dict:
    with staged_folder(folder) as staging:
        (staging / "part").mkdir()
        (staging / "part" / "rows.bin").write_bytes(content)
        (staging / "names.txt").write_text("a\nb\n")
        seal(staging, {"kind": kind}, describe_folder(staging))
    return read_manifest(folder, kind=kind, remedy=REMEDY)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# digests


def test_digests_tell_where_one_part_ends():
    digests = [digest_of("ab", "c"), digest_of("a", "bc"), digest_of("abc"), digest_of("abc", ""), digest_of("", "abc"), digest_of()]
    assert len(set(digests)) == len(digests) and all(len(digest) == 32 for digest in digests)
    assert digest_of("a", "b") == digest_of(b"a", b"b") != digest_of("b", "a")


def test_text_that_is_not_valid_unicode_has_a_digest():
    assert digest_of("\ud800") != digest_of("?")


def test_a_folder_digest_covers_names_and_contents(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    both = folder_digest(tmp_path, ["a", "b"])
    assert both == folder_digest(tmp_path, ["b", "a"]) != folder_digest(tmp_path, ["a"])
    (tmp_path / "a").rename(tmp_path / "c")
    assert folder_digest(tmp_path, ["c", "b"]) != both


def test_a_file_longer_than_a_chunk_has_the_digest_of_all_its_bytes(tmp_path):
    content = os.urandom((1 << 22) + 17)
    (tmp_path / "long").write_bytes(content)
    (tmp_path / "other").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert file_digest(tmp_path / "long") != file_digest(tmp_path / "other")


# writing


def test_an_artefact_is_complete_and_leaves_nothing_beside_it(tmp_path):
    manifest = make_artifact(tmp_path / "deep" / "artefact")
    assert sorted(manifest["files"]) == ["names.txt", "part/rows.bin"]
    assert manifest["files"]["part/rows.bin"] == {"bytes": 10, "digest": file_digest(tmp_path / "deep" / "artefact" / "part" / "rows.bin")}
    assert damaged_files(tmp_path / "deep" / "artefact", manifest) == []
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["artefact"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_after_an_exception_nothing_half_written_is_left(tmp_path, error):
    with pytest.raises(error), staged_folder(tmp_path / "artefact") as staging:
        (staging / "half").write_text("...")
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_exception_the_older_artefact_is_as_it_was(tmp_path, error):
    make_artifact(tmp_path / "artefact")
    before = tree(tmp_path)
    with pytest.raises(error), staged_folder(tmp_path / "artefact") as staging:
        (staging / "half").write_text("...")
        raise error
    assert tree(tmp_path) == before


def test_a_newer_artefact_replaces_the_older_one_whole(tmp_path):
    make_artifact(tmp_path / "artefact")
    with staged_folder(tmp_path / "artefact") as staging:
        (staging / "only").write_text("new")
        assert (tmp_path / "artefact" / "names.txt").exists()  # until the block ends
        seal(staging, {"kind": "test"}, describe_folder(staging))
    assert sorted(tree(tmp_path)) == ["artefact/manifest.json", "artefact/only"]


def test_what_a_killed_run_left_is_swept_away(tmp_path):
    stale = incomplete_path(tmp_path / "artefact")
    stale.mkdir()
    (stale / "stale").write_text("...")
    make_artifact(tmp_path / "artefact")
    assert "stale" not in {name.rsplit("/", 1)[-1] for name in tree(tmp_path)} and not stale.exists()


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write") as caught, staged_folder(tmp_path / "file" / "artefact"):
        raise AssertionError("the block must not run")
    assert caught.value.where == str(tmp_path / "file" / "artefact")


def test_a_full_disk_inside_the_block_is_one_message(tmp_path):
    with pytest.raises(UserError, match="cannot write: No space left on device"), staged_folder(tmp_path / "artefact"):
        raise OSError(28, os.strerror(28))
    assert list(tmp_path.iterdir()) == []


def test_a_small_file_is_replaced_and_leaves_no_temporary(tmp_path):
    for text in ("one", "zwei \u00e4"):
        write_atomically(tmp_path / "status.json", text)
        assert (tmp_path / "status.json").read_text(encoding="utf-8") == text
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


# going on where a killed run was

IDENTITY = {"tokenizer": "t", "max_length": 8, "sources": [["a.jsonl", None, {"1": True}]]}


def test_two_processes_do_not_write_one_artefact(tmp_path):
    final = tmp_path / "artefact"
    other = """
import sys
from pathlib import Path
from kto_ds.artifacts import resumable_folder
from kto_ds.errors import UserError
try:
    with resumable_folder(Path(sys.argv[1]), {}):
        print("got in")
except UserError as error:
    print(error)
"""
    command = [sys.executable, "-c", other, str(final)]
    with resumable_folder(final, IDENTITY) as folder:
        found = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60).stdout
        assert found.startswith(f"{final}: another run is writing here") and (folder / "resume.json").exists()
        seal(folder, {"kind": "test"}, {})
    assert "got in" in subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60).stdout


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, UserError])
def test_what_was_done_is_there_again_after_any_exception(tmp_path, error):
    final = tmp_path / "artefact"
    with pytest.raises(error), resumable_folder(final, IDENTITY) as folder:
        (folder / "one").write_text("1")
        raise error("stop")
    assert can_resume(final, IDENTITY) and not final.exists()
    with resumable_folder(final, json.loads(json.dumps(IDENTITY))) as folder:
        assert (folder / "one").read_text() == "1"
        (folder / "two").write_text("2")
        seal(folder, {"kind": "test"}, describe_folder(folder))
    manifest = read_manifest(final, kind="test", remedy=REMEDY)
    assert damaged_files(final, manifest) == [] and sorted(tree(final)) == ["manifest.json", "one", "two"]
    assert not can_resume(final, IDENTITY)


@pytest.mark.parametrize("changed", [{**IDENTITY, "max_length": 9}, {**IDENTITY, "sources": []}, {}, {**IDENTITY, "more": None}])
def test_the_beginning_of_something_else_is_swept_away(tmp_path, changed):
    with pytest.raises(RuntimeError), resumable_folder(tmp_path / "artefact", IDENTITY) as folder:
        (folder / "one").write_text("1")
        raise RuntimeError
    assert not can_resume(tmp_path / "artefact", changed)
    with resumable_folder(tmp_path / "artefact", changed) as folder:
        assert [path.name for path in folder.iterdir()] == ["resume.json"]


@pytest.mark.parametrize("found", [None, "", "{", '{"format": 1, "identity": {}}'])
def test_an_unfinished_folder_that_does_not_say_what_it_is_starts_anew(tmp_path, found):
    unfinished = incomplete_path(tmp_path / "artefact")
    unfinished.mkdir()
    (unfinished / "stale").write_text("...")
    if found is not None:
        (unfinished / "resume.json").write_text(found)
    with resumable_folder(tmp_path / "artefact", {}) as folder:
        assert not (folder / "stale").exists()


def test_a_kill_after_the_seal_does_not_put_the_old_manifest_into_the_new_one(tmp_path):
    with pytest.raises(RuntimeError), resumable_folder(tmp_path / "artefact", IDENTITY) as folder:
        seal(folder, {"kind": "test", "attempt": 1}, describe_folder(folder))
        raise RuntimeError
    with resumable_folder(tmp_path / "artefact", IDENTITY) as folder:
        (folder / "rows").write_text("...")
        seal(folder, {"kind": "test", "attempt": 2}, describe_folder(folder))
    manifest = read_manifest(tmp_path / "artefact", kind="test", remedy=REMEDY)
    assert manifest["attempt"] == 2 and list(manifest["files"]) == ["rows"] and damaged_files(tmp_path / "artefact", manifest) == []


def test_a_full_disk_is_one_message_and_what_was_done_stays(tmp_path):
    with pytest.raises(UserError, match="cannot write: No space left on device"), resumable_folder(tmp_path / "artefact", IDENTITY) as folder:
        (folder / "one").write_text("1")
        raise OSError(28, os.strerror(28))
    assert can_resume(tmp_path / "artefact", IDENTITY) and (incomplete_path(tmp_path / "artefact") / "one").exists()


class Killed(BaseException):
    """Stands for SIGKILL: no code of ours runs after it."""


@pytest.mark.parametrize("num_renames", [0, 1, 2])
def test_a_kill_while_the_newer_artefact_replaces_the_older_one_leaves_one_of_them(tmp_path, monkeypatch, num_renames):
    final, staging = tmp_path / "artefact", tmp_path / "newer"
    make_artifact(final, b"older")
    staging.mkdir()
    (staging / "only").write_text("newer")
    seal(staging, {"kind": "test"}, describe_folder(staging))
    done = []

    def rename(self: Path, target: Path) -> None:
        if len(done) == num_renames:
            raise Killed
        done.append(os.rename(self, target))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        if num_renames < 2:
            with pytest.raises(Killed):
                move_into_place(staging, final)
        else:
            move_into_place(staging, final)
    manifest = read_manifest(final, kind="test", remedy=REMEDY)
    assert damaged_files(final, manifest) == [] and ("only" in manifest["files"]) == (num_renames == 2)
    recover(final)
    if staging.exists():
        move_into_place(staging, final)
    assert sorted(tree(tmp_path)) == ["artefact/manifest.json", "artefact/only"]


def test_a_kill_before_the_older_artefact_was_deleted_leaves_no_trace(tmp_path):
    make_artifact(tmp_path / "artefact")
    (tmp_path / ".artefact.old").mkdir()
    (tmp_path / ".artefact.old" / "stale").write_text("...")
    recover(tmp_path / "artefact")
    assert [path.name for path in tmp_path.iterdir()] == ["artefact"]


# reading


def test_a_missing_and_an_unfinished_artefact_are_told_apart(tmp_path):
    with pytest.raises(UserError, match="the test artefact is missing") as caught:
        read_manifest(tmp_path / "artefact", kind="test", remedy=REMEDY)
    assert REMEDY in str(caught.value) and str(tmp_path / "artefact") in str(caught.value)
    incomplete_path(tmp_path / "artefact").mkdir()
    with pytest.raises(UserError, match="is unfinished"):
        read_manifest(tmp_path / "artefact", kind="test", remedy=REMEDY)


def test_another_kind_of_artefact_is_named(tmp_path):
    make_artifact(tmp_path / "artefact", kind="dataset")
    with pytest.raises(UserError, match="expected a reference artefact, found 'dataset'"):
        read_manifest(tmp_path / "artefact", kind="reference", remedy=REMEDY)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"kind"', '{"kind": "test"}', '{"kind": "test", "files": []}', "\ufffd"])
def test_a_damaged_manifest_is_one_message(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_manifest(tmp_path, kind="test", remedy=REMEDY)
    assert str(tmp_path) in str(caught.value) and REMEDY in str(caught.value)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def point_elsewhere(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


DAMAGE = {
    flip: "part/rows.bin does not have the digest of the manifest",
    truncate: "part/rows.bin has 9 bytes, the manifest says 10",
    grow: "part/rows.bin has 11 bytes, the manifest says 10",
    Path.unlink: "part/rows.bin is missing",
    point_elsewhere: "'part/rows.bin' is not a plain file",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_found_and_named(tmp_path, damage):
    manifest = make_artifact(tmp_path / "artefact")
    damage(tmp_path / "artefact" / "part" / "rows.bin")
    [problem] = damaged_files(tmp_path / "artefact", manifest)
    assert DAMAGE[damage] in problem
    with pytest.raises(UserError, match="the artefact is damaged") as caught:
        require_intact(tmp_path / "artefact", manifest, remedy=REMEDY)
    assert problem in str(caught.value) and REMEDY in str(caught.value)


def test_any_flipped_bit_is_found(tmp_path):
    manifest = make_artifact(tmp_path / "artefact", bytes(range(40)))
    path = tmp_path / "artefact" / "part" / "rows.bin"
    for bit in range(8 * 40):
        content = bytearray(range(40))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        assert len(damaged_files(tmp_path / "artefact", manifest)) == 1


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "part/../../outside"])
def test_a_manifest_cannot_point_out_of_its_folder(tmp_path, name):
    make_artifact(tmp_path / "artefact")
    (tmp_path / "outside").write_text("x")
    path = tmp_path / "artefact" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = {"bytes": 1, "digest": file_digest(tmp_path / "outside")}
    assert "is not a plain file inside the folder" in damaged_files(tmp_path / "artefact", manifest)[0]


# mix-ups


def test_every_differing_field_is_named_with_both_values():
    expected = {"tokenizer": "t-1", "model": "m-1", "max_length": 512, "shuffle": True}
    found = {"tokenizer": "t-2", "model": "m-1", "max_length": 1024, "extra": 1}
    with pytest.raises(UserError) as caught:
        require_match(expected, found, where="reference.artifact", remedy=REMEDY)
    lines = str(caught.value).splitlines()
    assert lines[0] == "reference.artifact: does not belong to this run, 3 differences:"
    assert lines[1:4] == [
        "  tokenizer: this run has 't-1', the artefact has 't-2'",
        "  max_length: this run has 512, the artefact has 1024",
        "  shuffle: this run has True, the artefact has None",
    ]
    assert REMEDY in lines[4]


def test_further_differences_are_told_beside_those_of_fields():
    with pytest.raises(UserError) as caught:
        require_match({"a": 1}, {"a": 1}, where="x", remedy=REMEDY, besides=["the content of rows.jsonl has changed"])
    assert str(caught.value) == f"x: does not belong to this run, 1 difference:\n  the content of rows.jsonl has changed\n  remedy: {REMEDY}"


def test_equal_fields_and_unknown_ones_pass():
    require_match({"a": [1, {"b": 2.0}]}, {"a": [1, {"b": 2.0}], "later": 3}, where="x", remedy=REMEDY)


def test_a_value_cannot_write_control_codes_to_the_terminal():
    with pytest.raises(UserError) as caught:
        require_match({"model": "m"}, {"model": "\x1b[2Jgone\n"}, where="x", remedy=REMEDY)
    assert "\x1b" not in str(caught.value) and r"\x1b[2Jgone\n" in str(caught.value)


def test_a_difference_deep_in_a_section_is_shown():
    from kto_ds.config import OptimConfig

    expected, found = (OptimConfig(max_grad_norm=norm).model_dump(mode="json") for norm in (1.0, 0.5))
    with pytest.raises(UserError) as caught:
        require_match({"optim": expected}, {"optim": found}, where="x", remedy=REMEDY)
    assert "max_grad_norm" in str(caught.value) and "0.5" in str(caught.value)
