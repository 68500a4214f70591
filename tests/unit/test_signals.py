"""When a run is to stop: wall times, and who a signal reaches."""

import os
import signal
import threading
import time

import pytest

from kto_ds.errors import Preempted, UserError
from kto_ds.runtime.signals import STOPPING, WallTime, interruptible, listening, wall_seconds


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("0.5", 0.5), ("00:01:30", 90), ("1:00:00", 3600), ("2-03:04:05", 2 * 86400 + 3 * 3600 + 4 * 60 + 5)])
def test_wall_times_are_seconds_or_as_slurm_writes_them(text, seconds):
    assert wall_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-5", "soon", "nan", "inf", "1:00", "1-2", "00:00:00", "1:2:3"])
def test_what_is_no_wall_time_is_refused(text):
    with pytest.raises(UserError, match="no wall time"):
        wall_seconds(text)


def test_the_wall_time_leaves_room_for_the_longest_step_and_save():
    now = [100.0]
    wall_time = WallTime(60, started=100.0, clock=lambda: now[0])
    assert not wall_time.is_over()
    for step, save in ((4, 10), (6, 3)):
        wall_time.took(step=step)
        wall_time.took(save=save)
    now[0] = 100 + 60 - 16
    assert not wall_time.is_over()
    now[0] += 0.1
    assert wall_time.is_over()


def test_without_a_limit_there_is_no_end():
    wall_time = WallTime(None, started=0.0)
    wall_time.took(step=1e9)
    assert not wall_time.is_over()


@pytest.mark.parametrize("signum", STOPPING)
def test_a_signal_is_heard_while_the_main_thread_waits(signum):
    """The main thread sits in a lock that no signal wakes, as it does in a collective."""
    before = signal.getsignal(signum)
    heard, came = [], threading.Event()

    def hear(signal_heard):
        heard.append((signal_heard, threading.current_thread() is threading.main_thread()))
        came.set()

    with listening(hear):
        os.kill(os.getpid(), signum)
        assert came.wait(10)
    assert heard == [(signum, False)]
    assert signal.getsignal(signum) is before


def test_a_single_process_is_interrupted_at_once():
    began = time.monotonic()
    with pytest.raises(Preempted, match="SIGTERM: the work is kept; start the same command again"), interruptible("the work is kept"):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
    assert time.monotonic() - began < 10
