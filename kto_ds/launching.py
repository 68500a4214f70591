"""Commands of kto_ds as processes of their own, on one rank or several of this machine."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# What makes a process a rank of a job; one that starts a job of its own must not hand it down.
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


def free_port() -> int:
    """Return a port of this machine that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launcher_arguments(command: str, config: Path, *, num_ranks: int) -> list[str]:
    """Return what `deepspeed` takes to run a command on so many ranks."""
    return ["--num_gpus", str(num_ranks), "--master_port", str(free_port()), "--module", "kto_ds", command, "--config", str(config)]


def run_module(module: str, arguments: Sequence[str]) -> int:
    """Run a module of this very environment as a program of its own and return its exit code, 128 + n where signal n ended it."""
    environment = {"OMP_NUM_THREADS": "1", **{name: value for name, value in os.environ.items() if name not in OF_A_RANK}}
    exit_code = subprocess.run([sys.executable, "-m", module, *arguments], env=environment, check=False).returncode
    return exit_code if exit_code >= 0 else 128 - exit_code
