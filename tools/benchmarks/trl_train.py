"""The training loop: `kto-ds train` beside TRL's KTOTrainer, with a precomputed reference and with its default, a reference model in memory."""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.own_train import STATE_BYTES, Trained, base_config, make_artifacts, train_ours
from benchmarks.page import command_line, cores, table, versions
from benchmarks.process import Meter, in_fresh_process, memory_bytes
from benchmarks.small_model import distinct_rows, equal_rows, make_model, read_rows, texts_of

LEARNING_RATE = 1e-5
MAX_GRAD_NORM = 1.0
TOLERANCE = 1e-5  # of a step's loss
SIDES = ("kto_ds", "TRL, reference precomputed", "TRL, default")


def bench_train(options: argparse.Namespace) -> str:
    all_rows = read_rows(options.rows)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        made = make_model(work / "model", texts_of(all_rows), hidden_size=options.hidden_size, num_layers=options.num_layers, max_length=options.max_length)
        rows = choose_rows(all_rows, work / "model", options)
        (work / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        # What makes a run of kto_ds the same as TRL's, all else at its defaults. A KL group of a whole batch pairs rows as TRL does.
        ours = base_config(work, max_length=options.max_length, global_batch_size=options.batch_size, kl_group_size=options.batch_size, shuffle=False)
        ours["optim"] |= {"learning_rate": LEARNING_RATE, "max_grad_norm": MAX_GRAD_NORM}
        in_fresh_process(make_artifacts, {**ours, "output_dir": str(work / "artefacts")})
        found: dict[str, list[Trained]] = {side: [] for side in SIDES}
        for repeat, side in itertools.product(range(options.repeats), found):
            output_dir = str(work / f"{repeat}-{SIDES.index(side)}")
            if side == "kto_ds":
                trained = in_fresh_process(train_ours, {**ours, "output_dir": output_dir})
            else:
                trained = in_fresh_process(train_trl, rows, str(work / "model"), output_dir, options, side != "TRL, default")
            found[side].append(trained)
            print(f"repeat {repeat + 1}, {side}: {trained.spent.cpu_seconds:.1f} s of CPU", file=sys.stderr, flush=True)  # it takes many minutes
    return describe(options, made, found, require_agreement([trained for side in found.values() for trained in side]))


def choose_rows(all_rows: list[dict], model: Path, options: argparse.Namespace) -> list[dict]:
    """Return whole batches of rows, which both sides train on in this order with the same mismatched pairs, as no prompt occurs twice."""
    from transformers import AutoTokenizer

    tokenizer, count = AutoTokenizer.from_pretrained(model), options.num_rows // options.batch_size * options.batch_size
    if options.equal_tokens:
        return equal_rows(all_rows, tokenizer, count, options.equal_tokens)
    return distinct_rows(all_rows, tokenizer, count, options.max_length)


def train_trl(rows: list[dict], model: str, output_dir: str, options: argparse.Namespace, precompute: bool) -> Trained:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import KTOConfig, KTOTrainer

    torch.set_num_threads(1)
    meter, idle_bytes, laps, records = Meter(), memory_bytes("VmRSS"), [], []

    class Metered(KTOTrainer):
        def _inner_training_loop(self, *arguments, **named):
            meter.start()
            return super()._inner_training_loop(*arguments, **named)

        def log(self, logs, start_time=None):
            super().log(logs, start_time)
            if "loss" in logs:  # what is logged after the last step has none
                records.append(logs)
                laps.append(meter.read())

    config = KTOConfig(
        output_dir=output_dir, loss_type="kto", precompute_ref_log_probs=precompute, per_device_train_batch_size=options.batch_size, max_length=options.max_length,
        num_train_epochs=1, learning_rate=LEARNING_RATE, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=MAX_GRAD_NORM,
        model_init_kwargs={"dtype": "float32"}, bf16=False, use_cpu=True, logging_steps=1, save_strategy="no", disable_tqdm=True, report_to=[],
    )  # fmt: skip
    entries = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:], "label": row["label"]} for row in rows]
    trainer = Metered(model=model, args=config, train_dataset=Dataset.from_list(entries), processing_class=AutoTokenizer.from_pretrained(model))
    columns = trainer.train_dataset.to_dict()
    trainer.train()
    ids = [(prompt + completion)[: options.max_length] for prompt, completion in zip(columns["prompt_ids"], columns["completion_ids"])]
    return Trained(
        laps[-1], idle_bytes, sum(parameter.numel() for parameter in trainer.model.parameters()),
        [logs["loss"] for logs in records], [float(logs["grad_norm"]) for logs in records], [np.array(row, dtype=np.int32).tobytes() for row in ids],
        sum(len(row) - len(prompt) for row, prompt in zip(ids, columns["prompt_ids"])), {},
    )  # fmt: skip


