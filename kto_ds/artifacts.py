"""Directories that are whole or absent: digested, synced, sealed by a manifest and renamed; verified before they are read.

How they are written under another name first is in staging.py. Digests are xxh3-128: they find damage and mix-ups, not an attacker.
"""

import contextlib
import json
import os
import re
import shutil
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import xxhash

from kto_ds.errors import UserError, excerpt, reading

MANIFEST = "manifest.json"
FORMAT = 3  # of all artefacts; raised when a reader of today could not read them
RESUME = "resume.json"  # in an unfinished folder that can be gone on with: what it is the beginning of
CHUNK_BYTES = 1 << 22
MAX_JSON_BYTES = 1 << 26  # of a manifest; one of 100,000 files takes about 10 MB
READERS = 8  # files that are digested at a time: reading and xxhash let other threads go on
DIGEST = re.compile(r"[0-9a-f]{32}")


def digest_of(*parts: bytes | str) -> str:
    """Return one digest of several parts; the lengths go in, so that moving a byte from one part to the next changes it."""
    state = xxhash.xxh3_128()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def file_digest(path: Path) -> str:
    state = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            state.update(chunk)
    return state.hexdigest()


def folder_digest(folder: Path, names: list[str]) -> str:
    """Return one digest of the named files of a folder, names included, in sorted order."""
    names = sorted(names)
    with ThreadPoolExecutor(READERS) as readers:
        digests = list(readers.map(lambda name: file_digest(folder / name), names))
    return digest_of(*(part for pair in zip(names, digests) for part in pair))


def canonical_json(value: object) -> str:
    """Return the one text of a JSON value: the same before it was written and after it was read; 1, 1.0 and true have different ones."""
    # Numbers that are keys become text in JSON, which sorts otherwise.
    return json.dumps(json.loads(json.dumps(value)), sort_keys=True, separators=(",", ":"))


def read_json(path: Path) -> object:
    """Return the JSON value of a small file of ours; ValueError says what is wrong with it. What lies in its place cannot make the reader wait."""
    try:
        with reading(path):
            status = os.lstat(path)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("it is not a plain file")
            if status.st_size > MAX_JSON_BYTES:
                raise ValueError(f"it has {status.st_size:,} bytes, at most {MAX_JSON_BYTES:,} are read")
            with open(path, "rb") as file:
                return json.loads(file.read(MAX_JSON_BYTES).decode("utf-8"), object_pairs_hook=_each_key_once)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except OSError as error:
        raise ValueError(f"it cannot be read: {error.strerror or error}") from error


