"""What can go wrong in a way that the user should read about, and the exit code each one ends with."""

import errno
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

EXIT_OK = 0
EXIT_UNEXPECTED = 1
EXIT_USER = 2  # config, data, artefact or environment: the user can mend it
EXIT_NUMERICS = 3  # NaN or Inf reached a log-prob, the loss or a gradient
EXIT_PREEMPTED = 75  # asked to stop: what was done is kept, and the same command goes on (EX_TEMPFAIL of sysexits.h)


class KtoError(Exception):
    """An end of the run that is reported as one message, without a traceback."""

    exit_code = EXIT_UNEXPECTED
    is_told = False  # on a rank other than 0: rank 0 has this error too, and reports it


def run_script(main: Callable[..., None]) -> None:
    """Run `main` with the arguments of the command line, as the whole of a program; its KtoError is one message on stderr and the exit code."""
    try:
        main(*sys.argv[1:])
    except KtoError as error:
        print(f"kto-ds: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


class UserError(KtoError):
    """The user's input cannot be used.

    `what` says what is wrong and what was found, `where` is a config key or file:line, `remedy` says what to do about it.
    """

    exit_code = EXIT_USER

    def __init__(self, what: str, *, where: str = "", remedy: str = ""):
        self.what, self.where, self.remedy = what, where, remedy
        head = f"{where}: {what}" if where else what
        super().__init__(head + (f"\n  remedy: {remedy}" if remedy else ""))


class Unreadable(KtoError):
    """What lies there may be whole, but cannot be read now: a right, a disk, a mount. That is no damage: nothing is set aside or made anew for it."""

    exit_code = EXIT_USER


class NumericsError(KtoError):
    """A value that must be finite is not. Raised on all ranks, before the weights are touched."""

    exit_code = EXIT_NUMERICS


class Preempted(KtoError):
    """The run was asked to stop, by a signal or its wall time, and what it did is kept. Raised on all ranks."""

    exit_code = EXIT_PREEMPTED


# What the system answers where there is no file of a name.
MISSING = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
TO_READ = "see to its rights, its disk or its mount, then give the same command again; nothing was changed. What is lost for good counts as missing once it is deleted"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into Unreadable, but for one that says there is no such file."""
    try:
        yield
    except OSError as error:
        if error.errno in MISSING:
            raise
        raise Unreadable(f"{path}: cannot be read on host {socket.gethostname()}: {error.strerror or error}\n  remedy: {TO_READ}") from error


NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the disk is full, a quota, a limit on the size of files


def unwritable(error: OSError, folder: Path) -> UserError:
    """Return the refusal of a write below `folder`: where there is no space, it says how much is left."""
    left = ""
    if error.errno in NO_SPACE:
        existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        left = f"; {shutil.disk_usage(existing).free:,} bytes are free"
    return UserError(f"cannot write: {error.strerror or error}{left}", where=str(folder), remedy="free the space or choose a folder you may write to")


@contextmanager
def disk_may_be_full(folder: Path) -> Iterator[None]:
    """Turn an OSError of the block for want of space into a UserError that names the folder; other ones pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise unwritable(error, folder) from error


def untrusted_code(what: str, path: str, *, where: str) -> UserError:
    """Return the refusal of a model or tokenizer (`what`) that would run Python code of its own."""
    remedy = "read the code; if you trust it, set model.trust_remote_code: true, and for a hub model its commit as model.revision"
    return UserError(f"the {what} {excerpt(path)} brings Python code of its own, which is not run", where=where, remedy=remedy)


def excerpt(value: object, limit: int = 120) -> str:
    """Return `value` as one escaped, bounded line: data must not be able to write control codes to a terminal."""
    text = ascii(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
