"""What a signal to stop does until a command is under way: it ends the process with 75, there and then.

While libraries are imported, which takes seconds, an exception is no way out: they may swallow it, or abort at it.
"""

import os
import signal
from contextlib import suppress

from kto_ds.errors import EXIT_PREEMPTED

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def leave_on_signals() -> None:
    for signum in STOPPING:
        signal.signal(signum, leave)


def leave(signum: int, frame: object) -> None:
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):  # of a terminal that is gone
            os.write(2, f"kto-ds: {signal.Signals(signum).name}: stopped before anything was begun; start the same command again\n".encode())
    os._exit(EXIT_PREEMPTED)
