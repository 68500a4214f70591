"""The most memory that a training step allocates, beside what the formula of `kto-ds plan` says."""

import argparse
import math
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import Qwen3Config

from benchmarks.gpu_model import QWEN3, SEED, SHAPES, TINY, Run, device_name, make_policy, make_split, notice
from benchmarks.gpu_train import TIMEOUT_SECONDS, own_logps
from benchmarks.page import command_line, table, versions
from benchmarks.process import ENVIRONMENT, in_fresh_process
from kto_ds.config import LossConfig, ModelConfig, OptimConfig
from kto_ds.data.batch import Batch
from kto_ds.data.batch_plan import plan_batches
from kto_ds.data.sharding import Sharding
from kto_ds.model.checkpointing import checkpoint_layers
from kto_ds.model.memory import Load, Peak, peak_memory
from kto_ds.model.placement import GIB
from kto_ds.model.scoring import choose_serving
from kto_ds.model.sizes import ModelSizes, model_sizes, skeleton
from kto_ds.model.states import Zero, read_zero
from kto_ds.report.throughput import StepTimer, device_clock
from kto_ds.runtime import collectives
from kto_ds.runtime.deepspeed_config import complete_deepspeed_config, read_deepspeed_config
from kto_ds.runtime.engine import Engine
from kto_ds.stages.objective import train_step
from kto_ds.stages.step_work import StepPlanner

STEPS = 2  # the first makes Adam's moments, the second is measured
ROWS_PER_TOKEN = 1 / 550  # of the synthetic rows, where some share a prompt


class Case(NamedTuple):
    """One column of the table: all that a process of its own needs to know."""

    shape: str
    every: int  # decoder layers to one that is checkpointed; 0: none is
    options: argparse.Namespace
    smoke: bool

    @property
    def name(self) -> str:
        kept = "no checkpoints" if self.every == 0 else "every layer checkpointed" if self.every == 1 else f"one layer in {self.every} checkpointed"
        return f"{self.shape}, {kept}"


class Found(NamedTuple):
    measured: int | None  # bytes; None where the device does not count
    of_batches: Peak  # from the tokens that the micro-batches had
    of_budget: Peak  # from the budget of tokens, which is what `kto-ds plan` knows
    tokens: int
    num_parameters: int
    way: str


def bench_memory(options: argparse.Namespace, smoke: bool) -> str:
    if smoke:
        os.environ.update(ENVIRONMENT)
        options = argparse.Namespace(**{**vars(options), "max_tokens_per_microbatch": 2048})
    found: list[tuple[Case, Found]] = []
    for case in [Case(shape, every, options, smoke) for shape in (["tiny"] if smoke else options.shape) for every in options.gradient_checkpointing_every]:
        try:
            found.append((case, in_fresh_process(measure, case)))
        except torch.OutOfMemoryError as error:
            print(f"{case.name}: out of memory, hence no column: {str(error).splitlines()[0]}", flush=True)
            continue
        print(f"{case.name}: {found[-1][1]}", flush=True)
    if not found:
        raise SystemExit("nothing has fitted")
    return describe(found)


