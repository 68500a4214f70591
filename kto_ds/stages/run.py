"""A training run: what the loop and all around it use, when it stops, and its evaluation."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kto_ds.artifacts import fsync_path
from kto_ds.config import LossConfig, RunConfig
from kto_ds.data.batch_plan import BatchPlan
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.report.metrics_file import METRICS_FILE, Record, read_records
from kto_ds.report.samples_file import SAMPLES_FILE, drop_after
from kto_ds.report.sinks import Sinks
from kto_ds.runtime.checkpoint import correct_record, save_checkpoint
from kto_ds.runtime.collectives import World, on_main_rank
from kto_ds.runtime.engine import Engine
from kto_ds.runtime.retention import folder_name
from kto_ds.runtime.signals import WallTime
from kto_ds.runtime.watch import Watch
from kto_ds.stages.inputs import evaluation_splits
from kto_ds.stages.objective import Cut, evaluate_split
from kto_ds.stages.progress import Progress, with_evaluation
from kto_ds.stages.samples import Asker, Questions, ask
from kto_ds.stages.step_work import StepPlanner


class Inputs(NamedTuple):
    """What the run trains and evaluates on; the same on every rank."""

    splits: dict[str, TokenizedSplit]
    reference_logps: dict[str, np.ndarray]  # [2E] of each split, by pair id
    reference_way: tuple[str, str]  # the kernels that scored them: of attention, of all else
    plan: BatchPlan
    loss: LossConfig  # with numbers as weights
    record: dict  # what a resume compares
    questions: Questions | None = None  # that eval.generate asks


class Run(NamedTuple):
    """What the loop and all around it use."""

    config: RunConfig
    world: World
    inputs: Inputs
    engine: Engine
    planner: StepPlanner
    watch: Watch
    wall_time: WallTime
    aux_coef: float | None  # of a mixture of experts: weight of its load-balancing loss

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

    def is_sampled_at(self, step: int) -> bool:
        """Whether the policy is to answer the questions after this step, one that is evaluated or 0."""
        if self.inputs.questions is None:
            return False
        every = (self.config.eval.eval_steps or 1) * self.inputs.questions.settings.every
        return step == self.inputs.plan.num_steps or step % every == 0

    def is_saved_at(self, step: int) -> bool:
        """Whether a save is due in any case; one for a new best or for a stop comes on top."""
        return step == self.inputs.plan.num_steps or step % self.config.checkpoint.save_steps == 0

    def is_logged_at(self, step: int) -> bool:
        """Whether the means since the last line are due: also wherever a save may be, as a run that resumes from there knows no step before it."""
        return step % self.config.report.logging_steps == 0 or self.is_evaluated_at(step) or self.is_saved_at(step)


def evaluate(run: Run, sinks: Sinks, progress: Progress, known: Mapping[str, Record] | None = None) -> tuple[Progress, bool]:
    """Log the metrics of every evaluation split but those that are `known` already, by split. All ranks call this.

    Return the progress, with a new best if there is one, and whether the evaluation is through: not when the run is to stop before that.
    """
    step = progress.step
    run.watch.enter("evaluation", step)
    for name in evaluation_splits(run.inputs.splits):
        metrics = known.get(name) if known else None
        if metrics is None:
            split, references = run.inputs.splits[name], run.inputs.reference_logps[name]
            try:
                metrics = evaluate_split(run.engine, split, references, run.inputs.loss, sharding=run.planner.scoring, wants_to_stop=run.wants_to_stop)
            except Cut:
                return progress, False
            sinks.log({"split": name, "step": step, "epoch": run.inputs.plan.epoch_after(step), **metrics})
        # A known one counts too: the checkpoint may be older than the evaluation that was made up for.
        progress = with_evaluation(progress, run.config.checkpoint, name, metrics)
    return progress, sample(run, step)


def sample(run: Run, step: int) -> bool:
    """Have the policy answer the questions, if any are due, and return whether it is through with it: not when the run is to stop before that. All ranks call this."""
    if run.is_sampled_at(step):
        run.watch.enter("generation", step, at_once=step == 0)
        inputs = run.inputs
        asker = Asker(run.engine, inputs.questions, inputs.splits, inputs.reference_logps, inputs.loss.beta, run.config.seed, run.planner.scoring)
        wants_to_stop = run.wants_to_stop if step else lambda: False  # before the first step there is nothing to save, and the watch ends the run
        try:
            ask(asker, run.config.output_dir, step=step, wants_to_stop=wants_to_stop)
        except Cut:
            return False
    return True


def save(run: Run, progress: Progress) -> None:
    """Save the run as it is after progress.step. All ranks call this."""
    run.watch.enter("saving", progress.step)
    began = time.monotonic()
    on_main_rank(lambda: fsync_path(run.config.output_dir / METRICS_FILE))  # no checkpoint is to outlive the record of its steps
    record = {**run.inputs.record, "plan": run.inputs.plan.digest_until(progress.step), "progress": progress.to_json()}
    save_checkpoint(
        run.engine, run.checkpoints, step=progress.step, record=record, save_total_limit=run.config.checkpoint.save_total_limit,
        best_step=progress.best and progress.best.step, world=run.world,
    )  # fmt: skip
    run.wall_time.took(save=time.monotonic() - began)


def catch_up_on_evaluation(run: Run, sinks: Sinks, progress: Progress) -> tuple[Progress, bool]:
    """Make up for what an earlier start left out of the evaluation at the step that the run resumes from. Returns as `evaluate` does.

    Of a run at its start only what the policy answers before the first step is looked at.
    """
    on_main_rank(lambda: drop_after(run.config.output_dir / SAMPLES_FILE, progress.step or -1))
    if not progress.step:
        return progress, sample(run, 0)
    if not run.is_evaluated_at(progress.step):
        return progress, True
    now, is_through = evaluate(run, sinks, progress, known=logged_at(run, progress.step))
    if now.best != progress.best:  # there may be no save after this one
        on_main_rank(lambda: correct_record(run.checkpoints / folder_name(progress.step), {"progress": now.to_json()}))
    return now, is_through


def logged_at(run: Run, step: int) -> dict[str, Record]:
    """Return the line of metrics of this step, by split."""
    return on_main_rank(lambda: {record["split"]: record for record in read_records(run.config.output_dir / METRICS_FILE) if record["step"] == step})
