"""What a run will take, before anything is started: parameters, memory by part, disk, operations, time. One process; no weights, no GPU, nothing is written unless asked for."""

import math
from json import dumps
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import PretrainedConfig

from kto_ds.config import OptimConfig, RunConfig
from kto_ds.data.batch_plan import plan_batches
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.sharding import Sharding
from kto_ds.errors import UserError
from kto_ds.model.flops import ModelShape, model_shape
from kto_ds.model.hardware import FAST_LINK, GPUS_OF_A_NODE, SLOW_LINK, Gpu, expected_speed, find_gpu, tokens_to_hide_gathers
from kto_ds.model.memory import Load, Peak, peak_memory
from kto_ds.model.policy import Policy
from kto_ds.model.placement import GIB
from kto_ds.model.sizes import ModelSizes, model_sizes, sizes_in_memory, skeleton
from kto_ds.model.states import Zero, checkpoint_bytes, offloaded_parameters, read_zero, require_partial_offload
from kto_ds.model.support import DTYPES, choose_layout, find_model_config, longest_servable
from kto_ds.report.plan_view import plot_plan, show_plan
from kto_ds.runtime.deepspeed_config import check_zero_section, complete_deepspeed_config, read_deepspeed_config
from kto_ds.runtime.zero_keys import require_world
from kto_ds.stages.advising import advice_lines
from kto_ds.stages.identity import run_tokenizer
from kto_ds.stages.inputs import read_dataset_manifest
from kto_ds.stages.step_work import StepPlanner

NUM_GPUS = (8, 16, 32, 64)
# Of ds_configs/, from the fastest to the one that needs least memory of a GPU.
LADDER = ("zero1", "zero2", "zero3", "zero3_h100x8", "zero3_offload_optimizer_partial", "zero3_offload")
STEPS_LOOKED_AT = 4
SAVED_BESIDES = 1  # a checkpoint that is being written, beside those that are kept
REFERENCE_BYTES = 24  # of a pair: its key, its log-prob, its length


class Work(NamedTuple):
    """What steps take in, on average; of a rank, the largest micro-batch."""

    num_steps: int | None
    num_examples: int | None
    step_tokens: float  # of matched pairs, each by itself
    step_flops: float
    micro_batch_tokens: int
    scored_tokens: int
    scoring_tokens: int
    keys_per_token: float
    fewest_prompts: int | None  # distinct ones of a step
    longest_pair: int | None


def main(config: RunConfig, *, gpu: str, num_gpus: int, plot: str | None, json: bool) -> None:
    """Print the plan of the run, as tables or as JSON. With `num_gpus`, which is 0 for several at once, a run that cannot fit is a UserError."""
    if num_gpus < 0:
        raise UserError(f"{num_gpus} is no number of GPUs", where="--num_gpus", remedy="give 1 or more, or leave it out")
    plan = make_plan(config, gpu, (num_gpus,) if num_gpus else NUM_GPUS)
    if plot:
        plot_plan(plan, Path(plot))
    if json:
        print(dumps(plan, indent=1))
    else:
        show_plan(plan)
    if num_gpus and not plan["gpus"][0]["fits"]:
        _refuse(config, plan)


