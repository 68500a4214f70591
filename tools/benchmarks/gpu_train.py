"""Whole training steps on one device, by kto_ds and, where asked for, by TRL on the same rows step by step."""

import argparse
import math
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import Qwen3Config

from benchmarks.gpu_model import QWEN3, SEED, SHAPES, TINY, Run, check_making, device_name, make_lm, make_policy, make_split, notice
from benchmarks.own_train import STATE_BYTES
from benchmarks.page import command_line, table, versions
from benchmarks.process import ENVIRONMENT, in_fresh_process
from benchmarks.small_model import train_tokenizer
from kto_ds.config import LossConfig, ModelConfig, OptimConfig
from kto_ds.data.batch_plan import BatchPlan, plan_batches
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.sharding import Sharding
from kto_ds.model.checkpointing import checkpoint_layers, checkpointed_share, in_words
from kto_ds.model.flops import model_shape, peak_flops
from kto_ds.model.placement import GIB
from kto_ds.model.scoring import choose_serving
from kto_ds.report.throughput import PHASES, StepTimer, device_clock, speed_metrics
from kto_ds.runtime import collectives
from kto_ds.runtime.deepspeed_config import complete_deepspeed_config, read_deepspeed_config
from kto_ds.runtime.engine import Engine
from kto_ds.stages.objective import logps_of, train_step
from kto_ds.stages.step_work import StepPlanner

WARM_UP = 1  # steps
TIMEOUT_SECONDS = 600


class Setting(NamedTuple):
    """One column of the table: all that a process of its own needs to know."""

    shape: str
    trl_batch_size: int | None  # None is kto_ds
    trl_precomputes: bool
    every: int  # decoder layers to one that kto_ds checkpoints
    options: argparse.Namespace
    smoke: bool

    @property
    def side(self) -> str:
        if self.trl_batch_size is None:
            return "kto_ds" + (f", one layer in {self.every} checkpointed" if self.every > 1 else "")
        return f"TRL, {'reference precomputed' if self.trl_precomputes else 'default'}, batches of {self.trl_batch_size}"

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.smoke else torch.device("cuda", 0)

    @property
    def config(self) -> Qwen3Config:
        return Qwen3Config(**(TINY if self.smoke else SHAPES[self.shape]))

    @property
    def model(self) -> ModelConfig:
        options, dtype = self.options, "float32" if self.smoke else "bfloat16"
        return ModelConfig(
            path="random", dtype=dtype, attention=options.attention, kernels=options.kernels, layout=options.layout,
            gradient_checkpointing_every=self.every, gradient_checkpointing_offload=options.gradient_checkpointing_offload,
        )  # fmt: skip


class Stepped(NamedTuple):
    """The measured steps of one column."""

    tokens: int  # of matched pairs, prompt and completion, each row by itself
    seconds: float
    num_weights: int
    peak_bytes: int | None  # None where the device does not count
    speed: dict[str, float]  # of kto_ds, as in metrics.jsonl
    way: str  # of kto_ds: layout, attention, kernels, checkpoints


def bench_train(options: argparse.Namespace, smoke: bool) -> str:
    if smoke:
        os.environ.update(ENVIRONMENT)
        options = argparse.Namespace(**{**vars(options), "max_tokens_per_microbatch": 4096, "global_batch_size": 16, "steps": 2, "trl_batch_sizes": [8]})
    if any(options.global_batch_size % size for size in options.trl_batch_sizes):
        raise SystemExit(f"--trl_batch_sizes: a step of {options.global_batch_size} rows must be whole batches of TRL's")
    settings = []
    for shape in ["tiny"] if smoke else options.shape:
        settings += [Setting(shape, None, False, every, options, smoke) for every in options.gradient_checkpointing_every]
        if options.trl:
            settings += [Setting(shape, size, precomputes, 1, options, smoke) for size in options.trl_batch_sizes for precomputes in (True, False)]
    with tempfile.TemporaryDirectory() as folder:
        difference = check_making(settings[0].device, make_split(Path(folder) / "check", 8, TINY["vocab_size"]))
    print(f"a model made here and one that transformers makes, equal weights: their log-probs differ by at most {difference:.1e} of a token's", flush=True)
    found: list[tuple[Setting, Stepped]] = []
    for setting in settings:
        try:
            stepped = in_fresh_process(step_ours if setting.trl_batch_size is None else step_trl, setting)
        except torch.OutOfMemoryError as error:
            print(f"{setting.shape}, {setting.side}: out of memory, hence no column: {str(error).splitlines()[0]}", flush=True)
            continue
        found.append((setting, stepped))
        print(f"{setting.shape}, {setting.side}: {stepped.tokens / stepped.seconds:,.0f} tokens/s {stepped.speed}", flush=True)
    if not found:
        raise SystemExit("nothing has fitted")
    return describe(found)


