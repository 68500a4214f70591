"""A thread on every rank that ends the run with one message when it cannot go on: a rank that died, failed alone, or makes no progress.

The main thread says where it is (`enter`) and that it moves (`beat`). It may sit in a collective for ever when a peer is gone, so nothing here waits for it.
One rank speaks, the lowest that can; the others follow a few seconds later without a word.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from kto_ds.errors import EXIT_PREEMPTED, EXIT_UNEXPECTED, KtoError, Preempted
from kto_ds.redaction import redact
from kto_ds.runtime import peers
from kto_ds.runtime.peers import BEAT_SECONDS, ENDED, Beat, End, Peer, Sight

LOOK_SECONDS = 0.5
SETTLE_SECONDS = 2.0  # a peer that failed may only be the first of all ranks to meet the same error, and rank 0 about to report it
DUMP_SECONDS = 2.5  # for the stacks of all ranks to be written
FOLLOW_SECONDS = 6.0  # in which the speaking rank has spoken
LOST_SECONDS = 15.0  # in which a peer that a collective lost is found gone or silent
BACKSTOP_SECONDS = 60.0  # beyond the timeout, when not even this thread can run
REPEAT_SECONDS = 1.0
AGAIN = "start the same command again: it goes on from what is saved"


class Place(NamedTuple):
    """Where the main thread is."""

    phase: str
    step: int
    at_once: bool  # whether a request to stop may end the process here
    since: float  # last progress, monotonic
    beat: float  # the same, unix time


class Watch:
    def __init__(self, ranks: Path, stacks: Path, logs: Path, run: list[Peer], rank: int, *, token: str, seconds: float, on_end: Callable[[End], None]):
        """`ranks`, `stacks` and `logs` are the folders of the files; `token` is of this start alone; `on_end` is called on the rank that speaks."""
        self._ranks, self._stacks, self._logs = ranks, stacks / f"rank{rank}.txt", logs
        self._token, self._mark, self._word = token, ranks / f"stuck-{token}", ranks / f"told-{token}"
        self._run, self._own, self._on_end = run, run[rank], on_end
        self._sight = Sight(ranks, rank, token)
        self._others = [peer for peer in run if peer.rank != rank]
        self._local = [peer for peer in self._others if peer.machine == self._own.machine]
        self._seconds = seconds
        self._place = Place("set-up", 0, True, time.monotonic(), time.time())
        self._lock, self._wake, self._over, self._lost = threading.Lock(), threading.Event(), False, False
        self._heard: dict[signal.Signals, float] = {}
        self._launchers = peers.launchers()
        self._seen: dict[str, float] = {}
        self._shown_at, self._shown, self._told = 0.0, ("", 0), False
        self._followed: Beat | None = None
        self.stop_reason: str | None = None  # set once somebody wants the run to stop

    # for the main thread

    def enter(self, phase: str, step: int = 0, *, at_once: bool = False) -> None:
        """Say what begins now; `at_once` where nothing is lost when a request to stop ends the process right there."""
        self._place = Place(phase, step, at_once, time.monotonic(), time.time())

    def beat(self) -> None:
        """Say that the work goes on."""
        self._place = self._place._replace(since=time.monotonic(), beat=time.time())

    def follow(self, rank: int) -> None:
        """Say that the work goes on, if that of a rank does for which this one waits. Who is waited for waits for no one: so no two can keep each other going."""
        beat = self._sight.beat_of(self._run[rank])
        if beat != self._followed:
            self._followed = beat
            self.beat()

    def limit(self, seconds: float) -> None:
        """Set how long there may be no progress."""
        self._seconds = seconds

    # for whoever wants the run to stop

    def ask_to_stop(self, reason: str) -> None:
        self.stop_reason = self.stop_reason or reason
        self._wake.set()

    def hear(self, signum: signal.Signals) -> None:
        """Stop after this step; at once when the same signal comes again.

        Launchers and terminals repeat a signal within moments, or send another kind after it: neither is somebody who has lost patience.
        """
        now = time.monotonic()
        if now - self._heard.setdefault(signum, now) >= REPEAT_SECONDS:
            message = f"{signum.name} came again: ended at once, nothing was saved; {AGAIN}"
            self._end(End(128 + signum, "failed", message), speaks=self._own.rank == 0)
        self.ask_to_stop(signum.name)

    # the thread

    @contextmanager
    def watching(self) -> Iterator["Watch"]:
        with open(self._stacks, "a", encoding="utf-8") as stacks:
            faulthandler.register(signal.SIGUSR2, stacks)
            thread = threading.Thread(target=self._look_again_and_again, args=(stacks,), name="watch", daemon=True)
            thread.start()
            _current.append(self)
            try:
                yield self
            except BaseException as error:
                self._leave_after(error, stacks)
                raise
            else:
                self._leave("done")
            finally:
                _current.remove(self)
                thread.join()
                faulthandler.cancel_dump_traceback_later()
                faulthandler.unregister(signal.SIGUSR2)

    def _look_again_and_again(self, stacks: IO[str]) -> None:
        while not self._over:
            try:
                self._look(stacks)
            except Exception as error:  # such as of a disk that does not answer for now; without another look the backstop would end a healthy run
                if self._for_seconds(repr(error)) == 0:
                    _heading(stacks, f"the watch could not look: {error!r}")
            self._wake.wait(LOOK_SECONDS)
            self._wake.clear()

    def _look(self, stacks: IO[str]) -> None:
        place = self._place
        if time.monotonic() - self._shown_at >= BEAT_SECONDS or self._shown != (place.phase, place.step):
            self._show(place.phase)
            faulthandler.dump_traceback_later(self._seconds + BACKSTOP_SECONDS, exit=True, file=stacks)
        self._look_for_ends()
        self._look_for_dead(stacks)
        if self._mark.exists() or time.monotonic() - place.since > self._seconds:
            self._end_stuck(stacks)
        if self._launchers and peers.launchers() != self._launchers:
            self.ask_to_stop("the launcher is gone")
        if self.stop_reason and place.at_once:
            message = f"{self.stop_reason} in {place.phase}: there is nothing to save; {AGAIN}"
            self._end(End(EXIT_PREEMPTED, "preempted", message), speaks=self._own.rank == 0)
        elif self.stop_reason and not self._told and self._own.rank == 0:
            self._told = True
            print(f"\n{self.stop_reason}: stopping as soon as what is done is saved", flush=True)

    def _show(self, phase: str) -> None:
        self._shown_at, self._shown = time.monotonic(), (phase, self._place.step)
        with suppress(OSError):  # a full disk is for the main thread to meet
            peers.write_beat(self._ranks, Beat(self._own.rank, self._own.host, self._own.pid, phase, self._place.step, self._place.beat))

    # what it can find

    def _look_for_ends(self) -> None:
        """End as a peer did that failed alone."""
        for peer in peers.with_end(self._ranks, self._others, token=self._token):
            end = self._sight.end_of(peer)
            if end is not None and self._for_seconds(f"end {peer.rank}") >= (SETTLE_SECONDS if self._speaker() == self._own.rank else FOLLOW_SECONDS):
                self._end(end._replace(message=f"[rank {peer.rank}] {end.message}"), speaks=peer.rank != 0 and self._speaker() == self._own.rank)

    def _look_for_dead(self, stacks: IO[str]) -> None:
        """End when a peer has no process any more and did not say why; one of another machine is given up when it is silent and a collective has lost it."""
        dead = [peer for peer in self._local if peers.is_gone(peer) and self._sight.phase_of(peer) not in ENDED]
        if self._lost:
            dead += [peer for peer in self._others if peer.machine != self._own.machine and self._sight.is_silent(peer) and self._sight.phase_of(peer) not in ENDED]
        if not dead:
            return
        speaks = self._speaker() == self._own.rank
        if speaks or self._for_seconds("dead") >= FOLLOW_SECONDS:
            _heading(stacks, "a peer is gone")
            faulthandler.dump_traceback(stacks)
            remedy = f"if the system killed it for lack of memory, its log says so (dmesg); what libraries said is in {self._logs}; {AGAIN}"
            self._end(End(EXIT_UNEXPECTED, "failed", f"a rank died: {'; '.join(map(self._sight.last_seen, dead))}\n  remedy: {remedy}"), speaks=speaks)

    def _end_stuck(self, stacks: IO[str]) -> None:
        """Write the stacks of all threads, have all ranks do so, and end."""
        with suppress(OSError):
            self._mark.touch()
        _heading(stacks, f"no progress for {time.monotonic() - self._place.since:.0f} s, in {self._place.phase} of step {self._place.step}")
        faulthandler.dump_traceback(stacks)
        time.sleep(DUMP_SECONDS)
        self._show(self._place.phase)
        speaks = self._speaker() == self._own.rank
        if not speaks:
            time.sleep(FOLLOW_SECONDS)
        lines = "\n  ".join(self._sight.last_seen(peer) for peer in sorted(self._run, key=self._sight.progress_of))
        message = (
            f"no progress for {self._seconds:.0f} s (train.step_timeout_seconds, train.setup_timeout_seconds before the first step); the ranks, those behind first:\n"
            f"  {lines}\n  remedy: the stacks of the ranks that could write them are in {self._stacks.parent}, what libraries said in {self._logs}; {AGAIN}"
        )
        silent = [peer for peer in self._local if self._sight.is_silent(peer)]
        self._end(End(EXIT_UNEXPECTED, "failed", message), speaks=speaks, kills=silent if speaks else ())

    def _speaker(self) -> int:
        """Return the lowest rank that can still speak."""
        able = (peer.rank for peer in self._others if self._sight.end_of(peer) is None and not self._sight.is_silent(peer) and not (peer in self._local and peers.is_gone(peer)))
        return min([self._own.rank, *able])

    def _for_seconds(self, what: str) -> float:
        """Return for how long this has been seen."""
        now = time.monotonic()
        return now - self._seen.setdefault(what, now)

    # the end

    def _end(self, end: End, *, speaks: bool, kills: Sequence[Peer] = ()) -> None:
        """End this process here and now, whatever its main thread is doing; nothing happens when that has left in the meantime."""
        with self._lock:
            if self._over:
                return
            self._over = True
            if speaks and self._takes_the_word():
                print(redact(f"\nkto-ds: {'' if end.state == 'preempted' else 'error: '}{end.message}"), file=sys.stderr, flush=True)
                with suppress(OSError):
                    self._on_end(end)
            with suppress(OSError):
                peers.write_end(self._ranks, self._own.rank, end, token=self._token)
            self._show(end.state)
            for peer in kills:  # which can end in no other way, and would keep their device
                with suppress(ProcessLookupError):
                    os.kill(peer.pid, signal.SIGKILL)
            os._exit(end.exit_code)

    def _takes_the_word(self) -> bool:
        """Whether this rank is the first to speak: what is found by several at a time is told once."""
        try:
            self._word.touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:  # better twice than never
            return True
        return True

    def _leave(self, phase: str) -> None:
        with self._lock:
            self._over = True
            self._wake.set()
            self._show(phase)

    def _leave_after(self, error: BaseException, stacks: IO[str]) -> None:
        """Say what ended this rank, to whoever cannot know. When a collective lost a peer, first let the thread find out which."""
        is_ours = isinstance(error, KtoError)
        if not is_ours:
            _heading(stacks, "error")
            _write(stacks, redact("".join(traceback.format_exception(error))))
        if self._others and peers.is_of_a_lost_peer(error):
            self._lost = True
            time.sleep(LOST_SECONDS)
        if isinstance(error, Preempted):
            self._leave("preempted")
            return
        message = redact(str(error) if is_ours else f"{type(error).__name__}: {error}\n  the traceback is in {self._stacks}")
        with self._lock, suppress(OSError):
            self._over = True
            if self._own.rank == 0:
                self._takes_the_word()
            if self._others:
                peers.write_end(self._ranks, self._own.rank, End(error.exit_code if is_ours else EXIT_UNEXPECTED, "failed", message), token=self._token)
        self._leave("failed")
        deadline = time.monotonic() + FOLLOW_SECONDS
        while is_ours and self._own.rank and not error.is_told and time.monotonic() < deadline:
            error.is_told = self._sight.phase_of(self._run[0]) == "failed"
            time.sleep(0.2)


_current: list[Watch] = []  # of this process; one at most


def beat() -> None:
    """Say that the work goes on, from wherever it does."""
    for watch in _current:
        watch.beat()


def follow(rank: int) -> bool:
    """Say that the work goes on, if that of another rank does; return whether there is a watch that will find out if it does not."""
    for watch in _current:
        watch.follow(rank)
    return bool(_current)


def _heading(stacks: IO[str], what: str) -> None:
    _write(stacks, f"\n== {time.strftime('%Y-%m-%d %H:%M:%S')}, process {os.getpid()}: {what}\n")


def _write(stacks: IO[str], text: str) -> None:
    """Write past the file's own buffer, as faulthandler does: what a full disk does not take is gone, and cannot come up again when the file is closed."""
    with suppress(OSError):
        os.write(stacks.fileno(), text.encode(errors="backslashreplace"))