def make_plan(config: RunConfig, kind: str, counts: tuple[int, ...]) -> dict:
    """Return the plan for a kind of GPU as JSON values, one entry of `gpus` for each of `counts`."""
    gpu = find_gpu(kind)
    model_config = find_model_config(config.model)
    lm = skeleton(config.model, model_config)
    sizes = model_sizes(lm)
    held = sizes_in_memory(sizes, lm, config.model)
    shape = model_shape(Policy(lm), model_config)
    if shape and sizes.active < sizes.total:
        shape = shape._replace(layer_weights=sizes.active - sizes.embedding - sizes.head)
    raw = read_deepspeed_config(config.deepspeed.config)
    check_zero_section(raw.get("zero_optimization", {}), where=config.deepspeed.config)
    layout, _ = choose_layout(model_config, config.model.layout)
    split = _open_split(config)
    works = {num_gpus: _work(config, split, shape, layout, num_gpus) for num_gpus in counts}
    entries, unsuitable = [], []
    for num_gpus, work in works.items():
        try:
            entries.append(_entry(config, sizes, held, shape, gpu, work, raw, num_gpus))
        except UserError as error:
            if num_gpus == counts[-1] and not entries:
                raise
            unsuitable.append(f"{num_gpus} x {gpu.name}: {error.what}; {error.remedy}")
    work = works[entries[0]["num_gpus"]]
    return {
        "model": {"path": config.model.path, "parameters": sizes.total, "trainable": sum(sizes.trainable), "active": sizes.active, "embedding": sizes.embedding,
                  "head": sizes.head, "tied": sizes.is_tied, "layers": len(sizes.layers), "layer": sizes.layer},
        "gpu": {"name": gpu.name, "memory_bytes": gpu.memory_bytes, "flops": gpu.flops},
        "deepspeed_config": config.deepspeed.config,
        "work": {"from_dataset": split is not None, **work._asdict()},
        "gpus": entries,
        "disk": _disk(config, sizes, work, read_zero(raw)),
        "warnings": [*unsuitable, *_warnings(config, model_config, sizes, gpu, work, entries)],
        "advice": advice_lines(config),
    }  # fmt: skip


def _entry(config: RunConfig, sizes: ModelSizes, held: ModelSizes, shape: ModelShape | None, gpu: Gpu, work: Work, raw: dict, num_gpus: int) -> dict:
    """Return what the run takes on so many GPUs; `held` are the sizes as memory sees them."""
    require_world(raw, num_gpus, where=config.deepspeed.config)
    zero, load = _zero(config, raw), _load(config, work)
    require_partial_offload(sizes, zero, num_gpus)
    peak = peak_memory(held, zero, load, num_gpus)
    whole = load.weight_bytes * held.total if config.model.load_in_4bit else 0  # read so to every GPU, before ZeRO-3 partitions it
    total = max(whole, _total(peak))
    smallest = next((name for name in LADDER if max(whole, _total(peak_memory(held, _zero(config, read_deepspeed_config(name)), load, num_gpus))) <= gpu.memory_bytes), None)
    offloaded = offloaded_parameters(sizes, zero, num_gpus)
    speed = shape and expected_speed(
        gpu, step_flops=work.step_flops, step_tokens=work.step_tokens, num_gpus=num_gpus, is_sparse=sizes.active < sizes.total, offloaded=offloaded
    )
    hours = speed and work.num_steps and [work.num_steps * seconds / 3600 for seconds in reversed(speed.seconds_per_step)]
    of_node = min(num_gpus, GPUS_OF_A_NODE)
    return {
        "num_gpus": num_gpus, "memory_bytes": peak.memory._asdict(), "total_bytes": total, "fits": total <= gpu.memory_bytes,
        "highest_moment": "reading the weights" if whole == total else peak.moment, "smallest_config": smallest, "host_bytes_of_a_node": _host(held, load, peak, of_node),
        "step_flops": work.step_flops, "tokens_per_second": speed and list(speed.tokens_per_second), "hours": hours or None,
        "micro_batch_tokens": work.micro_batch_tokens, "fewest_prompts": work.fewest_prompts,
    }  # fmt: skip


def _total(peak: Peak) -> int:
    return sum(peak.memory)


def _zero(config: RunConfig, raw: dict) -> Zero:
    return read_zero(complete_deepspeed_config(raw, optim=OptimConfig(), dtype=config.model.dtype, on_cuda=True))


def _load(config: RunConfig, work: Work) -> Load:
    model = config.model
    return Load(
        tokens=work.micro_batch_tokens, scored_tokens=work.scored_tokens, scoring_tokens=work.scoring_tokens, weight_bytes=DTYPES[model.dtype].itemsize,
        checkpoint_every=model.gradient_checkpointing_every if model.gradient_checkpointing else 0, offloads_checkpoints=model.gradient_checkpointing_offload,
        kernels="torch" if model.kernels == "torch" else "liger", keys_per_token=work.keys_per_token,
    )  # fmt: skip


