"""KTO under DeepSpeed: set-up in one screen, the loop in another. One step is in objective.py."""

import time

import numpy as np
from kto_ds.config import RunConfig
from kto_ds.config_text import write_yaml
from kto_ds.model.flops import peak_flops
from kto_ds.model.scoring import choose_serving
from kto_ds.model.support import read_model_config, require_trainable, router_aux_loss_coef
from kto_ds.report.metrics_file import METRICS_FILE
from kto_ds.report.plots import plot_metrics
from kto_ds.report.profiling import StepProfiler, make_room
from kto_ds.report.samples_file import SAMPLES_FILE
from kto_ds.report.sinks import Sinks, open_sinks
from kto_ds.report.status import RunStatus
from kto_ds.report.tensorboard import require_tensorboard
from kto_ds.report.throughput import Lap, StepTimer, device_clock, peak_memory_gib, speed_metrics
from kto_ds.runtime.collectives import any_across_ranks, barrier, gather_objects, limit_waits, on_main_rank, start
from kto_ds.runtime.deepspeed_config import check_zero_section, complete_deepspeed_config, read_deepspeed_config, zero_stage
from kto_ds.runtime.guard import GO_ON, guarded, preempted, reason_to_stop, stacks_folder
from kto_ds.runtime.restore import Checkpoint
from kto_ds.runtime.retention import set_aside
from kto_ds.runtime.signals import WallTime, wall_seconds
from kto_ds.stages.announce import announce, conclude
from kto_ds.stages.build import build_engine, open_inputs, plan_steps, require_served
from kto_ds.stages.numerics import NUMERICS_FILE, StepOutcome, after_step, loss_limit, settle, window_metrics
from kto_ds.stages.objective import measure_drift, require_no_drift, train_step
from kto_ds.stages.progress import Progress
from kto_ds.stages.resume import find_checkpoint, restore
from kto_ds.stages.run import Run, catch_up_on_evaluation, evaluate, save
from kto_ds.staging import claim_folder


def main(config: RunConfig, profile: bool = False, accept_changes: bool = False, max_wall_time: str | None = None) -> None:
    began = time.monotonic()
    wall_time = WallTime(max_wall_time and wall_seconds(max_wall_time))
    model_config = read_model_config(config.model)
    require_trainable(config.model, model_config)
    aux_coef = router_aux_loss_coef(config.model, model_config)
    raw_deepspeed_config = read_deepspeed_config(config.deepspeed.config)
    check_zero_section(raw_deepspeed_config.get("zero_optimization", {}), where=config.deepspeed.config)
    if config.report.tensorboard:
        require_tensorboard()
    seconds = config.train.setup_timeout_seconds
    world = start(timeout_seconds=seconds, dumps=stacks_folder(config.output_dir, "train"))
    on_main_rank(lambda: claim_folder(config.output_dir))
    status = RunStatus(config.output_dir / "status.json", is_main=world.is_main)
    with status.until_the_end(), guarded(world, config.output_dir, "train", seconds=seconds, on_end=lambda end: status.end(end.state, end.exit_code, end.message)) as watch:
        status.running(0)
        deepspeed_config = complete_deepspeed_config(raw_deepspeed_config, optim=config.optim, dtype=config.model.dtype, on_cuda=world.device.type == "cuda")
        serving = choose_serving(config.model, model_config, world.device)
        require_served(config, model_config, deepspeed_config, serving, world)
        inputs = open_inputs(config)
        checkpoint = find_checkpoint(config, inputs.record, inputs.plan, world, zero_stage(deepspeed_config), accept_changes=accept_changes)
        if checkpoint is None or checkpoint.step < inputs.plan.num_steps:
            on_main_rank(lambda: _write_config(config))
        if profile:
            on_main_rank(lambda: make_room(config.output_dir))
        done = checkpoint.step if checkpoint else 0
        on_main_rank(lambda: announce(config, model_config, serving, deepspeed_config, inputs, world, aux_coef=aux_coef, done_steps=done))
        engine, shape = build_engine(config, model_config, serving, deepspeed_config, inputs, world)
        limit_waits(seconds)  # of the groups that DeepSpeed has made
        run = Run(config, world, inputs, engine, plan_steps(config, inputs, serving, world, shape, aux_coef), watch, wall_time, aux_coef)
        progress = _resume_or_start(run, checkpoint)
        with _open_sinks(run, progress.step) as sinks, StepProfiler(config.output_dir if profile and world.is_main else None) as profiler:
            laps, progress, stopped_at = _loop(run, status, sinks, profiler, progress)
        engine.close()
        if stopped_at is not None:
            remedy = GO_ON if config.checkpoint.resume == "auto" else "to go on from there, set checkpoint.resume: auto"
            raise preempted(world, f"{reason_to_stop(watch)}: stopped after step {stopped_at} of {inputs.plan.num_steps}, which is saved", remedy=remedy)
        on_main_rank(lambda: plot_metrics(config.output_dir / METRICS_FILE, config.output_dir / "metrics.png"))
        peaks = gather_objects(peak_memory_gib(engine.device))
    if world.is_main:
        best_step = progress.best and progress.best.step
        conclude(config, laps, peaks, world, num_steps=inputs.plan.num_steps, best_step=best_step, seconds=time.monotonic() - began)
    barrier()


