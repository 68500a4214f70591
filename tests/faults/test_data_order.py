"""Which examples a step takes does not hang on the number of ranks, nor on where a run was stopped."""

import functools
import shutil
from pathlib import Path

import pytest

from kto_ds.cli import read_config
from kto_ds.data.batch_plan import BatchPlan, plan_batches
from kto_ds.data.dataset import TokenizedSplit
from tests.distributed import ranks
from tests.distributed.tiny_run import NUM_STEPS, config_of
from tests.faults.fed import fed_by_step, go_back_to, record_fed
from tests.faults.ledger import tally

pytestmark = pytest.mark.distributed

# 4 steps an epoch: in the middle of one, at the end of one, and one step before it.
STOPS = [6, 8, 11]


def plan_of(tiny: Path) -> tuple[BatchPlan, int]:
    config, _ = read_config("train", config_of(tiny))
    train = TokenizedSplit.load(config.dataset_dir / "train")
    plan = plan_batches(
        train.kl_group_of, global_batch_size=config.batch.global_batch_size, num_train_epochs=config.train.num_train_epochs, max_steps=None, shuffle=True, seed=config.seed
    )
    return plan, train.num_examples


def fed_by(tiny: Path, run: Path, num_ranks: int) -> dict[int, list[int]]:
    command = ["train", *config_of(tiny, output_dir=run, checkpoint__save_steps=1, checkpoint__save_total_limit=NUM_STEPS, eval__eval_steps="null")]
    exit_codes, output = ranks.run(command, log=run.parent / "log", num_ranks=num_ranks, before=functools.partial(record_fed, folder=run.parent))
    assert exit_codes == [0] * num_ranks, output[-4000:]
    return fed_by_step(run.parent)


@pytest.mark.slow
def test_every_step_takes_the_same_examples_on_any_ranks_and_after_any_stop(tiny, tmp_path):
    plan, num_examples = plan_of(tiny)
    planned = {step: plan.examples_of(step).tolist() for step in range(1, NUM_STEPS + 1)}
    with tally("R17", "1 and 2 ranks; stopped within an epoch, at its end, before it: ids of the plan and ids fed", stock="keeps no data position") as counts:
        assert fed_by(tiny, tmp_path / "two", 2) == planned
        for epoch in range(3):
            ids = sorted(example for step in range(4 * epoch + 1, 4 * epoch + 5) for example in planned[step])
            assert ids == list(range(num_examples)), f"epoch {epoch + 1} has every example once"
        assert planned[1] != planned[5], "every epoch has an order of its own"
        for num_ranks, stop in zip((1, 2, 1), STOPS):
            run = tmp_path / f"from-{stop}"
            shutil.copytree(tmp_path / "two", run)
            go_back_to(run, stop)
            counts.injected += 1
            assert fed_by(tiny, run, num_ranks) == {step: planned[step] for step in range(stop + 1, NUM_STEPS + 1)}
            counts.survived += 1
