"""The processes of a run as they see one another without a collective: their ids, and a small file of each that says how far it is.

    ranks/rank<r>.json   {rank, host, pid, phase, step, beat}: `beat` is the unix time of its last progress; the file is new every BEAT_SECONDS or sooner while it lives
    ranks/rank<r>.<token>.end    {exit_code, state, message} of a rank that ended by itself, while others may not know; the token is of one start, as ranks of an
                                 earlier one may still be ending, and a second start may be refused here
"""

import json
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from kto_ds.artifacts import read_json
from kto_ds.errors import Unreadable

BEAT_SECONDS = 2.0
SILENT_SECONDS = 6.0  # without a new file: stopped, dead on another machine, or with a thread that holds the interpreter
# Of a collective that lost a peer, or of the store that rank 0 keeps, through which ranks make their groups.
CONNECTION_WORDS = ("connection closed by peer", "connection reset by peer", "broken pipe", "timed out waiting", "gloo", "nccl", "connection was likely closed", "client socket has")
ENDED = ("done", "preempted", "failed")


class Peer(NamedTuple):
    rank: int
    host: str
    machine: str  # where its process id means something
    pid: int
    started: int  # clock ticks from the boot on: tells it from a later process of the same id, whatever becomes of the time of day

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, process {self.pid})"


class Beat(NamedTuple):
    rank: int
    host: str
    pid: int
    phase: str
    step: int
    beat: float


class End(NamedTuple):
    exit_code: int
    state: str  # preempted or failed
    message: str


def this_process(rank: int) -> Peer:
    host, boot = socket.gethostname(), Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    _, started = _state_and_start(os.getpid())
    # Machines may share a name, and the first process namespace has the same number on all of them.
    return Peer(rank, host, f"{boot} {os.readlink('/proc/self/ns/pid')}", os.getpid(), started)


def is_gone(peer: Peer) -> bool:
    """Whether a process of this machine has ended."""
    try:
        state, started = _state_and_start(peer.pid)
    except (FileNotFoundError, ProcessLookupError):
        return True
    return started != peer.started or state in ("Z", "X")


def _state_and_start(pid: int) -> tuple[str, int]:
    """Return the state of a process (one letter) and when it started, in clock ticks from the boot on."""
    # The second field, its name in brackets, may hold anything. psutil's start time moves with the time of day when that is set.
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return fields[0], int(fields[19])


def clear(folder: Path) -> None:
    """Forget the ranks of an earlier run; folders of other commands stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()


def write_beat(folder: Path, beat: Beat) -> None:
    _replace(folder / f"rank{beat.rank}.json", beat._asdict())


def write_end(folder: Path, rank: int, end: End, *, token: str) -> None:
    _replace(folder / f"rank{rank}.{token}.end", end._asdict())


def _replace(path: Path, content: dict) -> None:
    # Not synced: it tells living processes of living ones.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_beat(folder: Path, peer: Peer) -> Beat | None:
    """Return what a rank wrote last, or None before it wrote anything."""
    with suppress(ValueError, TypeError, Unreadable):
        return Beat(**read_json(folder / f"rank{peer.rank}.json"))
    return None


def with_end(folder: Path, others: Sequence[Peer], *, token: str) -> list[Peer]:
    """Return those of the ranks that have a file of their end: one look at the folder, however many ranks there are."""
    names = {path.name for path in folder.glob(f"rank*.{token}.end")}
    return [peer for peer in others if f"rank{peer.rank}.{token}.end" in names] if names else []


def read_end(folder: Path, peer: Peer, *, token: str) -> End | None:
    with suppress(ValueError, TypeError, Unreadable):
        return End(**read_json(folder / f"rank{peer.rank}.{token}.end"))
    return None


def silent_seconds(folder: Path, peer: Peer, own_rank: int) -> float:
    """Return by how much a rank's file is older than one's own, which was just written: two times of one file server's clock."""
    with suppress(OSError):
        return (folder / f"rank{own_rank}.json").stat().st_mtime - (folder / f"rank{peer.rank}.json").stat().st_mtime
    return 0.0


class Sight(NamedTuple):
    """What one rank sees of the others, and of itself, in the files of a start."""

    folder: Path
    own_rank: int
    token: str

    def end_of(self, peer: Peer) -> End | None:
        return read_end(self.folder, peer, token=self.token)

    def beat_of(self, peer: Peer) -> Beat | None:
        beat = read_beat(self.folder, peer)
        return beat if beat is not None and beat.pid == peer.pid else None

    def phase_of(self, peer: Peer) -> str:
        beat = self.beat_of(peer)
        return beat.phase if beat else "start"

    def is_silent(self, peer: Peer) -> bool:
        return silent_seconds(self.folder, peer, self.own_rank) > SILENT_SECONDS

    def progress_of(self, peer: Peer) -> tuple:
        """Return what sorts the ranks, those behind first."""
        beat = self.beat_of(peer)
        # Who waits for the input of a step is behind who takes it, though the beats may be a moment apart in the other order.
        return (not self.is_silent(peer), beat.step, beat.phase != "input", beat.beat) if beat else (False, 0, False, 0.0)

    def last_seen(self, peer: Peer) -> str:
        beat = self.beat_of(peer)
        where = f"last in {beat.phase} of step {beat.step}, {max(0.0, time.time() - beat.beat):.0f} s ago" if beat else "never got under way"
        return f"{peer}, {where}{', gives no sign of life' if self.is_silent(peer) else ''}"


def launchers() -> tuple[int, ...]:
    """Return the process ids of what started this rank and would end it, outermost last; none when it was started by hand.

    The deepspeed command starts a launcher, which starts the ranks, and ends without a word to it.
    """
    if "CROSS_RANK" in os.environ:  # of DeepSpeed's launcher
        parent = os.getppid()
        with suppress(psutil.NoSuchProcess):
            return parent, psutil.Process(parent).ppid()
        return (parent,)
    return (os.getppid(),) if "TORCHELASTIC_RUN_ID" in os.environ else ()


def is_of_a_lost_peer(error: BaseException) -> bool:
    """Whether a collective, or the making of a group, failed; libraries put other errors around it."""
    is_one = isinstance(error, (RuntimeError, OSError)) and any(word in str(error).lower() for word in CONNECTION_WORDS)
    inner = error.__cause__ or error.__context__
    return is_one or inner is not None and is_of_a_lost_peer(inner)
