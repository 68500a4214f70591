"""What counts as progress of a rank: its own, that of one it waits for, and files that come and go while a library is at work."""

import time
from pathlib import Path

from kto_ds.runtime import peers, watch, world_size
from kto_ds.runtime.peers import Beat
from kto_ds.runtime.watch import Watch


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
