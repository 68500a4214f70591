"""What ranks know of one another: who is alive, and how far each is."""

import os
import subprocess
import sys
from datetime import timedelta

import psutil
import pytest
from torch.distributed import TCPStore

from kto_ds.runtime import peers
from kto_ds.runtime.peers import Beat, End
from tests.distributed.runs import free_port


def test_a_process_is_gone_when_it_has_ended_or_is_another_one():
    own = peers.this_process(0)
    assert not peers.is_gone(own)
    assert peers.is_gone(own._replace(started=own.started - 60)), "a later process of the same id"
    with subprocess.Popen([sys.executable, "-c", "pass"]) as child:
        found = own._replace(pid=child.pid, started=peers._state_and_start(child.pid)[1])
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert peers.is_gone(found), "it has ended, though nobody has asked for its exit code yet"
    assert peers.is_gone(found)


def test_setting_the_time_of_day_ends_no_process(monkeypatch):
    own = peers.this_process(0)
    boot_time = psutil._pslinux.boot_time
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: boot_time() + 5)
    assert not peers.is_gone(own)


def test_machines_of_one_name_are_told_apart():
    with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as boot:
        assert boot.read().strip() in peers.this_process(0).machine


def test_ranks_read_what_others_wrote_and_nothing_of_an_earlier_run(tmp_path):
    folder, peer = tmp_path / "ranks", peers.this_process(3)
    peers.clear(folder)
    assert peers.read_beat(folder, peer) is None and peers.read_end(folder, peer, token="now") is None
    beat, end = Beat(3, "host", 17, "step", 5, 1.5), End(2, "failed", "rows are wrong")
    peers.write_beat(folder, beat)
    peers.write_end(folder, 3, end, token="now")
    assert peers.read_beat(folder, peer) == beat and peers.read_end(folder, peer, token="now") == end
    assert peers.read_end(folder, peer, token="later") is None, "of another start"
    peers.clear(folder)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rank": 3', '{"rank": 3, "more": 1}'])
def test_a_damaged_file_says_nothing(tmp_path, text):
    peer = peers.this_process(3)
    (tmp_path / "rank3.json").write_text(text)
    (tmp_path / "rank3.now.end").write_text(text)
    assert peers.read_beat(tmp_path, peer) is None and peers.read_end(tmp_path, peer, token="now") is None


def test_silence_is_measured_by_the_clock_of_the_files(tmp_path):
    peer = peers.this_process(1)
    for rank, age in ((0, 0), (1, 25)):
        path = tmp_path / f"rank{rank}.json"
        path.write_text("{}")
        os.utime(path, (1000 - age, 1000 - age))
    assert peers.silent_seconds(tmp_path, peer, 0) == 25
    assert peers.silent_seconds(tmp_path, peer._replace(rank=2), 0) == 0, "one that has not written yet"


STORE = "import sys, time; from torch.distributed import TCPStore; store = TCPStore('127.0.0.1', int(sys.argv[1]), is_master=True, wait_for_workers=False); print(); time.sleep(60)"


def test_a_store_that_died_with_its_rank_is_a_lost_peer(capfd):
    port = free_port()
    with subprocess.Popen([sys.executable, "-c", STORE, port], stdout=subprocess.PIPE) as keeper:
        keeper.stdout.readline()
        store = TCPStore("127.0.0.1", int(port), is_master=False, timeout=timedelta(seconds=30))
        store.set("here", "yes")
        keeper.kill()
    with pytest.raises(RuntimeError) as lost:
        store.get("nothing")
    with pytest.raises(RuntimeError) as unreachable:
        TCPStore("127.0.0.1", int(port), is_master=False, timeout=timedelta(seconds=1))
    for error in (lost.value, unreachable.value):
        assert peers.is_of_a_lost_peer(error), error
        try:
            raise ValueError("of a library") from error
        except ValueError as outer:
            assert peers.is_of_a_lost_peer(outer)
    assert not peers.is_of_a_lost_peer(RuntimeError("shapes do not fit")) and not peers.is_of_a_lost_peer(ValueError("a gloo of words"))