def _loop(run: Run, status: RunStatus, sinks: Sinks, profiler: StepProfiler, progress: Progress) -> tuple[list[Lap], Progress, int | None]:
    """Train on from `progress` to the end and return what every log line took, how far the run is, and the step after which it was stopped, if it was."""
    config, world, inputs, engine, planner, watch, wall_time, aux_coef = run
    plan, train = inputs.plan, inputs.splits["train"]
    window: list[StepOutcome] = []  # steps since the last log line
    laps: list[Lap] = []
    peak = peak_flops(engine.device, config.model.dtype)
    done = progress.step
    status.running(done)
    progress, is_through = catch_up_on_evaluation(run, sinks, progress)
    if not is_through:
        return laps, progress, done

    watch.enter("input", done + 1)
    timer = StepTimer(device_clock(engine.device))
    for work in planner.ahead(done):
        step, learning_rate, began = work.step, engine.learning_rate, time.monotonic()
        watch.enter("step", step)
        limit = loss_limit(progress.recent_losses, config.train.loss_spike_sigmas)
        outcome = train_step(
            engine, work, train, inputs.reference_logps["train"], loss=inputs.loss, num_ranks=world.num_ranks, timer=timer, limit=limit,
            wants_to_stop=run.wants_to_stop, aux_coef=aux_coef,
        )  # fmt: skip
        progress = after_step(progress, outcome, step=step, num_examples=len(work.examples))
        if outcome.problem is not None:
            settle(outcome.problem, progress, config.train, examples=work.examples, split=train, record_in=config.output_dir if world.is_main else None)
        window.append(outcome)
        is_stopping = outcome.is_stopping
        timer.add(work.cost)
        wall_time.took(step=time.monotonic() - began)
        if step == done + 1:  # kernels are compiled, the order of parameters is known
            watch.limit(config.train.step_timeout_seconds)
            limit_waits(config.train.step_timeout_seconds)

        # once in a while: log
        if run.is_logged_at(step) or is_stopping:
            laps.append(timer.lap())
            metrics = {**window_metrics(window), "learning_rate": learning_rate}
            speed = speed_metrics(laps[-1], num_steps=len(window), num_ranks=world.num_ranks, peak_flops=peak)
            sinks.log({"split": "train", "step": step, "epoch": plan.epoch_after(step), **metrics, **speed, "peak_memory_gib": peak_memory_gib(engine.device)})
            status.running(step)
            window.clear()

        timer.begin("paused")
        profiler.after_step()

        # once in a while: evaluate; one that is left out or cut short is made up for by the run that goes on from here
        if run.is_evaluated_at(step) and not is_stopping:
            progress, is_through = evaluate(run, sinks, progress)
            is_stopping = not is_through

        # once in a while: save
        is_best = progress.best is not None and progress.best.step == step
        if run.is_saved_at(step) or is_best or is_stopping:
            save(run, progress)
            is_stopping = is_stopping or any_across_ranks(run.wants_to_stop(), engine.device)  # asked meanwhile: this save is the one
        if is_stopping:
            return laps, progress, step

        watch.enter("input", step + 1)
        timer.begin("host")
    watch.enter("closing", plan.num_steps)
    return laps, progress, None


def _resume_or_start(run: Run, checkpoint: Checkpoint | None) -> Progress:
    """Return how far the run is: as far as the checkpoint, or at its start."""
    config, engine = run.config, run.engine
    engine.warm_up(run.planner.training.batch([], run.inputs.splits["train"]).to(engine.device), balances_experts=bool(run.aux_coef))
    if config.checkpoint.resume == "never":
        on_main_rank(lambda: [set_aside(path) for path in (run.checkpoints, *(config.output_dir / name for name in (METRICS_FILE, NUMERICS_FILE, SAMPLES_FILE)))])
    progress = restore(engine, checkpoint, config.seed, run.world)
    if checkpoint is None:
        _look_at_drift(run)
    return progress


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


def _open_sinks(run: Run, done: int) -> Sinks:
    """Open what the run writes to; on rank 0 alone."""
    config, inputs = run.config, run.inputs
    if not run.world.is_main:
        return Sinks([])
    run_config = config.model_copy(update={"loss": inputs.loss}).model_dump(mode="json")
    return open_sinks(
        output_dir=config.output_dir, total_steps=inputs.plan.num_steps, done_steps=done, report=config.report, run_config=run_config,
        sources={"dataset": config.dataset_dir, "reference": config.reference_dir}, stall_seconds=config.train.step_timeout_seconds / 2,
    )  # fmt: skip


def _write_config(config: RunConfig) -> None:
    with open(config.output_dir / "config.yaml", "w", encoding="utf-8") as stream:
        write_yaml(config, stream)