def make_steps(setting: Setting) -> tuple[TokenizedSplit, BatchPlan]:
    """Return synthetic rows and the steps that go through them, the same for every column."""
    options, num_steps = setting.options, WARM_UP + setting.options.steps
    with tempfile.TemporaryDirectory() as folder:  # what is mapped from it stays readable
        split = make_split(Path(folder) / "rows", num_steps * options.global_batch_size, (TINY if setting.smoke else QWEN3)["vocab_size"])
    plan = plan_batches(split.kl_group_of, global_batch_size=options.global_batch_size, num_train_epochs=1, max_steps=num_steps, shuffle=True, seed=SEED)
    return split, plan


def step_ours(setting: Setting) -> Stepped:
    """Take the steps as `kto-ds train` does, with its defaults: ZeRO-3, AdamW, activation checkpointing."""
    world, (split, plan) = collectives.start(timeout_seconds=TIMEOUT_SECONDS), make_steps(setting)
    device, config, options = world.device, setting.config, setting.options
    serving = choose_serving(setting.model, config, device)
    policy = make_policy(Run(setting.shape, config, setting.model, device, options.max_tokens_per_microbatch), serving).train()
    checkpoint_layers(policy.lm, every=setting.model.gradient_checkpointing_every, offload=setting.model.gradient_checkpointing_offload)
    num_weights, shape = sum(parameter.numel() for parameter in policy.parameters()), model_shape(policy, config)
    deepspeed_config = complete_deepspeed_config(read_deepspeed_config("zero3"), optim=OptimConfig(), dtype=setting.model.dtype, on_cuda=device.type == "cuda")
    engine = Engine(policy, deepspeed_config, OptimConfig(), plan.num_steps)
    training = Sharding(serving.layout, options.max_tokens_per_microbatch, world.rank, world.num_ranks, device)
    scoring = training._replace(max_tokens=2 * options.max_tokens_per_microbatch)
    planner = StepPlanner(split, plan, SEED, kl_fraction=1.0, training=training, scoring=scoring, shape=shape, recomputed_layers=checkpointed_share(setting.model))
    engine.warm_up(planner.training.batch([], split).to(device))
    references = own_logps(engine, planner)
    timer = StepTimer(device_clock(device))
    for work in planner.ahead(0):
        train_step(engine, work, split, references, loss=LossConfig(), num_ranks=world.num_ranks, timer=timer, limit=math.inf, wants_to_stop=lambda: False)
        timer.add(work.cost)
        if work.step == WARM_UP:
            timer.lap()
            forget_peak(device)
    lap, peak = timer.lap(), peak_flops(device, setting.model.dtype)
    speed = speed_metrics(lap, num_steps=options.steps, num_ranks=1, peak_flops=peak)
    stepped = Stepped(lap.work.tokens, lap.seconds, num_weights, peak_bytes(device), speed, f"{serving.way}; {in_words(setting.model)}")
    collectives.stop()
    return stepped


def own_logps(engine: Engine, planner: StepPlanner) -> np.ndarray:
    """Return [2E] by pair id: the policy's own log-probs before the first step for all pairs that the steps take, 0 for the others."""
    split = planner.split
    examples = np.unique(planner.plan.examples)
    pairs = np.concatenate([examples, np.sort(split.mismatched_pairs(examples))])
    logps = np.zeros(len(split.pair_lengths), dtype=np.float32)
    logps[pairs] = logps_of(engine, planner.scoring.batches(pairs, split), pairs, engine.device).cpu().numpy()
    return logps


