"""A kill does not test a loss of power: here the order of the system calls of a save is looked at instead."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.runs import ROOT, environment
from tests.distributed.tiny_run import config_of
from tests.faults.ledger import tally

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

CALL = re.compile(r"\d+ +(?P<call>fsync|fdatasync|rename|renameat|renameat2)\((?P<rest>.*)\) += 0")
UNFINISHED, RESUMED = re.compile(r"((\d+) .*?) *<unfinished \.\.\.>"), re.compile(r"(\d+) +<\.\.\. \w+ resumed>(.*)")


def calls_of(trace: Path) -> list[tuple[str, ...]]:
    """Return ("sync", path) and ("rename", from, to) in the order in which the calls ended."""
    found: list[tuple[str, ...]] = []
    begun: dict[str, str] = {}  # by thread: a call during which another thread made one stands in two lines
    for line in trace.read_text(errors="replace").splitlines():
        if match := UNFINISHED.match(line):
            begun[match[2]] = match[1]
            continue
        if match := RESUMED.match(line):
            line = begun.pop(match[1], "") + match[2]
        if match := CALL.match(line):
            paths = re.findall(r'<([^<>]*)>|"([^"]*)"', match["rest"])
            names = [one or two for one, two in paths]
            found.append(("sync", names[0]) if "sync" in match["call"] else ("rename", *[name for name in names if name][-2:]))
    return found


def test_calls_are_read_in_the_order_in_which_they_ended(tmp_path):
    (tmp_path / "trace").write_text(
        '12 fsync(5</run/a file> <unfinished ...>\n'
        '13 rename("/run/x", "/run/y") = 0\n'
        '12 <... fsync resumed>)             = 0\n'
        '13 fsync(6</run/b>)  = -1 EIO (Input/output error)\n'
        '13 fsync(6</run/c> <unfinished ...>\n'
        '12 fdatasync(5</run/d>) = 0\n'
        '13 <... fsync resumed>) = -1 EIO (Input/output error)\n'
    )  # fmt: skip
    assert calls_of(tmp_path / "trace") == [("rename", "/run/x", "/run/y"), ("sync", "/run/a file"), ("sync", "/run/d")]


def test_everything_is_on_disk_before_its_name_counts(tiny, tmp_path):
    """Files, then their folders, then the rename that makes the checkpoint count, then the folder that holds its name."""
    if not shutil.which("strace"):
        pytest.skip("needs strace")
    trace, run = tmp_path / "trace", tmp_path / "run"
    command = [sys.executable, "-m", "kto_ds", "train", *config_of(tiny, output_dir=run, train__max_steps=2)]
    traced = ["strace", "-f", "-y", "-s", "4096", "-e", "trace=fsync,fdatasync,rename,renameat,renameat2", "-o", str(trace), *command]
    done = subprocess.run(traced, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300)
    if "ptrace" in done.stderr and "not permitted" in done.stderr:
        pytest.skip("tracing is not allowed here")
    assert done.returncode == 0, done.stderr[-3000:]
    calls = calls_of(trace)
    final, root = run / "checkpoints" / "step-00000002", run / "checkpoints"
    [renamed] = [place for place, call in enumerate(calls) if call[0] == "rename" and call[2] == str(final)]
    staging = Path(calls[renamed][1])
    assert staging.parent == root and staging.name.startswith(".tmp-")
    files = [path.relative_to(final) for path in final.rglob("*") if path.is_file() and path.name != "manifest.json"]
    folders = [Path("."), *(path.relative_to(final) for path in final.rglob("*") if path.is_dir())]
    assert len(files) >= 2 and len(folders) >= 2

    def synced(path: Path) -> list[int]:
        return [place for place, call in enumerate(calls) if call == ("sync", str(path))]

    [manifest] = [place for place, call in enumerate(calls) if call[0] == "rename" and call[2] == str(staging / "manifest.json")]
    with tally("R26", "order of fsync and rename in a save, by strace: every file and folder") as counts:
        for name in files:
            counts.injected += 1
            assert min(synced(staging / name), default=renamed) < manifest, f"{name} is not synced before the manifest names it"
            counts.survived += 1
        for name in folders:
            counts.injected += 1
            assert any(place < renamed for place in synced(staging / name)), f"{name} is not synced before the rename"
            counts.survived += 1
        counts.injected += 2
        assert min(synced(Path(calls[manifest][1])), default=manifest) < manifest < max(place for place in synced(staging) if place < renamed)
        [hint] = [place for place, call in enumerate(calls) if call[0] == "rename" and call[2] == str(root / "latest")]
        assert any(renamed < place < hint for place in synced(root)), "the name itself is not synced before anything relies on it"
        counts.survived += 2
