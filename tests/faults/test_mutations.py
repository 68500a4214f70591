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

SECONDS = 1200  # all the tests that are named, on a busy machine
KILLED = "tests/faults/test_kill_points.py::test_train[manifest written, not renamed, rank 1]"
SWEPT = "tests/faults/test_kill_points.py::test_train[retention: old one renamed, not deleted, rank 0]"
FLIPS = "tests/faults/test_corruption.py::test_every_flipped_bit_is_found[60]"
SYNCS = "tests/faults/test_sync_order.py::test_everything_is_on_disk_before_its_name_counts"
FULL, FULL_AT_ONCE = (f"tests/faults/test_disk.py::test_train_on_a_full_disk[{when}]" for when in ("while DeepSpeed saves, rank 1", "before the save"))
LIMITED = "tests/faults/test_disk.py::test_a_limit_on_the_size_of_files[rank 1]"
RESCALED = "tests/faults/test_world_size.py::test_other_numbers_of_ranks_and_the_first_again[3-chain0]"
CHANGED = "tests/faults/test_checkpoint_contents.py::test_a_changed_config_is_refused_or_takes_effect"
PAYLOAD = "tests/faults/test_checkpoint_contents.py::test_a_payload_with_fitting_digests_is_refused_and_not_run[export-False]"
SIGNALLED = "tests/faults/test_signals.py::test_a_signal_saves_once_and_the_run_goes_on_bit_for_bit[SIGTERM-to-(1,)-in a step]"
RETRIED = "tests/faults/test_double_faults.py::test_a_kill_during_the_recovery[damage, then after it is set aside, rank 0]"


class Mutant(NamedTuple):
    """`old`, which stands there once, becomes `new`; then `test` must fail."""

    file: str
    old: str
    new: str
    test: str


MUTANTS = {
    "files are not synced": Mutant("artifacts.py", '    fsync_path(path)\n    return {"bytes"', '    return {"bytes"', SYNCS),
    "the manifest is not synced": Mutant("artifacts.py", "        fsync_path(temporary)\n", "", SYNCS),
    "folders are not synced": Mutant("runtime/checkpoint.py", "            fsync_path(path)\n", "            pass\n", SYNCS),
    "the new name is not synced": Mutant("runtime/checkpoint.py", "    fsync_path(final.parent)\n", "", SYNCS),
    "written in place": Mutant("runtime/checkpoint.py", 'f".tmp-{folder_name(step)}"', "folder_name(step)", SYNCS),
    "an error stays on its rank": Mutant("runtime/checkpoint.py", "enumerate(outcomes) if problem]", "enumerate(outcomes) if problem and rank == world.rank]", LIMITED),
    "a failed save keeps its space": Mutant("runtime/checkpoint.py", "    shutil.rmtree(staging, ignore_errors=True)\n    return KtoError", "    return KtoError", FULL),
    "space is not looked at": Mutant("runtime/checkpoint.py", "if free < needed:", "if False:", FULL_AT_ONCE),
    "files are not digested": Mutant("artifacts.py", 'file_digest(path) != entry["digest"]', "False", FLIPS),
    "the manifest has no digest": Mutant("artifacts.py", 'if manifest.get("digest") != own_digest(manifest):', "if False:", FLIPS),
    "the newest is not verified": Mutant("runtime/restore.py", 'damaged_files(folder, {"files": share})', "[]", FLIPS),
    "some files are nobody's to verify": Mutant("runtime/restore.py", "index % world.num_ranks == world.rank", "index % 2 == 0", FLIPS),
    "damage is not set aside": Mutant("runtime/restore.py", 'on_main_rank(lambda folder=folder: set_aside(folder, mark=".corrupt"))', "pass", FLIPS),
    "the oldest is tried first": Mutant("runtime/restore.py", "for _, folder in reversed(candidates):", "for _, folder in candidates:", KILLED),
    "a damaged one is deleted": Mutant("runtime/retention.py", '        path.rename(path.with_name(f"{path.name}{mark}.{number}"))', "        shutil.rmtree(path)", FLIPS),
    "nothing is deleted": Mutant("runtime/retention.py", "        if step != best_step:", "        if False:", KILLED),
    "all are deleted": Mutant("runtime/retention.py", "whole[:-save_total_limit]", "whole", KILLED),
    "leftovers stay": Mutant("stages/resume.py", "on_main_rank(lambda: sweep(root))", "pass", SWEPT),
    "generators are not restored": Mutant("runtime/restore.py", "restore_rng({", "print({", KILLED),
    "moments are not restored": Mutant("runtime/engine.py", "tag=STATE, custom_load_fn", "tag=STATE, load_optimizer_states=False, custom_load_fn", KILLED),
    "the schedule is not restored": Mutant("runtime/engine.py", "tag=STATE, custom_load_fn", "tag=STATE, load_lr_scheduler_states=False, custom_load_fn", KILLED),
    "parameters share Adam's step counter": Mutant("runtime/engine.py", '            state["step"] = state["step"].clone().to(parameter.device)', "            pass", RESCALED),
    "hyper-parameters are those of the file": Mutant("runtime/engine.py", "            group.update(hyperparameters, lr=lr, initial_lr=base_lr)", "            pass", CHANGED),
    "whatever a pickle says is run": Mutant("runtime/unpickling.py", '{"weights_only": True, **', '{"weights_only": False, **', PAYLOAD),
    "a signal stays on its rank": Mutant("stages/objective.py", "bool(num_stopping)", "wants_to_stop()", SIGNALLED),
    "the record is not cut back": Mutant("report/sinks.py", "metrics.drop_after(done_steps or -1)", "0", RETRIED),
    "a shard's bytes are not looked at": Mutant("data/reference.py", 'if file_digest(path) == name["digest"]:', "if True:", "tests/unit/test_precompute.py"),
}


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
    variables = {name: value for name, value in os.environ.items() if name not in ("KTO_FAULT_LEDGER", "PYTHONPATH")}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=folder, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SECONDS)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_safeguard_that_is_taken_out_is_missed(tree, name):
    mutant = MUTANTS[name]
    path = tree / "kto_ds" / mutant.file
    source = path.read_text(encoding="utf-8")
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
