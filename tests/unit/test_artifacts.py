"""Artefacts are whole or absent, and damage or a mix-up is found before anything is read."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kto_ds.artifacts import (
    FORMAT,
    MAX_JSON_BYTES,
    canonical_json,
    damaged_files,
    describe_folder,
    digest_of,
    file_digest,
    folder_digest,
    incomplete_path,
    move_into_place,
    read_json,
    read_manifest,
    recover,
    require_intact,
    require_match,
    seal,
    state_of,
    unlisted_files,
    write_atomically,
)  # fmt: skip
from kto_ds.errors import UserError, excerpt
from kto_ds.staging import can_resume, finish_folder, locked, resumable_folder, resume_state, staged_folder, write_resume

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


def test_a_folder_digest_is_that_of_its_files_one_after_the_other(tmp_path):
    assert folder_digest(tmp_path, []) == digest_of()
    names = [f"weights-{number}.bin" for number in range(20)]
    for name in names:
        (tmp_path / name).write_bytes(os.urandom(random.Random(name).choice([0, 1, 1000, (1 << 22) + 1])))
    one_by_one = [part for name in sorted(names) for part in (name, file_digest(tmp_path / name))]
    assert folder_digest(tmp_path, names[::-1]) == digest_of(*one_by_one)
    with pytest.raises(FileNotFoundError):
        folder_digest(tmp_path, [*names, "none"])


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


class Killed(BaseException):
    """Stands for SIGKILL: no code of ours runs after it."""


IDENTITY = {"tokenizer": "t", "max_length": 8, "sources": [["a.jsonl", None, {"1": True}]]}


def test_two_processes_do_not_write_one_artefact(tmp_path):
    final = tmp_path / "artefact"
    other = """
import sys
from pathlib import Path
from kto_ds.staging import resumable_folder
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


@pytest.mark.parametrize("identity", [IDENTITY, {}, {"a": [1, 2.5, None, "\ud800", {"b": True}]}, [1], "text"])
def test_what_an_unfinished_folder_was_begun_with_is_told(tmp_path, identity):
    assert resume_state(tmp_path / "none") is None and resume_state(tmp_path) is None
    write_resume(tmp_path, identity)
    assert resume_state(tmp_path) == identity


@pytest.mark.parametrize(
    "found", [b"", b"{", b"[]", b"7", b"\xff", b'{"identity": {}}', b'{"format": %d}' % FORMAT, b'{"format": %d, "identity": {}}' % (FORMAT - 1), b"[" * 100_000]
)
def test_what_does_not_tell_is_not_gone_on_with(tmp_path, found):
    (tmp_path / "resume.json").write_bytes(found)
    assert resume_state(tmp_path) is None


@pytest.mark.parametrize("other", [1, 1.0, "1", [True]])
def test_values_of_other_types_are_other_values(tmp_path, other):
    with pytest.raises(RuntimeError), resumable_folder(tmp_path / "artefact", {"a": True}):
        raise RuntimeError
    assert can_resume(tmp_path / "artefact", {"a": True}) and not can_resume(tmp_path / "artefact", {"a": other})


def test_numbers_that_are_keys_are_the_text_that_json_makes_of_them(tmp_path):
    identity = {"sizes": {10: "a", 9: "b", 1: "c"}}
    with pytest.raises(RuntimeError), resumable_folder(tmp_path / "artefact", identity):
        raise RuntimeError
    assert can_resume(tmp_path / "artefact", identity)
    seal(tmp_path, {"kind": "test", "identity": identity}, {})
    assert read_manifest(tmp_path, kind="test", remedy=REMEDY)["identity"] == json.loads(json.dumps(identity))


def test_a_lock_is_held_until_the_block_ends(tmp_path):
    with locked(tmp_path / "artefact"):
        with pytest.raises(UserError, match="another run is writing here"), locked(tmp_path / "artefact"):
            raise AssertionError("the block must not run")
        with locked(tmp_path / "other"):
            pass
    with pytest.raises(RuntimeError), locked(tmp_path / "artefact"):
        raise RuntimeError
    with locked(tmp_path / "artefact"):
        pass


def unfinished(final: Path) -> Path:
    staging = incomplete_path(final)
    staging.mkdir()
    write_resume(staging, IDENTITY)
    (staging / "rows").write_text("...")
    seal(staging, {"kind": "test"}, describe_folder(staging))
    return staging


