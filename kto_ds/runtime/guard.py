"""What a command on several ranks runs under: it hears signals, is watched, and ends with one message."""

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kto_ds.errors import Preempted
from kto_ds.runtime import peers
from kto_ds.runtime.collectives import World, gather_objects, on_main_rank
from kto_ds.runtime.library_log import library_log
from kto_ds.runtime.peers import End
from kto_ds.runtime.signals import listening
from kto_ds.runtime.watch import Watch
from kto_ds.staging import writing_to

GO_ON = "start the same command again to go on from there"


def stacks_folder(output_dir: Path, command: str) -> Path:
    """Where stacks of a command go; train has the folder itself, as others may run beside it."""
    return output_dir / "stacks" / ("" if command == "train" else command)


def logs_folder(output_dir: Path, command: str) -> Path:
    """Where what the libraries say during a command goes, likewise."""
    return output_dir / "logs" / ("" if command == "train" else command)


def nothing_more(end: End) -> None:
    """A command without a status has said all there is in its message."""


@contextmanager
def guarded(world: World, output_dir: Path, command: str, *, seconds: float, on_end: Callable[[End], object] = nothing_more) -> Iterator[Watch]:
    """Watch over the block on all ranks, `seconds` without progress at first; `on_end` is called where the block is not left, but ended from outside."""
    stacks, logs, ranks = stacks_folder(output_dir, command), logs_folder(output_dir, command), output_dir / "ranks" / ("" if command == "train" else command)

    def make_folders() -> None:
        with writing_to(output_dir):
            peers.clear(ranks)
            for folder in (stacks, logs):
                folder.mkdir(parents=True, exist_ok=True)

    on_main_rank(make_folders)
    found = gather_objects((peers.this_process(world.rank), secrets.token_hex(4)))
    run, token = [peer for peer, _ in found], found[0][1]
    watch = Watch(ranks, stacks, logs, run, world.rank, token=token, seconds=seconds, on_end=on_end)
    with library_log(logs, world.rank), listening(watch.hear), watch.watching():
        yield watch


def reason_to_stop(watch: Watch) -> str | None:
    """Return why any rank was asked to stop, or None; the same on all ranks, which all call this."""
    return next((reason for reason in gather_objects(watch.stop_reason) if reason), None)


def preempted(world: World, what: str, *, remedy: str = GO_ON) -> Preempted:
    """Return the error that ends a run which was asked to stop; all ranks raise it, and rank 0 reports it."""
    error = Preempted(f"{what}; {remedy}")
    error.is_told = not world.is_main
    return error
