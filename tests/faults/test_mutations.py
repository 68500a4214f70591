"""Do the tests notice? Each safeguard is taken out of a copy of the source, alone, and a test that is named must fail there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.distributed.runs import ROOT
from tests.faults.ledger import tally

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SECONDS = 600
KILL, CORRUPT, SYNC, DOUBLE = (f"tests/faults/test_{name}.py" for name in ("kill_points", "corruption", "sync_order", "double_faults"))
FLIPS = f"{CORRUPT}::test_every_flipped_bit_is_found[60]"


class Mutant(NamedTuple):
    """`old`, which stands there once, becomes `new`; then `test` must fail."""

    file: str
    old: str
    new: str
    test: str


MUTANTS = {
    "no fsync of files": Mutant("artifacts.py", '    fsync_path(path)\n    return {"bytes"', '    return {"bytes"', f"{SYNC}::test_everything_is_on_disk_before_its_name_counts"),
    "no fsync of folders": Mutant("runtime/checkpoint.py", "                fsync_path(path)\n", "                pass\n", f"{SYNC}::test_everything_is_on_disk_before_its_name_counts"),
    "no fsync after the rename": Mutant("runtime/checkpoint.py", "        fsync_path(root)\n", "", f"{SYNC}::test_everything_is_on_disk_before_its_name_counts"),
    "no fsync of the manifest": Mutant("artifacts.py", "        fsync_path(temporary)\n", "", f"{SYNC}::test_everything_is_on_disk_before_its_name_counts"),
    "no digest of files": Mutant("artifacts.py", 'file_digest(path) != entry["digest"]', "False", FLIPS),
    "no digest of the manifest": Mutant("artifacts.py", 'if manifest.get("digest") != _own_digest(manifest):', "if False:", FLIPS),
    "no sizes": Mutant("artifacts.py", 'status.st_size != entry["bytes"]', "False", "tests/unit/test_artifacts.py"),
    "written in place": Mutant("runtime/checkpoint.py", 'f".tmp-step-{step:08d}"', 'f"step-{step:08d}"', f"{KILL}::test_train[manifest written, not renamed, rank 1]"),
    "a checkpoint without a manifest counts": Mutant("runtime/checkpoint.py", " and (path / MANIFEST).is_file()", "", f"{KILL}::test_train[between DeepSpeed's files, rank 1]"),
    "the newest is not verified": Mutant("runtime/checkpoint.py", 'damaged_files(folder, {"files": share})', "[]", FLIPS),
    "ranks verify a part each, and rank 0 its own only": Mutant("runtime/checkpoint.py", "index % world.num_ranks == world.rank", "index % 2 == 0", FLIPS),
    "damage is not set aside": Mutant("runtime/checkpoint.py", 'on_main_rank(lambda folder=folder: set_aside(folder, mark=".corrupt"))', "pass", FLIPS),
    "the oldest is tried first": Mutant("runtime/checkpoint.py", "for _, folder in reversed(candidates)", "for _, folder in candidates", f"{KILL}::test_train[manifest written, not renamed, rank 1]"),
    "no retention": Mutant("runtime/checkpoint.py", "        _retain(root, save_total_limit)\n", "", f"{KILL}::test_train[manifest written, not renamed, rank 1]"),
    "retention before the save": Mutant("runtime/checkpoint.py", "[:-save_total_limit]", "[:]", f"{KILL}::test_train[retention: old one renamed, not deleted, rank 1]"),
    "the optimizer is not loaded": Mutant("runtime/checkpoint.py", "str(checkpoint.folder), tag=TAG)\n    assert", "str(checkpoint.folder), tag=TAG, load_optimizer_states=False)\n    assert",
                                          f"{KILL}::test_train[manifest written, not renamed, rank 1]"),
    "the schedule is not loaded": Mutant("runtime/checkpoint.py", "str(checkpoint.folder), tag=TAG)\n    assert", "str(checkpoint.folder), tag=TAG, load_lr_scheduler_states=False)\n    assert",
                                         f"{KILL}::test_train[manifest written, not renamed, rank 1]"),
    "metrics are not cut back": Mutant("report/sinks.py", "    metrics.drop_after(done_steps or -1)\n", "", f"{KILL}::test_train[between DeepSpeed's files, rank 1]"),
    "shards are written in place": Mutant("data/reference.py", 'temporary = folder / f".{path.name}.{os.getpid()}.tmp"', "temporary = path", f"{KILL}::test_precompute_ref[shard written, not renamed, rank 1]"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of what the tests need, in which every test that is named passes."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("kto_ds", "ds_configs", "tests", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.cfg", folder)
    done = run_tests(folder, *sorted({mutant.test for mutant in MUTANTS.values()}))
    assert done.returncode == 0, done.stdout[-4000:]
    return folder


def run_tests(folder: Path, *tests: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name not in ("KTO_FAULT_LEDGER", "PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SECONDS)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_safeguard_that_is_taken_out_is_missed(tree, name):
    mutant = MUTANTS[name]
    path = tree / "kto_ds" / mutant.file
    source = path.read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1, f"{mutant.file} has changed: {mutant.old!r} stands there {source.count(mutant.old)} times"
    with tally("R26", "a safeguard taken out of a copy of the source: the test that is named for it fails") as counts:
        counts.injected += 1
        try:
            path.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
            done = run_tests(tree, mutant.test)
        finally:
            path.write_text(source, encoding="utf-8")
        # 1: tests failed. Another code would mean that none was run.
        assert done.returncode == 1 and "SyntaxError" not in done.stdout, done.stdout[-3000:]
        counts.survived += 1
