"""The scoring of reference log-probs on one device, by what `kto-ds precompute-ref` does with a shard."""

import argparse
import gc
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import Qwen3Config

from benchmarks.gpu_model import QWEN3, SEED, SHAPES, TINY, Run, check_making, device_name, make_policy, make_split, notice
from benchmarks.page import command_line, table, versions
from kto_ds.config import ModelConfig, ReferenceConfig
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.reference_work import Task, plan_shards, wanted_pairs
from kto_ds.model.flops import forward_flops, model_shape, peak_flops
from kto_ds.model.placement import GIB, Placement, working_bytes
from kto_ds.model.scoring import Serving, choose_serving
from kto_ds.runtime.collectives import World
from kto_ds.stages.serving import Way, score_shard

WARM_UP = 2  # micro-batches
TARGETS = {"qwen3-4b": 55_000, "qwen3-32b": 7_500}  # tokens/s


class Found(NamedTuple):
    """What was scored in the time that was measured."""

    run: Run
    serving: Serving
    tasks: list[Task]
    seconds: float
    flops: float
    unshared_tokens: int  # had every pair brought its own prompt
    weight_bytes: int
    peak_bytes: int | None  # None where the device does not count


def bench_precompute(options: argparse.Namespace, smoke: bool) -> str:
    device = torch.device("cpu") if smoke else torch.device("cuda", 0)
    num_prompts, max_tokens = (64, 4096) if smoke else (options.num_prompts, options.max_tokens_per_microbatch)
    model = ModelConfig(path="random", dtype="float32" if smoke else "bfloat16", attention=options.attention, kernels=options.kernels, layout=options.layout)
    shapes = {"tiny": TINY} if smoke else {name: SHAPES[name] for name in options.shape}
    with tempfile.TemporaryDirectory() as folder:
        difference = check_making(device, make_split(Path(folder) / "check", 8, TINY["vocab_size"]))
        print(f"a model made here and one that transformers makes, equal weights: their log-probs differ by at most {difference:.1e} of a token's", flush=True)
        split = make_split(Path(folder) / "rows", num_prompts, (TINY if smoke else QWEN3)["vocab_size"])
        return describe([measure(Run(name, Qwen3Config(**shape), model, device, max_tokens), split, options.seconds) for name, shape in shapes.items()], split)


def measure(run: Run, split: TokenizedSplit, seconds: float) -> Found:
    """Score shards until `seconds` have passed, or all are done. Making the model, planning and the warm-up are not timed; making the batches is."""
    gc.collect()  # the model of the shape before this one
    on_cuda = run.device.type == "cuda"
    synchronize = torch.cuda.synchronize if on_cuda else lambda: None
    serving = choose_serving(run.model, run.config, run.device)
    policy = make_policy(run, serving)
    way = Way(policy, serving.layout, Placement("replica", "one device"), ReferenceConfig().per_token, World(0, 1, run.device))
    splits = {"train": split}
    shards = plan_shards(splits, wanted_pairs(splits, "kto"), layout=serving.layout, max_tokens=run.max_tokens)
    score_shard([task for shard in shards for task in shard][:WARM_UP], 0, splits, way, lambda tokens: None, is_over=lambda: False)
    tasks: list[Task] = []
    synchronize()
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    # The plan has the costliest micro-batches first; in another order a part of the shards stands for all.
    for number in np.random.default_rng(SEED).permutation(len(shards)):
        _, bad_rows = score_shard(shards[number], 0, splits, way, lambda tokens: None, is_over=lambda: False)
        if bad_rows:
            raise SystemExit(f"{run.name}: {len(bad_rows)} log-probs are not finite, or above 0")
        tasks += shards[number]
        if time.perf_counter() - began >= seconds:
            break
    synchronize()
    spent = time.perf_counter() - began
    print(f"{run.name}: {sum(task.tokens for task in tasks):,} tokens in {spent:.1f} s", flush=True)  # the next shape may not fit
    units = [unit for task in tasks for unit in task.micro_batch]
    return Found(
        run, serving, tasks, spent, forward_flops(model_shape(policy, run.config), units, split).total,
        unshared_tokens=sum(int(split.prompt_lengths[unit.prompt] + split.pair_lengths[pair]) for unit in units for pair in unit.pairs),
        weight_bytes=sum(parameter.nbytes for parameter in policy.parameters()),
        peak_bytes=torch.cuda.max_memory_allocated() if on_cuda else None,
    )  # fmt: skip


def describe(found: list[Found], split: TokenizedSplit) -> str:
    first = found[0].run
    peak = peak_flops(first.device, first.model.dtype)
    rows = {
        "**tokens/s**": lambda name, one: f"**{sum(task.tokens for task in one.tasks) / one.seconds:,.0f}**",
        "target, tokens/s": lambda name, one: f"{TARGETS[one.run.name]:,}" if one.run.name in TARGETS else "",
        "tokens/s as counted without sharing prompts": lambda name, one: f"{one.unshared_tokens / one.seconds:,.0f}",
        "pairs/s": lambda name, one: f"{sum(task.num_pairs for task in one.tasks) / one.seconds:,.1f}",
        "TFLOP/s": lambda name, one: f"{one.flops / one.seconds / 1e12:.3g}",
        "of the device's rate": lambda name, one: f"{one.flops / one.seconds / peak:.1%}" if peak else "",
        "fill of micro-batches": lambda name, one: f"{sum(task.tokens for task in one.tasks) / (len(one.tasks) * one.run.max_tokens):.1%}",
        "memory at its peak": lambda name, one: "" if one.peak_bytes is None else f"{one.peak_bytes / GIB:.1f} GiB",
        "of this weights": lambda name, one: f"{one.weight_bytes / GIB:.1f} GiB",
        "the rest, as `reference.placement` estimates it": lambda name, one: f"{working_bytes(one.run.config, one.run.max_tokens, one.run.model.dtype) / GIB:.1f} GiB",
        "layout, attention, kernels": lambda name, one: one.serving.way,
        "micro-batches, seconds": lambda name, one: f"{len(one.tasks):,}, {one.seconds:.1f}",
    }
    return f"""{command_line()}
{notice(first.device)}
{device_name(first.device)}, {versions("torch", "transformers")}. Weights {first.model.dtype}, micro-batches of at most {first.max_tokens:,} tokens.
{split.num_examples:,} rows with {len(split.prompt_lengths):,} prompts. Mean tokens: prompt {split.prompt_lengths.mean():.0f}, completion {split.pair_lengths.mean():.0f}.

{table([(one.run.name, one) for one in found], str, rows)}

FLOP = 2 x weights of the layers' matrices x tokens + 4 x layers x query heads x head size x attended positions
+ 2 x vocabulary x hidden size x completion tokens.
Attended positions, with a prompt of p tokens and its completions of c tokens each in one unit: p(p + 1)/2 + sum of (p c + c(c + 1)/2).
"""