def _open_split(config: RunConfig) -> TokenizedSplit | None:
    """Return the training split of the dataset artefact, None where there is none yet. A damaged one is an error."""
    if not config.dataset_dir.is_dir():
        return None
    read_dataset_manifest(config.dataset_dir)
    return TokenizedSplit.load(config.dataset_dir / "train")


def _work(config: RunConfig, split: TokenizedSplit | None, shape: ModelShape | None, layout: str, num_gpus: int) -> Work:
    """Return the work of a few steps, from the dataset's lengths; without one, of rows that are all of data.max_length, half of it completion."""
    batch, uses_kl = config.batch, config.loss.loss_type == "kto"
    if split is None:
        length, examples = config.data.max_length, batch.global_batch_size
        flops = 0.0
        if shape:
            attention = 4 * shape.attention_width * sum(length * min(length, window or length) / 2 for window in shape.windows)
            flops = (3 + uses_kl * config.loss.kl_fraction) * examples * (2 * shape.layer_weights * length + attention + 2 * shape.head_weights * length / 2)
        tokens = min(batch.max_tokens_per_microbatch, examples * length)
        return Work(config.train.max_steps, None, examples * length, flops, tokens, math.ceil(tokens / 2), min(batch.scoring_tokens, examples * length), 1.0, None, None)
    plan = plan_batches(
        split.kl_group_of, global_batch_size=batch.global_batch_size, num_train_epochs=config.train.num_train_epochs, max_steps=config.train.max_steps,
        shuffle=config.data.shuffle, seed=config.seed,
    )  # fmt: skip
    group_size = 1 if num_gpus % batch.sequence_parallel_size else batch.sequence_parallel_size  # what does not divide is refused by train
    training = Sharding(layout, batch.max_tokens_per_microbatch, 0, num_gpus, torch.device("cpu"), group_size)
    planner = StepPlanner(
        split, plan, config.seed, kl_fraction=config.loss.kl_fraction if uses_kl else 0.0, training=training, scoring=training._replace(max_tokens=batch.scoring_tokens),
        shape=shape, recomputed_layers=0.0,
    )  # fmt: skip
    steps = np.unique(np.linspace(1, plan.num_steps, STEPS_LOOKED_AT).astype(int)).tolist()
    works = [planner.work_of(step) for step in steps]
    largest = max((one for work in works for one in work.policy_batches), key=lambda one: one.input_ids.numel())
    scored = max((one.input_ids.numel() for work in works for one in work.kl_batches), default=0)
    tokens = largest.input_ids.numel()
    keys = tokens if largest.segments is None else sum(largest.segments.key_lengths) / group_size  # of all tokens of a row, for a share of the heads
    return Work(
        plan.num_steps, split.num_examples, float(np.mean([work.cost.tokens for work in works])), float(np.mean([work.cost.model_flops for work in works])),
        tokens, len(largest.targets), scored, keys / tokens, min(len(np.unique(split.prompt_of[work.examples])) for work in works), split.longest_pair_tokens,
    )  # fmt: skip


def _host(sizes: ModelSizes, load: Load, peak: Peak, of_node: int) -> dict[str, int]:
    """Return bytes of host memory of a node with `of_node` ranks, by part."""
    checkpoints = 2 * load.tokens * load.weight_bytes * sizes.widths.hidden * len(sizes.layers) if load.offloads_checkpoints else 0
    loading = of_node * load.weight_bytes * max(sizes.parameters)  # ranks read one parameter after the other, to the device
    return {"offloaded": of_node * peak.host_bytes, "checkpointed_activations": of_node * checkpoints, "loading": loading}


def _disk(config: RunConfig, sizes: ModelSizes, work: Work, zero: Zero) -> dict[str, int]:
    """Return bytes on disk by part; one checkpoint more is there while a new one is written."""
    kept = config.checkpoint.save_total_limit + SAVED_BESIDES + (config.checkpoint.metric_for_best_model is not None)
    one = checkpoint_bytes(sizes, zero, DTYPES[config.model.dtype].itemsize)
    examples = work.num_examples or 0
    reference = 2 * examples * REFERENCE_BYTES + (round(8 * examples / config.batch.global_batch_size * work.step_tokens) if config.reference.per_token else 0)
    dataset = sum(path.stat().st_size for path in config.dataset_dir.rglob("*") if path.is_file()) if examples else 0
    return {"checkpoint": one, "checkpoints": kept * one, "export": DTYPES[config.model.dtype].itemsize * sizes.total, "dataset": dataset, "reference": reference}


