"""What counts as progress of a rank: its own, that of one it waits for, and files that come and go while a library is at work."""

import subprocess
import sys
import time
from pathlib import Path

from kto_ds.runtime import peers, watch, world_size
from kto_ds.runtime.peers import Beat
from kto_ds.runtime.watch import Watch
from tests.distributed.runs import ROOT, environment


def beat_of_rank_1(folder: Path, beat: float) -> None:
    own = peers.this_process(1)
    peers.write_beat(folder, Beat(1, own.host, own.pid, "scoring", 0, beat))


def test_who_waits_gets_on_as_the_awaited_rank_does(tmp_path, monkeypatch):
    run = [peers.this_process(rank) for rank in (0, 1)]
    waiting = Watch(tmp_path, tmp_path, tmp_path, run, 0, token="now", seconds=60, on_end=print)
    monkeypatch.setattr(watch, "_current", [waiting])
    beat_of_rank_1(tmp_path, 1.0)
    seen = []
    for beat in (1.0, 1.0, 2.0, 2.0):
        beat_of_rank_1(tmp_path, beat)
        assert watch.follow(1)
        seen.append(waiting._place.since)
    assert seen[0] == seen[1] < seen[2] == seen[3]
    monkeypatch.setattr(watch, "_current", [])
    assert not watch.follow(1), "nothing would end this wait"


def test_files_that_come_and_go_are_progress(tmp_path, monkeypatch):
    beats = []
    monkeypatch.setattr(world_size, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(world_size, "beat", lambda: beats.append(1))
    folder = tmp_path / "not there yet"
    with world_size._files_are_progress(folder):
        for change in (folder.mkdir, lambda: (folder / "a").touch(), lambda: None, (folder / "a").unlink):
            change()
            time.sleep(0.2)
    assert len(beats) == 2


def test_an_error_on_a_full_disk_ends_the_watch(tmp_path):
    """Where neither the stacks nor the end can be written; in a program of its own, as a watch that does not end would keep this one."""
    (tmp_path / "rank0.txt").symlink_to("/dev/full")
    program = f"""
from pathlib import Path
from kto_ds.runtime import peers
from kto_ds.runtime.watch import Watch
folder = Path({str(tmp_path)!r})
try:
    with Watch(folder, folder, folder, [peers.this_process(0)], 0, token="now", seconds=600, on_end=print).watching():
        raise OSError("no space for a record")
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "no space for a record\n", done.stderr
