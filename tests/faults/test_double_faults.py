"""A second fault while the first one is being mended: at every moment some checkpoint is whole, and the end is the same."""

from pathlib import Path

import pytest

from tests.distributed import ranks
from tests.distributed.tiny_run import SAVE_STEPS, config_of
from tests.faults.ledger import tally
from tests.faults.points import STAGED, TRAIN, Point, kill_once
from tests.faults.state import checkpoints_of, final_state, newest_intact, step_of, steps_begun

pytestmark = pytest.mark.distributed

BY_PHASE = {point.phase: point for point in TRAIN}
IN_SAVE, IN_RETENTION = BY_PHASE["between DeepSpeed's files"], BY_PHASE["retention: old one renamed, not deleted"]
AFTER_RENAME = BY_PHASE["after the rename"]
LOAD = "deepspeed.runtime.engine.DeepSpeedEngine.load_checkpoint"
SET_ASIDE = r"\.corrupt\."
# (a kill; whether the newest checkpoint is damaged after it; the kill of the run that mends it)
DOUBLE = {
    "save, then before the load": (IN_SAVE, False, Point("load", LOAD)),
    "save, then after the load": (IN_SAVE, False, Point("load", LOAD, "after")),
    "rename, then before metrics are cut back": (AFTER_RENAME, False, Point("metrics", "kto_ds.artifacts.write_atomically", "before", r"metrics\.jsonl", on_rank_0_only=True)),
    "save, then the same save": (IN_SAVE, False, Point("save", "torch.save", "after", STAGED)),
    "save, then the rename of the same save": (IN_SAVE, False, Point("save", "pathlib.Path.rename", "before", r"\.tmp-step-.* .*/step-", on_rank_0_only=True)),
    "retention, then the next retention": (IN_RETENTION, False, Point("retention", "pathlib.Path.rename", "after", r"\.del-", on_rank_0_only=True)),
    "damage, then before it is set aside": (AFTER_RENAME, True, Point("fall-back", "pathlib.Path.rename", "before", SET_ASIDE, on_rank_0_only=True)),
    "damage, then after it is set aside": (AFTER_RENAME, True, Point("fall-back", "pathlib.Path.rename", "after", SET_ASIDE, on_rank_0_only=True)),
    "damage, then the load of the one before": (AFTER_RENAME, True, Point("load", LOAD)),
    "damage, then the save in its place": (AFTER_RENAME, True, Point("save", "pathlib.Path.rename", "after", r"\.tmp-step-.* .*/step-", on_rank_0_only=True)),
}


def damage(folder: Path) -> None:
    path = sorted(folder.rglob("*optim_states.pt"))[0]
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("name", "victim"),
    [pytest.param(name, victim, id=f"{name}, rank {victim}", marks=pytest.mark.slow) for name in DOUBLE for victim in (0, 1)],
)
def test_a_kill_during_the_recovery(tiny, unbroken, tmp_path, name, victim):
    first, is_damaged, second = DOUBLE[name]
    run = tmp_path / "run"
    command = ["train", *config_of(tiny, output_dir=run)]
    with tally("R5", "a kill, or damage to the newest checkpoint, then a kill of the run that recovers") as counts:
        kill_once(command, first, victim, tmp_path / "first", 2)
        if is_damaged:
            assert len(checkpoints_of(run)) >= 2
            damage(checkpoints_of(run)[-1])
        assert newest_intact(run) is not None
        kill_once(command, second, victim, tmp_path / "second", 2)
        counts.injected += 1
        newest = newest_intact(run)
        assert newest is not None and steps_begun(run) - step_of(newest) <= SAVE_STEPS * (1 + is_damaged)
        output = ranks.require_success(command, log=tmp_path / "log")
        assert f"resuming at step {step_of(newest) + 1} of 12" in output
        assert final_state(run) == unbroken.state
        counts.survived += 1