def measure(case: Case) -> Found:
    """Take two whole steps as `kto-ds train` does on one rank under ZeRO-3, several micro-batches each, and return the peak of the second."""
    world, options = collectives.start(timeout_seconds=TIMEOUT_SECONDS), case.options
    device, budget = world.device, options.max_tokens_per_microbatch
    config = Qwen3Config(**(TINY if case.smoke else SHAPES[case.shape]))
    model = ModelConfig(path="random", dtype="float32" if case.smoke else "bfloat16", attention=options.attention, kernels=options.kernels, layout=options.layout)
    serving = choose_serving(model, config, device)
    batch_size = max(8, round(2 * budget * ROWS_PER_TOKEN))
    with tempfile.TemporaryDirectory() as folder:
        split = make_split(Path(folder) / "rows", (STEPS + 1) * batch_size, (TINY if case.smoke else QWEN3)["vocab_size"])
    plan = plan_batches(split.kl_group_of, global_batch_size=batch_size, num_train_epochs=1, max_steps=STEPS, shuffle=True, seed=SEED)

    policy = make_policy(Run(case.shape, config, model, device, budget), serving).train()
    if case.every:
        checkpoint_layers(policy.lm, every=case.every, offload=options.gradient_checkpointing_offload)
    deepspeed_config = complete_deepspeed_config(read_deepspeed_config("zero3"), optim=OptimConfig(), dtype=model.dtype, on_cuda=device.type == "cuda")
    engine = Engine(policy, deepspeed_config, OptimConfig(), STEPS)
    training = Sharding(serving.layout, budget, world.rank, world.num_ranks, device)
    planner = StepPlanner(split, plan, SEED, kl_fraction=1.0, training=training, scoring=training._replace(max_tokens=2 * budget), shape=None, recomputed_layers=0.0)
    engine.warm_up(planner.training.batch([], split).to(device))
    references, timer = own_logps(engine, planner), StepTimer(device_clock(device))
    works = list(planner.ahead(0))
    for work in works:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        train_step(engine, work, split, references, loss=LossConfig(), num_ranks=1, timer=timer, limit=math.inf, wants_to_stop=lambda: False)
    measured = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    collectives.stop()

    sizes, zero = model_sizes(skeleton(model, config)), read_zero(deepspeed_config)
    largest, scored = max(works[-1].policy_batches, key=_tokens), max(works[-1].kl_batches, key=_tokens)
    load = Load(
        tokens=_tokens(largest), scored_tokens=len(largest.targets), scoring_tokens=_tokens(scored), weight_bytes=4 if case.smoke else 2, checkpoint_every=case.every,
        offloads_checkpoints=options.gradient_checkpointing_offload, kernels=serving.kernels, device=device.type, keys_per_token=_keys(largest) / _tokens(largest),
    )  # fmt: skip
    of_budget = load._replace(tokens=budget, scored_tokens=budget, scoring_tokens=2 * budget, keys_per_token=1.0)
    return Found(measured, *_peaks(sizes, zero, load, of_budget), load.tokens, sizes.total, serving.way)


def _peaks(sizes: ModelSizes, zero: Zero, *loads: Load) -> list[Peak]:
    return [peak_memory(sizes, zero, load, 1) for load in loads]


def _tokens(batch: Batch) -> int:
    return batch.input_ids.numel()


def _keys(batch: Batch) -> int:
    return _tokens(batch) if batch.segments is None else sum(batch.segments.key_lengths)


def describe(found: list[tuple[Case, Found]]) -> str:
    first = found[0][0]

    def error(case: Case, one: Found, peak: Peak) -> str:
        return "" if one.measured is None else f"{peak.memory.allocated / one.measured - 1:+.1%}"

    rows = {
        "parameters": lambda case, one: f"{one.num_parameters:,}",
        "**measured, GiB**": lambda case, one: "" if one.measured is None else f"**{one.measured / GIB:.2f}**",
        "formula, from the micro-batches, GiB": lambda case, one: f"{one.of_batches.memory.allocated / GIB:.2f}",
        "**error**": lambda case, one: f"**{error(case, one, one.of_batches)}**",
        "formula, from the budget, GiB": lambda case, one: f"{one.of_budget.memory.allocated / GIB:.2f}",
        "error, from the budget": lambda case, one: error(case, one, one.of_budget),
        "of the formula: states, GiB": lambda case, one: f"{one.of_batches.memory.states / GIB:.2f}",
        "measured above the states, GiB": lambda case, one: "" if one.measured is None else f"{(one.measured - one.of_batches.memory.states) / GIB:.2f}",
        "formula above the states, GiB": lambda case, one: f"{(one.of_batches.memory.allocated - one.of_batches.memory.states) / GIB:.2f}",
        "highest moment, by the formula": lambda case, one: one.of_batches.moment,
        "tokens of the largest micro-batch": lambda case, one: f"{one.tokens:,}",
        "layout, attention, kernels": lambda case, one: one.way,
    }
    device = torch.device("cpu" if first.smoke else "cuda")
    return f"""{command_line()}
{notice(device)}
{device_name(device)}, {versions("torch", "transformers", "deepspeed")}. ZeRO-3 on one rank, micro-batches of at most {first.options.max_tokens_per_microbatch:,} tokens.

{table(found, lambda case: case.name, rows)}

Measured is torch.cuda.max_memory_allocated during the second step; the formula is kto_ds/model/memory.py, without CUDA's context and fragments.
"""