def test_a_kill_between_the_rename_and_the_end_loses_nothing(tmp_path):
    final = tmp_path / "artefact"
    move_into_place(unfinished(final), final)  # the kill comes here
    assert (final / "resume.json").exists() and not can_resume(final, IDENTITY)
    manifest = read_manifest(final, kind="test", remedy=REMEDY)
    assert list(manifest["files"]) == ["rows"] and damaged_files(final, manifest) == unlisted_files(final, manifest) == []
    assert sorted(tree(tmp_path)) == ["artefact/manifest.json", "artefact/rows"]  # whoever reads it clears up


def test_what_is_unfinished_stays_so_when_it_is_moved_or_recovered(tmp_path):
    for attempt in ("first", "second"):  # an unfinished folder takes the place of an older one
        (tmp_path / "next").mkdir()
        write_resume(tmp_path / "next", {"attempt": attempt})
        move_into_place(tmp_path / "next", incomplete_path(tmp_path / "artefact"))
        recover(incomplete_path(tmp_path / "artefact"))
        assert state_of(tmp_path / "artefact") == "unfinished" and can_resume(tmp_path / "artefact", {"attempt": attempt})


def test_a_kill_before_the_rename_leaves_what_can_be_gone_on_with(tmp_path, monkeypatch):
    final = tmp_path / "artefact"
    staging = unfinished(final)

    def killed(self: Path, target: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(Killed):
            finish_folder(staging, final)
    assert can_resume(final, IDENTITY) and (staging / "rows").exists() and state_of(final) == "unfinished"
    finish_folder(staging, final)
    assert sorted(tree(tmp_path)) == ["artefact/manifest.json", "artefact/rows"]


def test_a_kill_within_the_seal_leaves_no_trace_in_the_next_attempt(tmp_path):
    (tmp_path / "rows").write_text("...")
    (tmp_path / ".manifest.json.4711.tmp").write_text('{"kind"')
    files = describe_folder(tmp_path)
    seal(tmp_path, {"kind": "test"}, files)
    assert list(files) == ["rows"] and sorted(tree(tmp_path)) == ["manifest.json", "rows"]


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


PLAIN = {"bytes": 2, "digest": "0" * 32}


def write_manifest(folder: Path, **changes) -> Path:
    """A manifest that has its own digest, whatever it says."""
    content = {"format": FORMAT, "kind": "test", "files": {"a": PLAIN}, **changes}
    (folder / "manifest.json").write_text(json.dumps({**content, "digest": digest_of(canonical_json(content))}))
    return folder / "manifest.json"


def refused(folder: Path, *, kind: str = "test") -> str:
    with pytest.raises(UserError) as caught:
        read_manifest(folder, kind=kind, remedy=REMEDY)
    assert str(folder) in str(caught.value) and REMEDY in str(caught.value) and str(caught.value).replace("\n", "").isprintable()
    return caught.value.what


@pytest.mark.parametrize("seed", range(60))
def test_any_flipped_bit_of_a_manifest_is_found(tmp_path, seed):
    (tmp_path / "rows").write_text("...")
    seal(tmp_path, {"kind": "test", "identity": {"max_length": 512, "sources": ["a.jsonl", None]}, "step": 0, "share": 0.125, "on": True}, describe_folder(tmp_path))
    path = tmp_path / "manifest.json"
    read_manifest(tmp_path, kind="test", remedy=REMEDY)
    content = bytearray(path.read_bytes())
    bit = random.Random(seed).randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    refused(tmp_path)


def test_a_changed_word_or_number_or_a_left_out_entry_is_found(tmp_path):
    manifest = {**make_artifact(tmp_path), "step": 7}
    seal(tmp_path, manifest, manifest["files"])
    whole = json.loads((tmp_path / "manifest.json").read_text())
    others = [{**whole, "step": 8}, {**whole, "step": 7.0}, {**whole, "kind": "tests"}, {**whole, "more": None}, {**whole, "digest": None}, {**whole, "files": {}}]
    for other in [*others, *({key: value for key, value in whole.items() if key != left_out} for left_out in whole if left_out != "format")]:
        (tmp_path / "manifest.json").write_text(json.dumps(other))
        assert refused(tmp_path) == "damaged manifest: its content does not have its own digest"
    (tmp_path / "manifest.json").write_text(json.dumps(whole, sort_keys=True))  # the same in other words
    assert read_manifest(tmp_path, kind="test", remedy=REMEDY) == manifest


def test_what_was_read_can_be_sealed_again(tmp_path):
    manifest = make_artifact(tmp_path)
    assert "digest" not in manifest
    seal(tmp_path, {**manifest, "digest": "of another time"}, manifest["files"])
    assert read_manifest(tmp_path, kind="test", remedy=REMEDY) == manifest


@pytest.mark.parametrize("found", [1, FORMAT - 1, FORMAT + 1, None, True, str(FORMAT), float(FORMAT), "\x1b[2J", [[]]])
def test_another_format_is_told_before_anything_else(tmp_path, found):
    (tmp_path / "manifest.json").write_text(json.dumps({"format": found, "kind": "other", "files": 7}))
    assert refused(tmp_path) == f"written in format {ascii(found)}, this version reads {FORMAT}"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ('{"format": 3, "format": 3}', "the key 'format' occurs twice"),
        ('{"format": 3, "files": {"\\u001b[2J": 1, "\\u001b[2J": 1}}', r"the key '\x1b[2J' occurs twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"format": 3, "a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ("[]", "names no format"),
        ('{"kind": "test"}', "names no format"),
        ('{"format": 3}', "its own digest"),
        ("\udcff", "can't decode byte 0xff"),
        ('{"format": ' + "1" * 10_000 + "}", "4300"),
    ],
)
def test_what_is_wrong_with_a_manifest_is_told(tmp_path, text, problem):
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    assert refused(tmp_path).startswith("damaged manifest: ") and problem in refused(tmp_path)