def step_trl(setting: Setting) -> Stepped:
    """Take the same steps by KTOTrainer with its defaults: float32 weights under bfloat16 autocast, AdamW, activation checkpointing.

    Rows come as token ids. Its mismatched pairs are its own.
    """
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    (split, plan), device, options, size = make_steps(setting), setting.device, setting.options, setting.trl_batch_size
    marks: list[float] = []

    class FromIds(KTOTrainer):
        def _prepare_dataset(self, dataset, *arguments):
            return dataset

        def log(self, logs, start_time=None):
            super().log(logs, start_time)
            if "loss" in logs:  # has waited for the device
                marks.append(time.perf_counter())
                if len(marks) == WARM_UP:
                    forget_peak(device)

    # Steps of kto_ds lack a row or two where a KL group would not fit. TRL takes whole batches, so some rows of such a step stand twice, and count twice.
    steps = [np.resize(plan.examples_of(step), options.global_batch_size) for step in range(1, plan.num_steps + 1)]
    rows = [(split.prompt(split.prompt_of[example]).tolist(), split.completion(example).tolist(), bool(split.desirable[example])) for step in steps for example in step]
    mismatched = [rows[start + (at - 1) % size][1] for start in range(0, len(rows), size) for at in range(size)]
    prompts, completions, labels = map(list, zip(*rows))
    dataset = Dataset.from_dict({"prompt_ids": prompts, "completion_ids": completions, "KL_completion_ids": mismatched, "label": labels})
    config = KTOConfig(
        output_dir=tempfile.mkdtemp(), precompute_ref_log_probs=setting.trl_precomputes, per_device_train_batch_size=size,
        gradient_accumulation_steps=options.global_batch_size // size, max_length=None, num_train_epochs=1, bf16=not setting.smoke, use_cpu=setting.smoke,
        logging_steps=1, save_strategy="no", disable_tqdm=True, report_to=[],
    )  # fmt: skip
    lm = make_lm(setting.config, torch.float32, device, attention="sdpa")
    reference = None if setting.trl_precomputes else make_lm(setting.config, torch.float32, device, attention="sdpa")
    num_weights = sum(parameter.numel() for parameter in lm.parameters())
    FromIds(model=lm, ref_model=reference, args=config, train_dataset=dataset, processing_class=train_tokenizer(["a"], 300)).train()
    tokens = sum(len(prompt) + len(completion) for prompt, completion, _ in rows[WARM_UP * options.global_batch_size :])
    return Stepped(tokens, marks[-1] - marks[WARM_UP - 1], num_weights, peak_bytes(device), {}, "")


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def describe(found: list[tuple[Setting, Stepped]]) -> str:
    first = found[0][0]
    ours = {setting.shape: stepped for setting, stepped in reversed(found) if setting.trl_batch_size is None}  # the first column of a shape

    def above_states(stepped: Stepped) -> float:
        return stepped.peak_bytes - STATE_BYTES * stepped.num_weights

    def share_of(name: str):
        return lambda setting, one: f"{one.speed[name]:.1%}" if name in one.speed else ""

    def faster(setting: Setting, one: Stepped) -> str:
        mine = ours.get(setting.shape, one)
        return "" if setting.trl_batch_size is None else f"**{mine.tokens / mine.seconds / (one.tokens / one.seconds):.2f}x**"

    def takes(setting: Setting, one: Stepped) -> str:
        mine = ours.get(setting.shape, one)
        return "" if setting.trl_batch_size is None or one.peak_bytes is None else f"**{above_states(mine) / above_states(one):.2f}x**"

    rows = {
        "**policy tokens/s**": lambda setting, one: f"**{one.tokens / one.seconds:,.0f}**",
        "kto_ds is faster by": faster,
        "TFLOP/s that the model needs": lambda setting, one: f"{one.speed['tflops']:.3g}" if one.speed else "",
        "**MFU**": share_of("mfu"),
        "HFU": share_of("hfu"),
        "time: " + ", ".join(PHASES): lambda setting, one: ", ".join(f"{one.speed[f'seconds/{phase}'] / one.speed['seconds']:.0%}" for phase in PHASES) if one.speed else "",
        "memory at its peak": lambda setting, one: "" if one.peak_bytes is None else f"{one.peak_bytes / GIB:.1f} GiB",
        f"of this above {STATE_BYTES} bytes a weight": lambda setting, one: "" if one.peak_bytes is None else f"{above_states(one) / GIB:.1f} GiB",
        "of TRL's kto_ds takes": takes,
        "layout, attention, kernels; checkpoints": lambda setting, one: one.way,
        "steps, seconds": lambda setting, one: f"{setting.options.steps}, {one.seconds:.1f}",
    }
    libraries = ["torch", "transformers", "deepspeed", *(["trl"] if first.options.trl else [])]
    return f"""{command_line()}
{notice(first.device)}
{device_name(first.device)}, {versions(*libraries)}. Steps of {first.options.global_batch_size} rows, kto_ds with micro-batches of at most {first.options.max_tokens_per_microbatch:,} tokens.

{table(found, lambda setting: f"{setting.shape}: {setting.side}", rows)}

FLOP of a step = 3 F of the matched pairs + 1 F of the mismatched ones, with F = 2 x weights of the layers' matrices x tokens
+ 4 x layers x query heads x head size x attended positions + 2 x vocabulary x hidden size x completion tokens. MFU counts these, HFU also what is computed again in backward.
"""
