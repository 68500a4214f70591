"""KTO under DeepSpeed: set-up in one screen, the loop in another. One step is in objective.py."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PretrainedConfig

from kto_ds.artifacts import digest_of, require_match
from kto_ds.config import LossConfig, RunConfig
from kto_ds.config_text import write_yaml
from kto_ds.data.batch_plan import BatchPlan, plan_batches
from kto_ds.data.dataset import FILES, TokenizedSplit
from kto_ds.data.packing import require_fit
from kto_ds.data.sharding import Sharding
from kto_ds.model.checkpointing import checkpointed_share, in_words
from kto_ds.model.flops import ModelShape, model_shape, peak_flops
from kto_ds.model.load import load_policy
from kto_ds.model.scoring import Serving, choose_serving
from kto_ds.model.support import read_model_config, require_trainable
from kto_ds.report.metrics_file import METRICS_FILE
from kto_ds.report.plots import plot_metrics
from kto_ds.report.profiling import StepProfiler, make_room
from kto_ds.report.sinks import Sinks, open_sinks
from kto_ds.report.status import RunStatus
from kto_ds.report.throughput import Lap, StepTimer, device_clock, peak_memory_gib, speed_metrics, sum_of_laps, summary
from kto_ds.runtime.checkpoint import Checkpoint, load_checkpoint, newest_verified, require_same_ranks, save_checkpoint, set_aside
from kto_ds.runtime.collectives import World, barrier, gather_objects, on_main_rank, start
from kto_ds.runtime.deepspeed_config import check_zero_section, complete_deepspeed_config, read_deepspeed_config, zero_stage
from kto_ds.runtime.engine import Engine
from kto_ds.stages.guard import NUMERICS_FILE, StepOutcome, after_step, loss_limit, settle, window_metrics
from kto_ds.stages.identity import resolve_weights, run_record, weights_line
from kto_ds.stages.inputs import evaluation_splits, open_dataset, open_reference
from kto_ds.stages.objective import evaluate_split, measure_drift, require_no_drift, train_step
from kto_ds.stages.progress import Progress
from kto_ds.stages.serving import require_same_weights
from kto_ds.stages.step_work import StepPlanner
from kto_ds.staging import claim_folder


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

    @property
    def checkpoints(self) -> Path:
        return _checkpoints(self.config)


def main(config: RunConfig, profile: bool = False) -> None:
    model_config = read_model_config(config.model)
    require_trainable(config.model, model_config)
    raw_deepspeed_config = read_deepspeed_config(config.deepspeed.config)
    check_zero_section(raw_deepspeed_config.get("zero_optimization", {}), where=config.deepspeed.config)
    world = start()
    on_main_rank(lambda: claim_folder(config.output_dir))
    status = RunStatus(config.output_dir / "status.json", is_main=world.is_main)
    with status.until_the_end():
        status.running(0)
        deepspeed_config = complete_deepspeed_config(raw_deepspeed_config, optim=config.optim, dtype=config.model.dtype, on_cuda=world.device.type == "cuda")
        serving = choose_serving(config.model, model_config, world.device)
        inputs = _open_inputs(config)
        checkpoint = _find_checkpoint(config, inputs, world, zero_stage(deepspeed_config))
        if checkpoint is None or checkpoint.step < inputs.plan.num_steps:
            on_main_rank(lambda: _write_config(config))
        if profile:
            on_main_rank(lambda: make_room(config.output_dir))
        engine, shape = _build_engine(config, model_config, serving, deepspeed_config, inputs)
        run = Run(config, world, inputs, engine, _plan_steps(config, inputs, serving, world, shape))
        done = _resume_or_start(run, checkpoint)
        sinks = _open_sinks(run, serving, done)
        try:
            with StepProfiler(config.output_dir if profile and world.is_main else None) as profiler:
                laps = _loop(run, status, sinks, profiler, done)
        finally:
            sinks.close()
        on_main_rank(lambda: plot_metrics(config.output_dir / METRICS_FILE, config.output_dir / "metrics.png"))
        peaks = gather_objects(peak_memory_gib(engine.device))
    if world.is_main:
        if laps:
            print(summary(sum_of_laps(laps), peaks, peak_flops=peak_flops(engine.device, config.model.dtype)), flush=True)
        print(f"done: {inputs.plan.num_steps} steps; checkpoints, metrics and plot in {config.output_dir}; next: kto-ds export", flush=True)
    barrier()


def _loop(run: Run, status: RunStatus, sinks: Sinks, profiler: StepProfiler, done: int) -> list[Lap]:
    """Train from step `done` + 1 to the end and return what every log line took."""
    config, world, inputs, engine, planner = run
    plan, train = inputs.plan, inputs.splits["train"]
    window: list[StepOutcome] = []  # steps since the last log line
    progress = Progress(step=done, examples=int(plan.step_offsets[done]))
    laps: list[Lap] = []
    peak = peak_flops(engine.device, config.model.dtype)
    timer = StepTimer(device_clock(engine.device))
    status.running(done)

    for work in planner.ahead(done):
        step, learning_rate = work.step, engine.learning_rate
        limit = loss_limit(progress.recent_losses, config.train.loss_spike_sigmas)
        outcome = train_step(engine, work, train, inputs.reference_logps["train"], loss=inputs.loss, num_ranks=world.num_ranks, timer=timer, limit=limit)
        progress = after_step(progress, outcome, len(work.examples))
        if outcome.problem is not None:
            settle(outcome.problem, progress, config.train, examples=work.examples, split=train, record_in=config.output_dir if world.is_main else None)
        window.append(outcome)
        timer.add(work.cost)
        is_last = step == plan.num_steps

        # once in a while: log
        if is_last or step % config.report.logging_steps == 0:
            laps.append(timer.lap())
            metrics = {**window_metrics(window), "learning_rate": learning_rate}
            speed = speed_metrics(laps[-1], num_steps=len(window), num_ranks=world.num_ranks, peak_flops=peak)
            sinks.log({"split": "train", "step": step, "epoch": plan.epoch_after(step), **metrics, **speed, "peak_memory_gib": peak_memory_gib(engine.device)})
            status.running(step)
            window.clear()

        timer.begin("paused")
        profiler.after_step()

        # once in a while: evaluate
        if is_last or config.eval.eval_steps and step % config.eval.eval_steps == 0:
            for name in evaluation_splits(inputs.splits):
                metrics = evaluate_split(engine, inputs.splits[name], inputs.reference_logps[name], inputs.loss, sharding=planner.scoring)
                sinks.log({"split": name, "step": step, "epoch": plan.epoch_after(step), **metrics})

        # once in a while: save
        if is_last or step % config.checkpoint.save_steps == 0:
            save_checkpoint(engine, run.checkpoints, step=step, record=inputs.record, save_total_limit=config.checkpoint.save_total_limit, world=world)

        timer.begin("host")
    return laps


def _open_inputs(config: RunConfig) -> Inputs:
    """Open the artefacts and plan every step; whatever does not belong together is refused here, before weights are read."""
    splits, manifest = open_dataset(config)
    reference_logps, reference_manifest = open_reference(config, splits, manifest)
    for split in splits.values():
        require_fit(split.longest_pair_tokens, config.batch.max_tokens_per_microbatch, "batch.max_tokens_per_microbatch")
        require_fit(split.longest_pair_tokens, config.batch.scoring_tokens, "batch.max_tokens_per_scoring_microbatch")
    plan = plan_batches(
        splits["train"].kl_group_of, global_batch_size=config.batch.global_batch_size, num_train_epochs=config.train.num_train_epochs,
        max_steps=config.train.max_steps, shuffle=config.data.shuffle, seed=config.seed,
    )  # fmt: skip
    loss = resolve_weights(config.loss, splits["train"])
    record = {
        **run_record(config, loss),
        # Only what is trained on: evaluation rows that are added later are no reason to refuse a resume.
        "dataset": digest_of(*(entry["digest"] for name, entry in manifest["files"].items() if name.startswith("train/") and name != f"train/{FILES}")),
        "reference model": reference_manifest["identity"]["reference model"],
        "reference dtype": reference_manifest["identity"]["dtype"],
    }
    reference_way = reference_manifest["attention"], reference_manifest["kernels"]
    return Inputs(splits, reference_logps, reference_way, plan, loss, record)


def _build_engine(
    config: RunConfig, model_config: PretrainedConfig, serving: Serving, deepspeed_config: dict, inputs: Inputs
) -> tuple[Engine, ModelShape | None]:
    require_same_weights(config.model)
    policy = load_policy(
        config.model, model_config, layout=serving.layout, backend=serving.backend, kernels=serving.kernels,
        gradient_checkpointing=config.model.gradient_checkpointing, partition_for=deepspeed_config if zero_stage(deepspeed_config) == 3 else None,
    )  # fmt: skip
    shape = model_shape(policy, model_config)
    return Engine(policy, deepspeed_config, config.optim, inputs.plan.num_steps), shape


def _plan_steps(config: RunConfig, inputs: Inputs, serving: Serving, world: World, shape: ModelShape | None) -> StepPlanner:
    training = Sharding(serving.layout, config.batch.max_tokens_per_microbatch, world.rank, world.num_ranks, world.device)
    return StepPlanner(
        inputs.splits["train"], inputs.plan, config.seed, kl_fraction=config.loss.kl_fraction if config.loss.loss_type == "kto" else 0.0, training=training,
        scoring=training._replace(max_tokens=config.batch.scoring_tokens), shape=shape, recomputed_layers=checkpointed_share(config.model),
    )  # fmt: skip


def _find_checkpoint(config: RunConfig, inputs: Inputs, world: World, stage: int) -> Checkpoint | None:
    """Return the newest verified checkpoint if the run is to resume from one; one that does not fit is refused here, before weights are read."""
    if config.checkpoint.resume == "never":
        return None
    checkpoint = newest_verified(_checkpoints(config), world)
    if checkpoint is not None:
        remedy = "restore the config, choose another output_dir, or set checkpoint.resume: never"
        require_match(inputs.record, checkpoint.manifest["record"], where=str(checkpoint.folder), remedy=remedy)
        require_same_ranks(checkpoint, num_ranks=world.num_ranks, zero_stage=stage)
    return checkpoint


def _resume_or_start(run: Run, checkpoint: Checkpoint | None) -> int:
    """Return the number of steps already done: those of the checkpoint, or 0."""
    config, engine = run.config, run.engine
    engine.warm_up(run.planner.training.batch([], run.inputs.splits["train"]).to(engine.device))
    if config.checkpoint.resume == "never":
        on_main_rank(lambda: [set_aside(path) for path in (run.checkpoints, *(config.output_dir / name for name in (METRICS_FILE, NUMERICS_FILE)))])
    if checkpoint is not None:
        load_checkpoint(engine, checkpoint)
        return checkpoint.step
    _look_at_drift(run)
    return 0


def _look_at_drift(run: Run) -> None:
    """Measure how far policy and reference are apart before the first update; beyond rounding is an error where they are the same model."""
    config, inputs = run.config, run.inputs
    train, examples = inputs.splits["train"], inputs.plan.examples_of(1)
    pairs = np.concatenate([examples, train.mismatched_pairs(examples)]) if config.loss.loss_type == "kto" else examples
    dtypes = {config.model.dtype, config.reference.dtype or config.model.dtype}
    drift = measure_drift(run.engine, train, inputs.reference_logps["train"], pairs, dtypes=dtypes, sharding=run.planner.scoring)
    if run.world.is_main:
        print(f"policy and reference before the first update differ by {drift}", flush=True)
    if config.starts_from_reference:
        require_no_drift(drift, config.reference_dir)


def _open_sinks(run: Run, serving: Serving, done: int) -> Sinks:
    """Say what begins, and open what the run writes to."""
    config, world, inputs = run.config, run.world, run.inputs
    if not world.is_main:
        return Sinks([])
    plan, train = inputs.plan, inputs.splits["train"]
    begin = "nothing left to do" if done == plan.num_steps else f"{'resuming' if done else 'starting'} at step {done + 1}"
    print(f"{begin} of {plan.num_steps}: {train.num_examples:,} examples, {config.batch.global_batch_size} a step, "
          f"{world.num_ranks} rank{'s' if world.num_ranks > 1 else ''}, ZeRO {run.engine.stage}, {config.model.dtype}, {serving.way}", flush=True)  # fmt: skip
    print(f"micro-batches of {config.batch.max_tokens_per_microbatch:,} tokens, {config.batch.scoring_tokens:,} without gradients; {in_words(config.model)}", flush=True)
    if serving.notice:
        print(f"notice: {serving.notice}", flush=True)
    if (serving.backend, serving.kernels) != inputs.reference_way:
        theirs, ours = " and ".join(inputs.reference_way), f"{serving.backend} and {serving.kernels}"
        print(f"notice: the reference was scored with {theirs} kernels, the policy runs with {ours}: rewards begin with the rounding between them", flush=True)
    if inputs.loss != config.loss:
        print(f"automatic weights: {weights_line(inputs.loss)}", flush=True)
    run_config = config.model_copy(update={"loss": inputs.loss}).model_dump(mode="json")
    return open_sinks(output_dir=config.output_dir, total_steps=plan.num_steps, done_steps=done, wandb=config.report.wandb, run_config=run_config)


def _checkpoints(config: RunConfig) -> Path:
    return config.output_dir / "checkpoints"


def _write_config(config: RunConfig) -> None:
    with open(config.output_dir / "config.yaml", "w", encoding="utf-8") as stream:
        write_yaml(config, stream)