def test_the_key_that_occurs_twice_is_found_among_many(tmp_path):
    with within_seconds(20):
        keys = [f'"{number}": 0' for number in range(300_000)]
        (tmp_path / "manifest.json").write_text("{" + ", ".join([*keys, keys[-1]]) + "}")
        assert refused(tmp_path) == "damaged manifest: the key '299999' occurs twice"


@pytest.mark.parametrize(
    "name", ["", ".", "..", "/", "/etc/hostname", "a/", "a//b", "./a", "a/.", "a/../b", "../a", "a/..", "manifest.json", "a\0b", "\ud800", "\x1b[2J/../a"]
)
def test_a_name_that_no_file_inside_can_have(tmp_path, name):
    write_manifest(tmp_path, files={"good": PLAIN, name: PLAIN})
    assert refused(tmp_path) == f"damaged manifest: files: {ascii(name)} is not the name of a file inside the folder"
    assert damaged_files(tmp_path, {"files": {name: PLAIN}}) == [f"{ascii(name)} is not a plain file inside the folder"]


@pytest.mark.parametrize("name", ["a", "a/b", "a b", "..a", "a..", ".hidden", "part/manifest.json", "a\\b", "\xe4", "\udcff", "resume"])
def test_a_name_that_a_file_inside_can_have(tmp_path, name):
    write_manifest(tmp_path, files={name: PLAIN})
    assert read_manifest(tmp_path, kind="test", remedy=REMEDY)["files"] == {name: PLAIN}
    assert damaged_files(tmp_path, {"files": {name: PLAIN}}) == [f"{ascii(name)} is missing"]


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (None, "needs bytes and digest, found None"),
        ([], "needs bytes and digest, found []"),
        ({"bytes": 2}, "needs bytes and digest, found {'bytes': 2}"),
        ({**PLAIN, "more": "\x1b"}, "needs bytes and digest, found "),
        *(({**PLAIN, "bytes": value}, f"cannot have {value!r} bytes") for value in (-1, True, False, 2.0, "2", None)),
        *(({**PLAIN, "digest": value}, f"has no digest of 32 hex digits: {excerpt(value)}") for value in ("", "0" * 31, "0" * 33, "g" * 32, "A" * 32, "0" * 31 + "\n", "\u0660" * 32, 7, None)),
    ],
)
def test_an_entry_that_is_none(tmp_path, entry, problem):
    write_manifest(tmp_path, files={"good": PLAIN, "evil\x1b": entry})
    assert refused(tmp_path).startswith(rf"damaged manifest: files: 'evil\x1b' {problem}")


@pytest.mark.parametrize("changes", [{"kind": None}, {"kind": ["test"]}, {"files": None}, {"files": []}, {"files": ["a"]}])
def test_a_manifest_without_kind_or_files(tmp_path, changes):
    write_manifest(tmp_path, **changes)
    assert refused(tmp_path) == "damaged manifest: it does not name its kind and its files"


