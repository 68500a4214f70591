"""Commands of kto_ds as processes of their own, on one rank or several of this machine."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence

# What makes a process a rank of a job; one that starts a job of its own must not hand it down.
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


def free_port() -> int:
    """Return a port of this machine that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launcher_arguments(arguments: Sequence[str], *, num_ranks: int) -> list[str]:
    """Return what `deepspeed` takes to run `kto-ds` with these arguments on so many ranks."""
    return ["--log_level", "error", "--num_gpus", str(num_ranks), "--master_port", str(free_port()), "--module", "kto_ds", *arguments]


def own_job_environment() -> dict[str, str]:
    """Return this process's environment without what makes it a rank."""
    return {"OMP_NUM_THREADS": "1", **{name: value for name, value in os.environ.items() if name not in OF_A_RANK}}


def run_module(module: str, arguments: Sequence[str]) -> int:
    """Run a module of this very environment as a program of its own and return its exit code, 128 + n where signal n ended it."""
    exit_code = subprocess.run([sys.executable, "-m", module, *arguments], env=own_job_environment(), check=False).returncode
    return shell_exit_code(exit_code)


def shell_exit_code(returncode: int) -> int:
    """Return a process's exit code as a shell gives it: 128 + n where signal n ended it."""
    return returncode if returncode >= 0 else 128 - returncode
