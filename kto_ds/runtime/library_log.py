"""What libraries say of themselves goes to a file of each rank: logging, warnings, and what C++ writes to the descriptor of stderr. The console is for the run.

Nothing is lost by it: the file is named at the start and with an error, and a signal that kills the process still leaves its stacks on the console.
"""

import faulthandler
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from transformers.utils.logging import set_tqdm_hook

from kto_ds.errors import KtoError
from kto_ds.redaction import redact
from kto_ds.streams import surviving

STDERR = 2


@contextmanager
def library_log(folder: Path, rank: int) -> Iterator[TextIO]:
    """Collect in <folder>/rank<rank>.log, inside the block, what libraries say; yield the open file. A disk that is full takes words, and nothing else."""
    path = folder / f"rank{rank}.log"
    log = open(path, "a", buffering=1, encoding="utf-8", errors="backslashreplace")
    try:
        with suppress(OSError):
            log.write(f"\n== {time.strftime('%Y-%m-%d %H:%M:%S')}, process {os.getpid()}: {redact(' '.join(sys.argv))}\n")
        with _logging_to(log), _threads_to(log), _descriptor_to(log), _without_bars():
            yield log
    except Exception as error:
        if not isinstance(error, KtoError):  # which says by itself what is wrong
            error.add_note(f"what the libraries said is in {path}")
        raise
    finally:
        with suppress(OSError):
            log.close()


@contextmanager
def _logging_to(log: TextIO) -> Iterator[None]:
    handler = logging.StreamHandler(log)
    handler.setFormatter(_Redacted("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.handleError = lambda record: None  # else it would speak to the console of a disk that is full, or of a call with a format that does not fit
    loggers = [logging.root, *(logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger))]
    before = [(logger, logger.handlers) for logger in loggers]
    for logger in loggers:
        logger.handlers = [one for one in logger.handlers if not _speaks_to_console(one)]
        if logger is logging.root or not logger.propagate:  # such as that of DeepSpeed, which has a handler of its own
            logger.handlers.append(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for logger, handlers in before:
            logger.handlers = handlers


class _Redacted(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _speaks_to_console(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and descriptor_of(handler.stream) in (1, STDERR)


def descriptor_of(stream: TextIO | None) -> int | None:
    """Return the descriptor that a stream writes to; None where it has none, such as under a test that captures it."""
    try:
        return stream.fileno()
    except (AttributeError, OSError, ValueError):  # no stream at all, one in memory, a closed one
        return None


@contextmanager
def _threads_to(log: TextIO) -> Iterator[None]:
    """Let a library's own kind of thread end with its traceback in the log; whoever uses the library hears of it in another way."""
    before = threading.excepthook

    def hook(ended: threading.ExceptHookArgs) -> None:
        if type(ended.thread) in (threading.Thread, threading.Timer):
            before(ended)
        else:
            with suppress(OSError):
                log.write(redact("".join(traceback.format_exception(ended.exc_value))))

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


@contextmanager
def _descriptor_to(log: TextIO) -> Iterator[None]:
    """Let descriptor 2 be the log, and sys.stderr what it was: our own words."""
    # The copy is never closed, one a command: a handler that a library makes inside the block goes on writing to it, and its number must not become that of a file.
    stderr, console = sys.stderr, os.dup(STDERR)
    is_own = descriptor_of(stderr) == STDERR
    if is_own:
        stderr.flush()
        sys.stderr = surviving(console, stderr)
    had_faulthandler = faulthandler.is_enabled()  # which speaks to descriptor 2
    faulthandler.enable(console)
    os.dup2(log.fileno(), STDERR)
    try:
        yield
    finally:
        os.dup2(console, STDERR)
        if had_faulthandler:
            faulthandler.enable(STDERR)
        else:
            faulthandler.disable()
        sys.stderr = stderr


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep the bars of transformers off the console; a download has its own."""
    before = set_tqdm_hook(lambda factory, arguments, named: factory(*arguments, **{**named, "disable": True}))
    try:
        yield
    finally:
        set_tqdm_hook(before)
