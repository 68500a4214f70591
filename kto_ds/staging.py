"""Folders that are being written: under another name, by one process at a time, thrown away or gone on with after a kill."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kto_ds.artifacts import FORMAT, MANIFEST, RESUME, canonical_json, incomplete_path, move_into_place, read_json, write_atomically
from kto_ds.errors import Unreadable, UserError, excerpt, reading, unwritable

# What flock answers on a network file system that was mounted without it.
WITHOUT_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}


def fresh_folder(folder: Path) -> None:
    """Make an empty folder; what lay there is gone."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def require_own_place(final: Path, kind: str, is_part: Callable[[str], bool]) -> None:
    """Refuse a place for an artefact of this `kind` where something else lies: what is there is replaced by the artefact, and would be lost.

    `is_part` says of the name of an entry whether such an artefact has it.
    """
    remedy = "name a folder that does not exist yet, or one of a former artefact of this kind"
    if final.name in ("", ".."):
        raise UserError(f"a {kind} artefact needs a folder of its own", where=str(final), remedy=remedy)
    with reading(final):
        if final.exists() and not final.is_dir():
            raise UserError(f"there is a file where the {kind} artefact is to be", where=str(final), remedy=remedy)
        others = sorted(path.name for path in final.iterdir() if path.name not in (MANIFEST, RESUME) and not is_part(path.name)) if final.is_dir() else []
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise UserError(f"{excerpt(others[0])}{more} lies here, which is no part of a {kind} artefact and would be deleted", where=str(final), remedy=f"move it away, or {remedy}")
    for parent in final.absolute().parents:
        if _is_artifact(parent):
            raise UserError(f"the {kind} artefact would lie inside another artefact, {excerpt(str(parent))}", where=str(final), remedy=remedy)


def _is_artifact(folder: Path) -> bool:
    """Tell whether a folder has a manifest of ours."""
    try:
        found = read_json(folder / MANIFEST)
    except (ValueError, Unreadable):
        return False
    return isinstance(found, dict) and {"format", "kind", "files"} <= found.keys()


def claim_folder(folder: Path) -> None:
    """Make the folder of a run and keep other runs out of it until release_folders, or the end of this process; UserError when one is in it already."""
    if folder.resolve() in _locks:
        return
    remedy = "wait for it, end it, or choose another output_dir"
    _locks[folder.resolve()] = _lock(folder / ".lock", where=folder, remedy=remedy)


def release_folders() -> None:
    """Let others into the folders that this process has claimed."""
    while _locks:
        os.close(_locks.popitem()[1])


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
        raise UserError(f"another run is writing here: {_owner(path)}", where=str(where), remedy=remedy) from error
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        print(f"notice: {where}: this file system has no locks, so nothing keeps a second run out of it", flush=True)
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "slurm_job_id": os.environ.get("SLURM_JOB_ID"), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
    with contextlib.suppress(OSError):  # it only says who; a full disk is told where something has to be written
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode(), 0)
    return descriptor


def _owner(path: Path) -> str:
    """Return who holds a lock, as it wrote into it."""
    try:
        found = read_json(path)
        job = f", SLURM job {excerpt(found['slurm_job_id'])}" if found["slurm_job_id"] else ""
        return f"process {found['pid']:d} on host {excerpt(found['host'])}{job}, since {excerpt(found['started'])}"
    except (ValueError, KeyError, TypeError, Unreadable):
        return "a process that has not said its name yet"


# Open descriptors hold the locks; the system lets go of them however a process ends.
_locks: dict[Path, int] = {}


@contextlib.contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """Yield an empty `<name>.incomplete` that is renamed to `final` when the block ends well, and removed when it does not."""
    staging = incomplete_path(final)
    try:
        with writing_to(final):
            fresh_folder(staging)
            yield staging
            move_into_place(staging, final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def writing_to(final: Path) -> Iterator[None]:
    """Turn an OSError of the block into a UserError that names the folder: a full disk or a missing right is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise unwritable(error, final) from error


@contextlib.contextmanager
def locked(final: Path) -> Iterator[None]:
    """Keep other processes from writing this artefact inside the block; UserError when one is at it already."""
    lock = _lock(final.with_name(f".{final.name}.lock"), where=final, remedy="wait for it, end it, or choose another folder")
    try:
        yield
    finally:
        os.close(lock)


def resume_state(staging: Path) -> object | None:
    """Return the identity (a JSON value) that an unfinished folder was begun with; None when there is none to go on with."""
    try:
        found = read_json(staging / RESUME)
    except ValueError:
        return None
    return found.get("identity") if isinstance(found, dict) and found.get("format") == FORMAT else None


def write_resume(staging: Path, identity: object) -> None:
    """Say what the unfinished folder is the beginning of: a later attempt of the same `identity` (a JSON value) can go on with it."""
    write_atomically(staging / RESUME, canonical_json({"format": FORMAT, "identity": identity}))


def keep_only(staging: Path, files: list[Path]) -> None:
    """Delete what else lies in an unfinished folder, RESUME apart."""
    for path in set(staging.iterdir()) - {*files, staging / RESUME}:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def finish_folder(staging: Path, final: Path) -> None:
    """Give a sealed folder its final name. A kill on the way leaves it unfinished, or finished with a RESUME that means nothing any more."""
    move_into_place(staging, final)
    (final / RESUME).unlink(missing_ok=True)


@contextlib.contextmanager
def resumable_folder(final: Path, identity: dict) -> Iterator[Path]:
    """Yield `<name>.incomplete` that is renamed to `final` when the block ends well, and stays for the next attempt when it does not.

    What an attempt of the same `identity` (JSON values) left is there again; what another one left is gone. The block seals the folder.
    """
    staging = incomplete_path(final)
    with locked(final), writing_to(final):
        if not can_resume(final, identity):
            fresh_folder(staging)
            write_resume(staging, identity)
        yield staging
        finish_folder(staging, final)


def can_resume(final: Path, identity: dict) -> bool:
    """Tell whether an attempt of this `identity` was cut short and can be gone on with."""
    return canonical_json(resume_state(incomplete_path(final))) == canonical_json(identity)
