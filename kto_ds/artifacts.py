"""Directories that are whole or absent: written under another name, digested, synced and renamed; verified before they are read.

Digests are xxh3-128: they find damage and mix-ups, not an attacker.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import xxhash

from kto_ds.errors import UserError, excerpt

MANIFEST = "manifest.json"
FORMAT = 2  # of all artefacts; raised when a reader of today could not read them
RESUME = "resume.json"  # in an unfinished folder that can be gone on with: what it is the beginning of
CHUNK_BYTES = 1 << 22


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
    return digest_of(*(part for name in sorted(names) for part in (name, file_digest(folder / name))))


def fsync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    fsync_path(temporary)
    temporary.replace(path)
    fsync_path(path.parent)


def describe_file(path: Path) -> dict:
    """Sync a file to disk and return its size and digest."""
    fsync_path(path)
    return {"bytes": path.stat().st_size, "digest": file_digest(path)}


def describe_folder(folder: Path, *, besides: Path | None = None) -> dict[str, dict]:
    """Return {relative name: size and digest} of every file below `folder`, but of what says how far the folder is, and of the subfolder `besides`."""
    own = {folder / MANIFEST, folder / RESUME}
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path not in own and besides not in path.parents)
    return {path.relative_to(folder).as_posix(): describe_file(path) for path in files}


def seal(folder: Path, manifest: dict, files: dict[str, dict]) -> None:
    """Write the manifest that makes the folder complete; `files` is what describe_folder or its parts say."""
    write_atomically(folder / MANIFEST, json.dumps({"format": FORMAT, **manifest, "files": files}, indent=1))


def incomplete_path(final: Path) -> Path:
    return final.with_name(final.name + ".incomplete")


def move_into_place(staging: Path, final: Path) -> None:
    """Rename a sealed folder to its final name; an older one is moved aside first and deleted last.

    A kill between the two leaves none; `recover` puts the older one back before anything is read or written there.
    """
    recover(final)
    old = _set_aside_path(final)
    if final.exists():
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


def fresh_folder(folder: Path) -> None:
    """Make an empty folder; what lay there is gone."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def claim_folder(folder: Path) -> None:
    """Make the folder of a run and keep other runs out of it for as long as this process lives; UserError when one is in it already."""
    if folder.resolve() in _locks:
        return
    remedy = "wait for it, end it, or choose another output_dir"
    _locks[folder.resolve()] = _lock(folder / ".lock", where=folder, remedy=remedy)


def _lock(path: Path, *, where: Path, remedy: str) -> int:
    """Return the descriptor that holds a lock; UserError when another process holds it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"cannot write: {error.strerror}", where=str(where), remedy="choose a folder you may write to") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError("another run is writing here", where=str(where), remedy=remedy) from error
    return descriptor


# Open descriptors hold the locks; the system lets go of them however a process ends.
_locks: dict[Path, int] = {}


@contextlib.contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """Yield an empty `<name>.incomplete` that is renamed to `final` when the block ends well, and removed when it does not."""
    staging = incomplete_path(final)
    try:
        fresh_folder(staging)
        yield staging
        move_into_place(staging, final)
    except OSError as error:
        raise _unwritable(final, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _unwritable(final: Path, error: OSError) -> UserError:
    return UserError(f"cannot write: {error.strerror or error}", where=str(final), remedy="free the space or choose a folder you may write to")


@contextlib.contextmanager
def resumable_folder(final: Path, identity: dict) -> Iterator[Path]:
    """Yield `<name>.incomplete` that is renamed to `final` when the block ends well, and stays for the next attempt when it does not.

    What an attempt of the same `identity` (JSON values) left is there again; what another one left is gone. The block seals the folder.
    """
    staging = incomplete_path(final)
    lock = _lock(final.with_name(f".{final.name}.lock"), where=final, remedy="wait for it, end it, or choose another folder")
    try:
        if not can_resume(final, identity):
            fresh_folder(staging)
            write_atomically(staging / RESUME, _resume_text(identity))
        yield staging
        (staging / RESUME).unlink()
        move_into_place(staging, final)
    except OSError as error:
        raise _unwritable(final, error) from error
    finally:
        os.close(lock)


def can_resume(final: Path, identity: dict) -> bool:
    """Tell whether an attempt of this `identity` was cut short and can be gone on with."""
    path = incomplete_path(final) / RESUME
    return path.is_file() and path.read_text(encoding="utf-8", errors="replace") == _resume_text(identity)


def _resume_text(identity: dict) -> str:
    return json.dumps({"format": FORMAT, "identity": identity}, sort_keys=True)


def read_manifest(folder: Path, *, kind: str, remedy: str) -> dict:
    """Return the manifest of a complete artefact of this `kind`, or say which command makes one."""
    recover(folder)
    path = folder / MANIFEST
    if not path.is_file():
        state = "unfinished" if incomplete_path(folder).exists() else "missing"
        raise UserError(f"the {kind} artefact is {state}", where=str(folder), remedy=remedy)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["kind"]
        files = {name: {"bytes": entry["bytes"], "digest": entry["digest"]} for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"damaged manifest: {error}", where=str(path), remedy=remedy) from error
    if manifest.get("format") != FORMAT:
        raise UserError(f"written in format {excerpt(manifest.get('format'))}, this version reads {FORMAT}", where=str(path), remedy=remedy)
    if found != kind:
        raise UserError(f"expected a {kind} artefact, found {excerpt(found)}", where=str(path), remedy=remedy)
    return {**manifest, "files": files}


def damaged_files(folder: Path, manifest: dict) -> list[str]:
    """Return what is wrong with the files of an artefact, one line a file; an empty list when all sizes and digests fit."""
    return [problem for name, entry in manifest["files"].items() if (problem := _file_problem(folder, name, entry))]


def _file_problem(folder: Path, name: str, entry: dict) -> str:
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts or path.is_symlink():
        return f"{excerpt(name)} is not a plain file inside the folder"
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{name} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}"
    if file_digest(path) != entry["digest"]:
        return f"{name} does not have the digest of the manifest: its bytes have changed"
    return ""


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
