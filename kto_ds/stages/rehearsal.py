"""A run in small, in a folder that is removed again: a step with the run's own model, engine and config, a save, another step, and back to what was saved.

It takes the run's artefacts where they are there, and made-up rows of full length where they are not: these fill a micro-batch on every rank, so that what
fits here fits there.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import PretrainedConfig

from kto_ds.artifacts import digest_of, state_of
from kto_ds.config import RunConfig
from kto_ds.data.batch_plan import plan_batches
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.errors import NumericsError, UserError
from kto_ds.model.scoring import Serving
from kto_ds.model.support import longest_servable, router_aux_loss_coef
from kto_ds.report.throughput import StepTimer, device_clock, peak_memory_gib
from kto_ds.runtime.checkpoint import save_checkpoint
from kto_ds.runtime.collectives import World, barrier, gather_objects, on_main_rank
from kto_ds.runtime.engine import Engine
from kto_ds.runtime.guard import guarded
from kto_ds.runtime.peers import End
from kto_ds.runtime.restore import load_checkpoint, newest_verified
from kto_ds.runtime.retention import folder_bytes
from kto_ds.runtime.rng import derive_rng, rng_state
from kto_ds.runtime.watch import Watch
from kto_ds.stages.build import build_engine, open_inputs, plan_steps
from kto_ds.stages.identity import resolve_weights, run_record
from kto_ds.stages.objective import logps_of, train_step
from kto_ds.stages.progress import Progress
from kto_ds.stages.run import Inputs
from kto_ds.stages.step_work import StepPlanner, StepWork
from kto_ds.staging import locked

FOLDER = ".doctor"  # below output_dir


class Rehearsal(NamedTuple):
    step_seconds: float
    save_seconds: float
    saved_bytes: int
    resume_seconds: float
    peak_memory_gib: float  # of the rank that takes most
    problem: str  # of the state after the resume, or an empty text
    rows: str = ""  # what it was made with
    notice: str = ""  # why not with the run's artefacts, although they are there
    ready_seconds: float = 0.0  # that reading the model and making the engine took


def rehearse(
    config: RunConfig, model_config: PretrainedConfig, deepspeed_config: dict, serving: Serving, world: World, *, on_end: Callable[[End], object]
) -> Rehearsal:
    """Take a step, save, take another one, load what was saved, and compare. All ranks call this; KtoError when any of it fails, as it would in the run.

    `on_end` is called on the rank that speaks where a rank fails alone or hangs, and the process is ended.
    """

    def end(reason: End) -> None:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        on_end(reason)

    with _scratch_folder(config.output_dir, world) as folder:
        with guarded(world, folder, "doctor", seconds=config.train.setup_timeout_seconds, on_end=end) as watch, _naming_lack_of_memory():
            inputs, rows, notice = _inputs(config, model_config, world)
            watch.enter("reading the model", at_once=True)
            began = time.monotonic()
            engine, shape = build_engine(config, model_config, serving, deepspeed_config, inputs, world)
            ready_seconds = time.monotonic() - began
            aux_coef = router_aux_loss_coef(config.model, model_config)
            planner = plan_steps(config, inputs, serving, world, shape, aux_coef)
            derive_rng(config.seed, 0, world.rank, world.device)
            engine.warm_up(planner.training.batch([], planner.split).to(engine.device), balances_experts=bool(aux_coef))
            found = _steps(config, world, inputs, engine, planner, aux_coef, watch, folder / "checkpoints")
        barrier()  # nobody writes there any more
    return found._replace(rows=rows, notice=notice, ready_seconds=ready_seconds)


@contextmanager
def _naming_lack_of_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        remedy = "lower batch.max_tokens_per_microbatch (and the scoring one), checkpoint every layer, use more GPUs, or a deepspeed.config with offload"
        raise UserError(f"a step does not fit into the device's memory: {str(error).splitlines()[0]}", where="batch.max_tokens_per_microbatch", remedy=remedy) from error


def _steps(
    config: RunConfig, world: World, inputs: Inputs, engine: Engine, planner: StepPlanner, aux_coef: float | None, watch: Watch, root: Path
) -> Rehearsal:
    work = planner.work_of(1)
    references = inputs.reference_logps.get("train")
    if references is None:
        pairs = np.arange(2 * planner.split.num_examples)
        references = logps_of(engine, planner.scoring.batches(pairs, planner.split), pairs, engine.device).cpu().numpy()
    watch.enter("the step", 1, at_once=True)
    take = partial(_take, engine, work, planner.split, references, inputs, world, aux_coef)
    take()
    began = time.monotonic()
    take()  # now kernels are compiled, and the order of parameters is known
    step_seconds, saved_state = time.monotonic() - began, _state(engine, world)

    watch.enter("the save", 1, at_once=True)
    began = time.monotonic()
    record = {**inputs.record, "plan": inputs.plan.digest_until(1), "progress": Progress(step=1, examples=len(work.examples)).to_json()}
    save_checkpoint(engine, root, step=1, record=record, save_total_limit=1, best_step=None, world=world)
    save_seconds = time.monotonic() - began

    watch.enter("another step", 2, at_once=True)
    take()
    has_moved = all(gather_objects(_state(engine, world) != saved_state))
    watch.enter("the resume", 1, at_once=True)
    began = time.monotonic()
    checkpoint = newest_verified(root, world, sets_aside=False)
    load_checkpoint(engine, checkpoint, seed=config.seed, world=world)
    resume_seconds = time.monotonic() - began

    differing = [rank for rank, is_same in enumerate(gather_objects(_state(engine, world) == saved_state)) if not is_same]
    problem = f"after the resume the state is not what was saved, on ranks {', '.join(map(str, differing))}" if differing else "" if has_moved else "a step has changed nothing"
    size = on_main_rank(lambda: folder_bytes(checkpoint.folder))
    peak = max(gather_objects(peak_memory_gib(engine.device)))
    return Rehearsal(step_seconds, save_seconds, size, resume_seconds, peak, problem)


def _take(engine: Engine, work: StepWork, split: TokenizedSplit, references: np.ndarray, inputs: Inputs, world: World, aux_coef: float | None) -> None:
    outcome = train_step(
        engine, work, split, references, loss=inputs.loss, num_ranks=world.num_ranks, timer=StepTimer(device_clock(engine.device)), limit=float("inf"),
        wants_to_stop=lambda: False, aux_coef=aux_coef,
    )  # fmt: skip
    if outcome.problem is not None:
        raise NumericsError(f"the step fails: {outcome.problem.message}")


def _state(engine: Engine, world: World) -> str:
    generators = (state.numpy().tobytes() for state in rng_state(world.device).values())
    return digest_of(engine.state_digest(), *generators)


@contextmanager
def _scratch_folder(output_dir: Path, world: World) -> Iterator[Path]:
    """Yield a folder of this doctor alone; what a killed one left there is gone, and so is the folder after the block."""
    folder = output_dir / FOLDER
    with ExitStack() as stack:

        def take_over() -> None:
            stack.enter_context(locked(output_dir / "doctor"))
            shutil.rmtree(folder, ignore_errors=True)
            stack.callback(shutil.rmtree, folder, ignore_errors=True)

        on_main_rank(take_over)
        yield folder


# rows


def _inputs(config: RunConfig, model_config: PretrainedConfig, world: World) -> tuple[Inputs, str, str]:
    """Return the run's inputs, made up where it has none that serve it; in words what they are; and why they are made up although there are artefacts."""
    notice = ""
    if on_main_rank(lambda: all(state_of(folder) == "sealed" for folder in (config.dataset_dir, config.reference_dir))):
        try:
            return open_inputs(config), "the rows of step 1", ""
        except UserError as error:
            notice = f"the artefacts do not serve this run: {error.what}"
    split = made_up_split(config, model_config, world.num_ranks)
    plan = plan_batches(split.kl_group_of, global_batch_size=config.batch.global_batch_size, num_train_epochs=1, max_steps=2, shuffle=False, seed=config.seed)
    loss = resolve_weights(config.loss, split)
    rows = f"{split.num_examples} made-up rows of {split.longest_pair_tokens:,} tokens"
    return Inputs({"train": split}, {}, ("", ""), plan, loss, run_record(config, loss, {})), rows, notice


