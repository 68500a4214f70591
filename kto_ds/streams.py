"""Streams that outlive their terminal: a run goes on where its window was closed, as there is more to it than what is shown."""

import errno
import io
import sys
from typing import TextIO


class _Surviving(io.FileIO):
    def write(self, data: bytes | memoryview) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return len(data)  # the terminal is gone, and nobody reads it


def surviving(descriptor: int, like: TextIO) -> TextIO:
    """Return a stream that writes to `descriptor` as `like` would, and takes words still when that was a terminal and is gone."""
    raw = _Surviving(descriptor, "w", closefd=False)
    buffer = raw if like.write_through else io.BufferedWriter(raw)  # the former with python -u
    return io.TextIOWrapper(buffer, encoding=like.encoding, errors=like.errors, line_buffering=like.line_buffering, write_through=like.write_through)


def survive() -> None:
    """Have stdout and stderr of this program survive their terminal."""
    if sys.stdout is not None:  # else it was closed before the program began
        sys.stdout = surviving(sys.stdout.fileno(), sys.stdout)
    if sys.stderr is not None:
        sys.stderr = surviving(sys.stderr.fileno(), sys.stderr)
