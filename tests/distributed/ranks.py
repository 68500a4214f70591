"""Ranks of a run, forked from a server that has imported everything: a start costs a fraction of a second instead of ten.

    with Ranks(["train", "--config", "run.yaml"], log=tmp_path / "log") as ranks:
        ranks.kill(signal.SIGKILL, 1)
        assert ranks.wait() == [1, -9]

Each rank is a process of its own that runs `cli.program` with the environment a launcher gives it, and leads a session of its own. What all of
them print goes to `log`. `before` is called in every rank ahead of the program, with the rank: the place to put in a fault. `run_commands` runs several
commands in one process group.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.distributed.runs import environment, free_port

PRELOADED = ["kto_ds.cli", "kto_ds.stages.train", "kto_ds.stages.precompute_ref", "kto_ds.stages.evaluate", "kto_ds.stages.export", "kto_ds.stages.prepare"]
SECONDS = 120  # no run of a tiny model takes longer, on a machine that is busy with others
COMMANDS_SECONDS = 540  # nor do all commands of one process group


def nothing(rank: int) -> None:
    """Put no fault in."""


def kto_ds(command: list[str]) -> None:
    from kto_ds import cli

    sys.argv = ["kto-ds", *command]
    cli.program()


def several_commands(files: list[str]) -> None:
    from tests.distributed import worker

    worker.main(*files)


class Ranks:
    def __init__(
        self, command: list[str], *, log: Path, num_ranks: int = 2, before: Callable[[int], None] = nothing, program: Callable[[list[str]], None] = kto_ds, **variables: str
    ):
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
        shared = {"WORLD_SIZE": str(num_ranks), "LOCAL_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), **variables}
        context = _server()
        self.processes = [
            context.Process(target=_run_rank, args=([str(part) for part in command], {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, str(log), before, program))
            for rank in range(num_ranks)
        ]
        for process in self.processes:
            process.start()

    def kill(self, signum: int, *ranks: int) -> None:
        """Send a signal to some ranks, or to all."""
        for process in [self.processes[rank] for rank in ranks or range(len(self.processes))]:
            with suppress(ProcessLookupError):
                if process.is_alive():  # else its number may be somebody else's by now
                    os.kill(process.pid, signum)

    def wait(self, seconds: float = SECONDS) -> list[int]:
        """Return the exit codes in rank order; minus the signal that ended a rank. AssertionError with the log's end when one runs on for longer."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        if any(process.is_alive() for process in self.processes):
            self.end()
            raise AssertionError(f"ranks still run after {seconds:g} s:\n{self.output()[-4000:]}")
        return [process.exitcode for process in self.processes]

    def is_running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def end(self) -> None:
        """Kill what is left."""
        self.kill(signal.SIGCONT)
        self.kill(signal.SIGKILL)
        for process in self.processes:
            process.join()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *error) -> None:
        self.end()


def run(
    command: list[str], *, log: Path, num_ranks: int = 2, before: Callable[[int], None] = nothing, program: Callable[[list[str]], None] = kto_ds, **variables: str
) -> tuple[list[int], str]:
    """Run a command to its end and return (exit codes, what it printed)."""
    with Ranks(command, log=log, num_ranks=num_ranks, before=before, program=program, **variables) as ranks:
        return ranks.wait(), ranks.output()


def require_success(command: list[str], *, log: Path, num_ranks: int = 2, program: Callable[[list[str]], None] = kto_ds, **variables: str) -> str:
    """Run a command that must end well on all ranks, and return what it printed."""
    exit_codes, output = run(command, log=log, num_ranks=num_ranks, program=program, **variables)
    assert exit_codes == [0] * num_ranks, f"{exit_codes}\n{output[-4000:]}"
    return output


def run_commands(folder: Path, commands: list[list[str]], *, num_ranks: int) -> list[dict]:
    """Run kto-ds commands one after the other in one process group of `num_ranks` ranks and return their results; see worker.py."""
    commands_file, results_file, log = folder / f"commands{num_ranks}.json", folder / f"results{num_ranks}.json", folder / f"log{num_ranks}"
    commands_file.write_text(json.dumps([[str(part) for part in command] for command in commands]))
    with Ranks([str(commands_file), str(results_file)], log=log, num_ranks=num_ranks, program=several_commands) as started:
        exit_codes = started.wait(COMMANDS_SECONDS)
        assert exit_codes == [0] * num_ranks, f"{exit_codes}\n{started.output()[-4000:]}"
    results = json.loads(results_file.read_text())
    failed = [(command, result) for command, result in zip(commands, results) if result["exit_code"]]
    assert not failed, f"{failed}\n{log.read_text(errors='replace')[-4000:]}"
    return results


def _server() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context("forkserver")
    # The server takes over the environment of its start, and each rank that of the server.
    os.environ.update(environment())
    context.set_forkserver_preload(PRELOADED)
    return context


def _run_rank(command: list[str], variables: dict[str, str], log: str, before: Callable[[int], None], program: Callable[[list[str]], None]) -> None:
    os.setsid()
    os.environ.update(variables)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    before(int(variables["RANK"]))
    program(command)