def require_agreement(found: list[Trained]) -> tuple[float, float]:
    """Return the largest relative difference of a step's (loss, gradient norm) between the first run and any other.

    SystemExit unless all trained on the same tokens in the same order and every loss is within TOLERANCE.
    """
    first = found[0]
    for other in found[1:]:
        if other.rows != first.rows or len(other.losses) != len(first.losses):
            raise SystemExit("the sides did not train on the same rows, tokens and steps")
    losses, norms = (
        float(np.abs(np.array([read(other) for other in found]) / read(first) - 1).max()) for read in (lambda one: np.array(one.losses), lambda one: np.array(one.grad_norms))
    )  # NaN if any is
    if not losses <= TOLERANCE:
        raise SystemExit(f"the losses differ by {losses:.1e} of their value, more than {TOLERANCE:.0e}")
    return losses, norms


def describe(options: argparse.Namespace, made: str, found: dict[str, list[Trained]], differences: tuple[float, float]) -> str:
    first = found["kto_ds"][0]
    speeds = {name: first.policy_tokens / statistics.median(trained.spent.cpu_seconds for trained in side) for name, side in found.items()}
    memory = {name: max(trained.working_bytes for trained in side) for name, side in found.items()}
    mib = 1 << 20
    rows = {
        "CPU seconds, every repeat": lambda name, side: ", ".join(f"{trained.spent.cpu_seconds:.1f}" for trained in side),
        "CPU seconds, median": lambda name, side: f"{first.policy_tokens / speeds[name]:.1f}",
        "of these in the kernel": lambda name, side: f"{statistics.median(trained.spent.system_seconds for trained in side):.1f}",
        "**policy tokens per second of CPU**": lambda name, side: f"**{speeds[name]:,.0f}**",
        "kto_ds is faster by": lambda name, side: "" if name == "kto_ds" else f"**{speeds['kto_ds'] / speeds[name]:.2f}x**",
        "wall seconds, median": lambda name, side: f"{statistics.median(trained.spent.wall_seconds for trained in side):.1f}",
        "tokens put through the model, padding included": lambda name, side: f"{side[0].spent.tokens_processed:,}",
        "MiB resident after the imports": lambda name, side: f"{statistics.median(trained.idle_bytes for trained in side) / mib:,.0f}",
        "MiB resident at the peak of the loop": lambda name, side: f"{max(trained.spent.peak_bytes for trained in side) / mib:,.0f}",
        "**MiB of this above imports and states**": lambda name, side: f"**{memory[name] / mib:,.0f}**",
        "of this kto_ds takes": lambda name, side: "" if name == "kto_ds" else f"**{memory['kto_ds'] / memory[name]:.2f}x**",
    }
    steps, lengths = len(first.losses), [len(ids) // 4 for ids in first.rows]
    padded = sum(options.batch_size * max(lengths[start : start + options.batch_size]) for start in range(0, len(lengths), options.batch_size))
    cut = f"cut to {options.equal_tokens} tokens of question and of answer" if options.equal_tokens else "the first with prompts of their own"
    return f"""{command_line()}

{cores()}, one thread used. {versions("trl", "torch", "transformers", "deepspeed")}.
{made}
{len(lengths)} rows of `{options.rows.name}`, {cut}: {steps} steps of {options.batch_size}, {first.policy_tokens:,} policy tokens, {first.completion_tokens / first.policy_tokens:.0%} of them in completions. In TRL's batches
{first.policy_tokens / padded:.0%} of the tokens are real. States: {STATE_BYTES * first.num_weights / mib:,.0f} MiB. {options.repeats} repeats, in turn.

{table(found.items(), str, rows)}

Between all of these runs the loss of a step differs by at most {differences[0]:.1e} of its value, the gradient norm by {differences[1]:.1e}.
"""