def _warnings(config: RunConfig, model_config: PretrainedConfig, sizes: ModelSizes, gpu: Gpu, work: Work, entries: list[dict]) -> list[str]:
    """Return what the user should know before the run, the gravest first."""
    found = []
    for entry in entries:
        at = f"{entry['num_gpus']} x {gpu.name}"
        if not entry["fits"]:
            instead = f"use deepspeed.config: {entry['smallest_config']}" if entry["smallest_config"] else "no config of ds_configs/ fits: take more GPUs or smaller micro-batches"
            found.append(f"{at}: {config.deepspeed.config} needs {entry['total_bytes'] / GIB:.1f} of {gpu.memory_bytes / GIB:.1f} GiB; {instead}")
        if work.fewest_prompts is not None and work.fewest_prompts < entry["num_gpus"]:
            found.append(f"{at}: a step has {work.fewest_prompts} distinct prompts, so that ranks are left without any; raise batch.global_batch_size")
        elif work.fewest_prompts is None and config.batch.global_batch_size < entry["num_gpus"]:
            found.append(f"{at}: a step has only {config.batch.global_batch_size} examples, so that ranks are left without any; raise batch.global_batch_size")
        needed = tokens_to_hide_gathers(gpu, FAST_LINK, active_share=sizes.active / sizes.total)
        slow = tokens_to_hide_gathers(gpu, SLOW_LINK, active_share=sizes.active / sizes.total)
        if entry["micro_batch_tokens"] < needed:
            found.append(f"{at}: micro-batches of {entry['micro_batch_tokens']:,} tokens do not hide the gathers of ZeRO-3 even over NVLink, which takes {needed:,}")
        elif entry["num_gpus"] > GPUS_OF_A_NODE and entry["micro_batch_tokens"] < slow:
            found.append(f"{at}: over one 400 Gbit/s link a node, micro-batches need {slow:,} tokens to hide the gathers, and have {entry['micro_batch_tokens']:,}; over eight {needed:,}")
    longest, limit = work.longest_pair or config.data.max_length, longest_servable(model_config)
    if limit and longest > limit:
        found.append(f"sequences may have {longest:,} tokens, the model has {limit:,} positions; lower data.max_length")
    for key, budget in (("max_tokens_per_microbatch", config.batch.max_tokens_per_microbatch), ("max_tokens_per_scoring_microbatch", config.batch.scoring_tokens)):
        if longest > budget * config.batch.sequence_parallel_size:
            found.append(f"the longest sequence may have {longest:,} tokens, batch.{key} is {budget:,}; raise it or batch.sequence_parallel_size, or lower data.max_length")
    if any((Path(config.model.path) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")) and (tokens := len(run_tokenizer(config))) > sizes.vocab:
        found.append(f"the tokenizer has {tokens:,} tokens, the model an embedding for {sizes.vocab:,}: resize the model before, and score the reference with the resized one")
    if sizes.vocab % 64:
        found.append(f"the vocabulary of {sizes.vocab:,} is no multiple of 64, which makes the head slower; do not resize it for training: the reference would be another model")
    return found


def _refuse(config: RunConfig, plan: dict) -> None:
    entry, gpu = plan["gpus"][0], plan["gpu"]
    instead = f"set deepspeed.config: {entry['smallest_config']}" if entry["smallest_config"] else "take more GPUs, GPUs with more memory, or lower batch.max_tokens_per_microbatch"
    what = f"{plan['model']['parameters']:,} parameters need {entry['total_bytes'] / GIB:.1f} GiB on each of {entry['num_gpus']} GPUs; an {gpu['name']} has {gpu['memory_bytes'] / GIB:.1f}"
    raise UserError(what, where=f"deepspeed.config: {config.deepspeed.config}", remedy=instead)
