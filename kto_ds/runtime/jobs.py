"""A command of ours in processes of its own, which a signal to this one asks to stop: what launch/ranks.sh does for shells."""

import os
import signal
import subprocess
import uuid
from contextlib import suppress
from pathlib import Path

import psutil

from kto_ds.launching import own_job_environment, shell_exit_code
from kto_ds.runtime.signals import listening

# In the environment of all processes of a command, on whichever host, to know them by.
LAUNCH = "KTO_LAUNCH"
LOOK_SECONDS = 0.2


def run_job(command: list[str]) -> tuple[int, str | None]:
    """Run a command to its end and return (exit code, the name of a signal that came meanwhile).

    Each stopping signal is handed on as SIGUSR1 to those of its processes that have a handler for it, once there is one. DeepSpeed's own have none,
    would end of it and hide the ranks' exit code: they ignore it.
    """
    launch = str(uuid.uuid4())
    heard: list[str] = []
    num_handed = 0
    with listening(lambda signum: heard.append(signum.name)):
        # A session of its own: Ctrl-C is for this process alone.
        process = subprocess.Popen(
            ["sh", "-c", "trap '' USR1; exec \"$@\"", "sh", *command], env={**own_job_environment(), LAUNCH: launch}, stdin=subprocess.DEVNULL, start_new_session=True
        )  # fmt: skip
        while process.poll() is None:
            if num_handed < len(heard):
                num_handed += _ask_to_stop(launch)
            with suppress(subprocess.TimeoutExpired):
                process.wait(LOOK_SECONDS)
    return shell_exit_code(process.returncode), heard[0] if heard else None


def _ask_to_stop(launch: str) -> bool:
    """Send SIGUSR1 to the processes of a launch that have a handler for it; tell whether there are any."""
    found = False
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError, StopIteration, ValueError):
            if process.environ().get(LAUNCH) == launch and _handles(process.pid, signal.SIGUSR1):
                os.kill(process.pid, signal.SIGUSR1)
                found = True
    return found


def _handles(pid: int, signum: int) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    caught = next(line for line in lines if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signum - 1) & 1)
