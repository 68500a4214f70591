"""Places in the code where a fault is put in: a function is wrapped in the forked rank, and before or after one of its calls something happens.

A place names a function by where it is defined; every module of kto_ds that has imported it gets the wrapped one. `about` picks the calls whose
arguments, as text, match: a rename of `.tmp-step-*` and one of an artefact are different places.
"""

import functools
import os
import pydoc
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from tests.distributed import ranks

SURVIVORS_SECONDS = 1.0  # what a rank has to notice that another one is gone, before its launcher ends it


class Point(NamedTuple):
    phase: str
    target: str  # dotted name of the function
    when: Literal["before", "after"] = "before"
    about: str = ""  # pattern of the arguments
    nth: int = 1  # of these calls, in one process
    on_rank_0_only: bool = False  # what only rank 0 does: a kill of another rank falls into it too


STAGED, MANIFEST_OF_STAGED = r"\.tmp-step-", r"\.tmp-step-.*manifest"
# The third save of the run, of step 6, where none is named: two checkpoints are there, and the first retention is behind.
TRAIN = [
    Point("phase A: reference point", "kto_ds.losses.reference_point", nth=7),
    Point("phase B: backward", "kto_ds.runtime.engine.Engine.backward", nth=8),
    Point("before the update", "kto_ds.runtime.engine.Engine.step", nth=7),
    Point("after the update", "kto_ds.runtime.engine.Engine.step", "after", nth=8),
    Point("before a record is logged", "kto_ds.report.sinks.MetricsFile.log", nth=7, on_rank_0_only=True),
    Point("after a record is logged", "kto_ds.report.sinks.MetricsFile.log", "after", nth=7, on_rank_0_only=True),
    Point("evaluation", "kto_ds.stages.objective.evaluate_split", nth=2),
    Point("before DeepSpeed saves", "deepspeed.runtime.engine.DeepSpeedEngine.save_checkpoint", nth=3),
    Point("between DeepSpeed's files", "torch.save", "after", STAGED, nth=5),
    Point("after DeepSpeed has saved", "deepspeed.runtime.engine.DeepSpeedEngine.save_checkpoint", "after", nth=3),
    Point("before sync and digest", "kto_ds.artifacts.describe_file", "before", STAGED, nth=5),
    Point("after sync and digest", "kto_ds.artifacts.describe_file", "after", STAGED, nth=6),
    Point("before the manifest", "kto_ds.artifacts.seal", "before", STAGED, nth=3, on_rank_0_only=True),
    Point("manifest written, not renamed", "kto_ds.artifacts.fsync_path", "after", MANIFEST_OF_STAGED, nth=3, on_rank_0_only=True),
    Point("after the manifest", "kto_ds.artifacts.seal", "after", STAGED, nth=3, on_rank_0_only=True),
    Point("before the rename", "pathlib.Path.rename", "before", r"\.tmp-step-.* .*/step-", nth=3, on_rank_0_only=True),
    Point("after the rename", "pathlib.Path.rename", "after", r"\.tmp-step-.* .*/step-", nth=3, on_rank_0_only=True),
    Point("before the hint `latest`", "kto_ds.artifacts.write_atomically", "before", r"checkpoints/latest", nth=3, on_rank_0_only=True),
    Point("after the hint `latest`", "kto_ds.artifacts.write_atomically", "after", r"checkpoints/latest", nth=3, on_rank_0_only=True),
    Point("retention: before the old one is renamed", "pathlib.Path.rename", "before", r"\.del-", nth=2, on_rank_0_only=True),
    Point("retention: old one renamed, not deleted", "pathlib.Path.rename", "after", r"\.del-", nth=2, on_rank_0_only=True),
    Point("retention: after the old one is deleted", "shutil.rmtree", "after", r"\.del-", nth=2, on_rank_0_only=True),
]
PRECOMPUTE = [
    Point("before a shard", "kto_ds.data.reference.write_shard"),
    Point("shard written, not renamed", "kto_ds.artifacts.fsync_path", "after", r"/\.scored-"),
    Point("after a shard", "kto_ds.data.reference.write_shard", "after"),
    Point("merge: before the manifest", "kto_ds.artifacts.seal", on_rank_0_only=True),
    Point("merge: before the rename", "pathlib.Path.rename", "before", r"\.incomplete'\) ", on_rank_0_only=True),
    Point("merge: after the rename", "pathlib.Path.rename", "after", r"\.incomplete'\) ", on_rank_0_only=True),
]
EXPORT = [
    Point("before weights are read", "kto_ds.runtime.restore.read_weights"),
    Point("weights written, no tokenizer", "kto_ds.model.save.write_model", "after"),
    Point("before the rename", "pathlib.Path.rename", "before", r"\.incomplete'\) "),
    Point("after the rename", "pathlib.Path.rename", "after", r"\.incomplete'\) "),
]
PREPARE = [
    Point("before the manifest", "kto_ds.artifacts.seal"),
    Point("before the rename", "pathlib.Path.rename", "before", r"\.incomplete'\) "),
    Point("after the rename", "pathlib.Path.rename", "after", r"\.incomplete'\) "),
]


def kill_once(command: list[str], point: Point, victim: int, folder: Path, num_ranks: int) -> None:
    """Start a command, kill -9 one rank at a point of it, and soon after whoever is left."""
    folder.mkdir(exist_ok=True)
    before = functools.partial(kill_at, point=point, victim=victim, folder=folder)
    with ranks.Ranks(command, log=folder / "log", num_ranks=num_ranks, before=before) as started:
        started.processes[victim].join(ranks.SECONDS)
        assert has_happened(folder), started.output()[-3000:]
        assert started.processes[victim].exitcode == -9
        deadline = time.monotonic() + SURVIVORS_SECONDS
        while started.is_running() and time.monotonic() < deadline:
            time.sleep(0.02)


def kill_at(rank: int, *, point: Point, victim: int, folder: Path) -> None:
    """In every rank, ahead of the program: when the point is reached, kill -9 `victim`, once. `folder` is where the ranks tell each other of it."""
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    if rank == (0 if point.on_rank_0_only else victim):
        call_at(point, functools.partial(_kill, victim, folder))


def _kill(victim: int, folder: Path) -> None:
    mark(folder, f"rank {victim}")
    os.kill(int((folder / f"pid{victim}").read_text()), signal.SIGKILL)
    time.sleep(0.05)  # a signal to another process takes a moment; this one goes on as it would


def mark(folder: Path, text: str) -> None:
    """Note that the fault has happened; a second time is an error."""
    with (folder / "happened").open("x") as file:
        file.write(text)


def has_happened(folder: Path) -> bool:
    return (folder / "happened").exists()


def call_at(point: Point, action: Callable[[], None]) -> None:
    """Wrap the function of the point in this process, so that `action` is called at the n-th of its calls."""
    owner, name = point.target.rpartition(".")[::2]
    holder = pydoc.locate(owner)
    original = vars(holder)[name]
    calls = 0

    @functools.wraps(original)
    def wrapped(*args, **options):
        nonlocal calls
        fits = re.search(point.about, " ".join(map(repr, [*args, *options.values()])), re.DOTALL)
        calls += bool(fits)
        is_due = fits and calls == point.nth
        if is_due and point.when == "before":
            action()
        result = original(*args, **options)
        if is_due and point.when == "after":
            action()
        return result

    setattr(holder, name, wrapped)
    for module in [module for module_name, module in sys.modules.items() if module_name.split(".")[0] == "kto_ds"]:
        if vars(module).get(name) is original:
            setattr(module, name, wrapped)
