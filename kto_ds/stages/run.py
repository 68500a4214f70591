"""A training run: what the loop and all around it use, when it stops, and its evaluation."""

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kto_ds.config import LossConfig, RunConfig
from kto_ds.data.batch_plan import BatchPlan
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.report.sinks import METRICS_FILE, Sinks, read_records
from kto_ds.runtime.collectives import World, on_main_rank
from kto_ds.runtime.engine import Engine
from kto_ds.runtime.signals import WallTime
from kto_ds.runtime.watch import Watch
from kto_ds.stages.inputs import evaluation_splits
from kto_ds.stages.objective import Cut, evaluate_split
from kto_ds.stages.step_work import StepPlanner


class Inputs(NamedTuple):
    """What the run trains and evaluates on; the same on every rank."""

    splits: dict[str, TokenizedSplit]
    reference_logps: dict[str, np.ndarray]  # [2E] of each split, by pair id
    reference_way: tuple[str, str]  # the kernels that scored them: of attention, of all else
    plan: BatchPlan
    loss: LossConfig  # with numbers as weights
    record: dict  # what a resume must find unchanged


class Run(NamedTuple):
    """What the loop and all around it use."""

    config: RunConfig
    world: World
    inputs: Inputs
    engine: Engine
    planner: StepPlanner
    watch: Watch
    wall_time: WallTime

    @property
    def checkpoints(self) -> Path:
        return self.config.output_dir / "checkpoints"

    def wants_to_stop(self) -> bool:
        """Whether this rank was asked to stop. Rank 0's clock is the one that counts."""
        if self.world.is_main and self.wall_time.is_over():
            self.watch.ask_to_stop("--max-wall-time is almost over")
        return self.watch.stop_reason is not None

    def is_evaluated_at(self, step: int) -> bool:
        every = self.config.eval.eval_steps
        return step == self.inputs.plan.num_steps or every is not None and step % every == 0


def evaluate(run: Run, sinks: Sinks, step: int, besides: Collection[str] = ()) -> bool:
    """Log the metrics of every evaluation split but those of `besides`; False when the run is to stop before it is through. All ranks call this."""
    run.watch.enter("evaluation", step)
    for name in evaluation_splits(run.inputs.splits):
        if name not in besides:
            split, references = run.inputs.splits[name], run.inputs.reference_logps[name]
            try:
                metrics = evaluate_split(run.engine, split, references, run.inputs.loss, sharding=run.planner.scoring, wants_to_stop=run.wants_to_stop)
            except Cut:
                return False
            sinks.log({"split": name, "step": step, "epoch": run.inputs.plan.epoch_after(step), **metrics})
    return True


def splits_logged_at(run: Run, step: int) -> set[str]:
    """Return the splits that have a line of metrics of this step."""
    return on_main_rank(lambda: {record["split"] for record in read_records(run.config.output_dir / METRICS_FILE) if record["step"] == step})