def _each_key_once(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {excerpt(key)} occurs twice")
    return found


def fsync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file from memory so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        fsync_path(temporary)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def describe_file(path: Path) -> dict:
    """Sync a file to disk and return its size and digest."""
    fsync_path(path)
    return {"bytes": path.stat().st_size, "digest": file_digest(path)}


def describe_folder(folder: Path, *, besides: Path | None = None) -> dict[str, dict]:
    """Return {relative name: size and digest} of every file below `folder`, but of what says how far the folder is, and of the subfolder `besides`."""
    return {name: describe_file(path) for name, path in _contents(folder) if path.is_file() and besides not in path.parents}


def _contents(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield (relative name, path) of whatever lies below `folder` and is no folder, but of what says how far the folder is."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        is_own = name in (MANIFEST, RESUME) or name.startswith(f".{MANIFEST}.")
        if not is_own and (path.is_symlink() or not path.is_dir()):
            yield name, path


def seal(folder: Path, manifest: dict, files: dict[str, dict]) -> None:
    """Write the manifest that makes the folder complete, with a digest of its own; `files` is what describe_folder or its parts say."""
    for half_written in folder.glob(f".{MANIFEST}.*.tmp"):  # by an attempt that was killed in here
        half_written.unlink()
    content = {"format": FORMAT, **manifest, "files": files}
    write_atomically(folder / MANIFEST, json.dumps({**content, "digest": own_digest(content)}, indent=1))


def own_digest(manifest: dict) -> str:
    """Return the digest of a manifest's content, the entry that holds it apart."""
    return digest_of(canonical_json({key: value for key, value in manifest.items() if key != "digest"}))


def incomplete_path(final: Path) -> Path:
    return final.with_name(final.name + ".incomplete")


def move_into_place(staging: Path, final: Path) -> None:
    """Rename a sealed folder to its final name; an older one is moved aside first and deleted last.

    A kill between the two leaves none; `recover` puts the older one back before anything is read or written there.
    """
    recover(final)
    old = _set_aside_path(final)
    if final.is_symlink():
        final.unlink()  # the link goes, what it leads to stays
    elif final.exists():
        final.rename(old)
    staging.rename(final)
    fsync_path(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _set_aside_path(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


def recover(final: Path) -> None:
    """Finish what a killed move_into_place began: the older folder comes back where the newer one did not arrive, and goes where it did."""
    old = _set_aside_path(final)
    if not old.exists():
        return
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):  # another process was as quick, or this one may only read
            old.rename(final)


def state_of(folder: Path) -> Literal["sealed", "unfinished", "missing"]:
    """Tell how far the artefact of this name is; what lies in the place of a manifest counts as one until it is read."""
    with reading(folder):
        recover(folder)
    for state, path in (("sealed", folder / MANIFEST), ("unfinished", incomplete_path(folder))):
        with contextlib.suppress(OSError), reading(path):  # os.path.lexists takes what must not be looked at for missing
            os.lstat(path)
            return state
    return "missing"


def read_manifest(folder: Path, *, kind: str, remedy: str) -> dict:
    """Return the manifest of a complete artefact of this `kind`.

    UserError with this `remedy` when there is none, or it is damaged, of another format or of another kind. The files are not looked at.
    """
    if (state := state_of(folder)) != "sealed":
        raise UserError(f"the {kind} artefact is {state}", where=str(folder), remedy=remedy)
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
        if not isinstance(manifest, dict) or "format" not in manifest:
            raise ValueError("it names no format")
        written_in = excerpt(manifest["format"])
        if written_in == str(FORMAT):  # what one of another format has to hold is not known here
            manifest = _checked(manifest)
    except (ValueError, RecursionError) as error:
        raise UserError(f"damaged manifest: {error}", where=str(path), remedy=remedy) from error
    if written_in != str(FORMAT):
        raise UserError(f"written in format {written_in}, this version reads {FORMAT}", where=str(path), remedy=remedy)
    if manifest["kind"] != kind:
        raise UserError(f"expected a {kind} artefact, found {excerpt(manifest['kind'])}", where=str(path), remedy=remedy)
    with contextlib.suppress(OSError):  # left by a kill after the rename; it means nothing any more, and this process may only read
        (folder / RESUME).unlink(missing_ok=True)
    return manifest


def _checked(manifest: dict) -> dict:
    """Return the manifest without its own digest; ValueError when that does not fit, or it does not say what a manifest must."""
    if manifest.get("digest") != own_digest(manifest):
        raise ValueError("its content does not have its own digest")
    if not isinstance(manifest.get("kind"), str) or not isinstance(manifest.get("files"), dict):
        raise ValueError("it does not name its kind and its files")
    for name, entry in manifest["files"].items():
        if problem := _entry_problem(name, entry):
            raise ValueError(f"files: {excerpt(name)} {problem}")
    return {key: value for key, value in manifest.items() if key != "digest"}


def _entry_problem(name: str, entry: object) -> str:
    if not _is_inside(name):
        return "is not the name of a file inside the folder"
    if not isinstance(entry, dict) or entry.keys() != {"bytes", "digest"}:
        return f"needs bytes and digest, found {excerpt(entry)}"
    if type(entry["bytes"]) is not int or entry["bytes"] < 0:
        return f"cannot have {excerpt(entry['bytes'])} bytes"
    if not isinstance(entry["digest"], str) or not DIGEST.fullmatch(entry["digest"]):
        return f"has no digest of 32 hex digits: {excerpt(entry['digest'])}"
    return ""


def _is_inside(name: str) -> bool:
    """Whether a file of an artefact can have this name: relative, spelled in one way only, and possible on this system."""
    try:
        possible = b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        possible = False
    return possible and name != MANIFEST and not {"", ".", ".."} & set(name.split("/"))


def damaged_files(folder: Path, manifest: dict) -> list[str]:
    """Return what is wrong with the files of an artefact, one line a file; an empty list when all sizes and digests fit. Unreadable where that cannot be told."""
    return [problem for name, entry in manifest["files"].items() if (problem := _file_problem(folder, name, entry))]


def _file_problem(folder: Path, name: str, entry: dict) -> str:
    """Return what is wrong with a file. No link is followed below the folder, and only a plain file of the right size is opened."""
    elsewhere = f"{excerpt(name)} is not a plain file inside the folder"
    if not _is_inside(name):
        return elsewhere
    path = folder / name
    try:
        with reading(path):
            places = [path, *path.parents[: name.count("/")]]
            if any(place.is_symlink() for place in places) or not stat.S_ISREG((status := os.lstat(path)).st_mode):
                return elsewhere
            if status.st_size != entry["bytes"]:
                return f"{excerpt(name)} has {status.st_size} bytes, the manifest says {entry['bytes']}"
            if file_digest(path) != entry["digest"]:
                return f"{excerpt(name)} does not have the digest of the manifest: its bytes have changed"
    except OSError:
        return f"{excerpt(name)} is missing"
    return ""


def unlisted_files(folder: Path, manifest: dict) -> list[str]:
    """Return one line for whatever lies in the folder of an artefact and is not in its manifest."""
    with reading(folder):
        return [f"{excerpt(name)} is not listed in the manifest" for name, _ in _contents(folder) if name not in manifest["files"]]


def require_intact(folder: Path, manifest: dict, *, remedy: str) -> None:
    if problems := damaged_files(folder, manifest):
        raise UserError(f"the artefact is damaged: {'; '.join(problems[:3])}", where=str(folder), remedy=remedy)


def require_match(expected: dict, found: dict, *, where: str, remedy: str, besides: Sequence[str] = ()) -> None:
    """Refuse when a field of `expected` has another value in `found`, naming every such field with both values; `besides` are further differences."""
    expected, found = _flatten(expected), _flatten(found)
    differing = [key for key in expected if found.get(key) != expected[key]]
    lines = [f"{key}: this run has {excerpt(expected[key])}, the artefact has {excerpt(found.get(key))}" for key in differing]
    if lines := [*lines, *besides]:
        count = f"{len(lines)} difference{'s' if len(lines) > 1 else ''}"
        raise UserError("\n  ".join([f"does not belong to this run, {count}:", *lines]), where=where, remedy=remedy)


def _flatten(fields: dict, prefix: str = "") -> dict:
    """Return nested mappings as one, with dotted keys."""
    flat = {}
    for key, value in fields.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