def made_up_split(config: RunConfig, model_config: PretrainedConfig, num_ranks: int) -> TokenizedSplit:
    """Return rows of random tokens as long as the run may have them, one micro-batch of them for every rank, in one KL group."""
    row_tokens = config.batch.max_tokens_per_microbatch * config.batch.sequence_parallel_size
    length = min(limit for limit in (config.data.max_length, row_tokens, longest_servable(model_config)) if limit)
    num_examples = min(config.batch.global_batch_size, max(2, num_ranks * config.batch.max_tokens_per_microbatch // length))
    numbers, half = np.arange(num_examples), max(1, length // 2)
    lengths = np.full(num_examples, max(1, length - half))
    generator = np.random.default_rng(config.seed)
    tokens = generator.integers(model_config.get_text_config().vocab_size, size=(2, num_examples * max(half, length - half)), dtype=np.int32)
    return TokenizedSplit(
        prompt_tokens=tokens[0], prompt_offsets=half * np.arange(num_examples + 1), completion_tokens=tokens[1], completion_offsets=lengths[0] * np.arange(num_examples + 1),
        prompt_of=numbers, mismatched_prompt_of=np.roll(numbers, -1), matched_lengths=lengths, mismatched_lengths=lengths, desirable=numbers % 2 == 0,
        kl_group_of=np.zeros(num_examples, dtype=np.int64), pair_keys=np.zeros((2 * num_examples, 2), dtype=np.uint64), file_of=np.zeros(num_examples, dtype=np.int32),
        row_of=numbers, files=("made-up row ",),
    )  # fmt: skip