@contextlib.contextmanager
def within_seconds(seconds: int) -> Iterator[None]:
    """End the block by an error when it takes longer, even where it waits in the system."""

    def too_late(*_: object) -> None:
        raise AssertionError(f"it took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def no_plain_file(path: Path, how: str) -> None:
    """Put something else in the place of a file."""
    if path.exists():
        shutil.move(path, path.with_name("moved"))
    {"fifo": os.mkfifo, "folder": Path.mkdir, "link": lambda path: path.symlink_to("moved"), "loop": lambda path: path.symlink_to(path.name)}[how](path)


@pytest.mark.parametrize("how", ["fifo", "folder", "link", "loop"])
def test_nothing_but_a_plain_file_is_read(tmp_path, how):
    manifest = make_artifact(tmp_path / "artefact")
    with within_seconds(10):
        no_plain_file(tmp_path / "artefact" / "part" / "rows.bin", how)
        assert damaged_files(tmp_path / "artefact", manifest) == ["'part/rows.bin' is not a plain file inside the folder"]
        no_plain_file(tmp_path / "artefact" / "manifest.json", how)
        assert refused(tmp_path / "artefact") == "damaged manifest: it is not a plain file" and state_of(tmp_path / "artefact") == "sealed"
        no_plain_file(tmp_path / "resume.json", how)
        assert resume_state(tmp_path) is None


@pytest.mark.parametrize("to", ["inside", "outside"])
def test_a_folder_on_the_way_that_is_a_link_is_not_followed(tmp_path, to):
    manifest = make_artifact(tmp_path / "artefact")
    target = tmp_path / ("artefact/elsewhere" if to == "inside" else "elsewhere")
    (tmp_path / "artefact" / "part").rename(target)
    (tmp_path / "artefact" / "part").symlink_to(target)
    assert damaged_files(tmp_path / "artefact", manifest) == ["'part/rows.bin' is not a plain file inside the folder"]
    assert "'part' is not listed in the manifest" in unlisted_files(tmp_path / "artefact", manifest)


def test_the_folder_itself_may_be_a_link(tmp_path):
    manifest = make_artifact(tmp_path / "artefact")
    (tmp_path / "link").symlink_to("artefact")
    assert read_manifest(tmp_path / "link", kind="test", remedy=REMEDY) == manifest and damaged_files(tmp_path / "link", manifest) == []


def test_a_file_of_another_size_is_not_opened(tmp_path, monkeypatch):
    manifest = make_artifact(tmp_path / "artefact")
    os.truncate(tmp_path / "artefact" / "part" / "rows.bin", 1 << 36)  # sparse: reading it would take minutes
    lie = {"files": {"names.txt": {**manifest["files"]["names.txt"], "bytes": 1 << 70}, "part/rows.bin": manifest["files"]["part/rows.bin"]}}
    with within_seconds(10):
        assert damaged_files(tmp_path / "artefact", lie) == [
            f"'names.txt' has 4 bytes, the manifest says {1 << 70}",
            f"'part/rows.bin' has {1 << 36} bytes, the manifest says 10",
        ]


@pytest.mark.parametrize("name", ["x" * 300, "names.txt/below"])
def test_a_name_that_the_system_refuses_is_a_line(tmp_path, name):
    make_artifact(tmp_path / "artefact")
    [problem] = damaged_files(tmp_path / "artefact", {"files": {name: PLAIN}})
    assert problem.startswith(f"'{name[:100]}") and problem.endswith(" is missing")


@pytest.mark.parametrize("mebibytes", [65, 1 << 16])
def test_a_manifest_too_large_to_be_one_is_not_read(tmp_path, mebibytes):
    path = write_manifest(tmp_path)
    os.truncate(path, mebibytes << 20)
    begin = time.process_time()
    assert refused(tmp_path) == f"damaged manifest: it has {mebibytes << 20:,} bytes, at most {MAX_JSON_BYTES:,} are read"
    assert time.process_time() - begin < 1


def test_json_of_ours_is_read_up_to_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("kto_ds.artifacts.MAX_JSON_BYTES", 10)
    (tmp_path / "a.json").write_text('"12345678"')
    assert read_json(tmp_path / "a.json") == "12345678"
    (tmp_path / "a.json").write_text('"123456789"')
    with pytest.raises(ValueError, match="it has 11 bytes, at most 10 are read"):
        read_json(tmp_path / "a.json")


def test_what_is_not_listed_is_told(tmp_path):
    manifest = make_artifact(tmp_path)
    assert unlisted_files(tmp_path, manifest) == []
    (tmp_path / "resume.json").touch()
    (tmp_path / "part" / "empty folder").mkdir()
    assert unlisted_files(tmp_path, manifest) == []
    (tmp_path / "part" / "more\n").touch()
    (tmp_path / "part" / "manifest.json").touch()
    os.mkfifo(tmp_path / "fifo")
    names = [r"'fifo'", r"'part/manifest.json'", r"'part/more\n'"]
    assert unlisted_files(tmp_path, manifest) == [f"{name} is not listed in the manifest" for name in names]


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
    flip: "'part/rows.bin' does not have the digest of the manifest",
    truncate: "'part/rows.bin' has 9 bytes, the manifest says 10",
    grow: "'part/rows.bin' has 11 bytes, the manifest says 10",
    Path.unlink: "'part/rows.bin' is missing",
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
