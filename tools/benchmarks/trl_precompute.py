"""Reference log-probs: `kto-ds precompute-ref` beside TRL's precompute pass."""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.page import command_line, cores, table, versions
from benchmarks.process import Spent, in_fresh_process, measured
from benchmarks.small_model import SEED, make_model, read_rows, texts_of

TOLERANCE = 1e-4  # of a sequence's log-prob


class Scored(NamedTuple):
    """One side's reference log-probs and what they cost."""

    spent: Spent
    pairs: int
    tokens: int  # of prompt and completion, summed over all pairs
    matched: dict[int, tuple[bytes, float]]  # row number, from 1: (ids of prompt and completion as int32, log-prob of the completion)


def bench_precompute(options: argparse.Namespace) -> str:
    all_rows = read_rows(options.rows)
    rows = all_rows[: options.num_rows]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        made = make_model(work / "model", texts_of(all_rows), hidden_size=options.hidden_size, num_layers=options.num_layers, max_length=options.max_length)
        ours = {
            "seed": SEED,
            "model": {"path": str(work / "model"), "dtype": "float32"},
            "data": {"train": [{"path": str(work / "rows.json")}], "max_length": options.max_length, "artifact": str(work / "dataset"), "dataset_num_proc": 1},
        }
        in_fresh_process(prepare_ours, {**ours, "output_dir": str(work / "prepare")})
        # By the number of sequences in one forward of TRL; None stands for kto_ds.
        found: dict[int | None, list[Scored]] = {side: [] for side in (None, options.trl_batch_size, *options.trl_ref_batch_sizes)}
        for repeat, side in itertools.product(range(options.repeats), found):
            output_dir = str(work / f"{repeat}-{side}")
            if side is None:
                scored = in_fresh_process(precompute_ours, {**ours, "output_dir": output_dir})
            else:
                scored = in_fresh_process(precompute_trl, rows, str(work / "model"), output_dir, options, side)
            found[side].append(scored)
            print(f"repeat {repeat + 1}, {name_of(side)}: {scored.spent.cpu_seconds:.1f} s of CPU", file=sys.stderr, flush=True)  # it takes many minutes
    return describe(options, made, len(rows), found, require_agreement([scored for side in found.values() for scored in side]))


def prepare_ours(config: dict) -> None:
    from kto_ds.config import RunConfig
    from kto_ds.stages import prepare

    prepare.main(RunConfig.model_validate(config))


def precompute_ours(config: dict) -> Scored:
    """Measure `kto-ds precompute-ref` whole, after its imports: digests, reading the model, scoring, writing and sealing the artefact."""
    from kto_ds.config import RunConfig
    from kto_ds.runtime import collectives
    from kto_ds.stages import precompute_ref
    from kto_ds.stages.inputs import open_dataset, open_reference

    torch.set_num_threads(1)
    spans: list[Spent] = []
    run = RunConfig.model_validate(config)
    measured(precompute_ref.main, spans)(run)
    splits, manifest = open_dataset(run)
    split, logps = splits["train"], open_reference(run, splits, manifest)[0]["train"]
    collectives.stop()
    matched, tokens = {}, int((split.prompt_lengths[split.pair_prompts] + split.pair_lengths).sum())
    for example in range(split.num_examples):
        ids = np.concatenate([split.prompt(split.prompt_of[example]), split.completion(example)])
        matched[int(split.row_of[example])] = (ids.astype(np.int32).tobytes(), float(logps[example]))
    return Scored(require_computed(spans, len(split.prompt_tokens)), len(logps), tokens, matched)


def precompute_trl(rows: list[dict], model: str, output_dir: str, options: argparse.Namespace, ref_batch_size: int) -> Scored:
    """Measure TRL's precompute pass alone: its tokenization, reading the model and the digest of its weights are done before."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import KTOConfig, KTOTrainer

    torch.set_num_threads(1)
    spans: list[Spent] = []
    KTOTrainer._precompute_ref_logps = measured(KTOTrainer._precompute_ref_logps, spans)
    # A dataset in memory has no cache file that a later run could find: every repeat computes, which the count of tokens shows.
    entries = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:], "label": row["label"], "row": number} for number, row in enumerate(rows, 1)]
    config = KTOConfig(
        output_dir=output_dir, loss_type="kto", precompute_ref_log_probs=True, per_device_train_batch_size=options.trl_batch_size,
        precompute_ref_batch_size=ref_batch_size, max_length=options.max_length, model_init_kwargs={"dtype": "float32"}, bf16=False, use_cpu=True, report_to=[],
    )  # fmt: skip
    trainer = KTOTrainer(model=model, args=config, train_dataset=Dataset.from_list(entries), processing_class=AutoTokenizer.from_pretrained(model))
    columns = trainer.train_dataset.to_dict()
    matched, tokens = {}, 0
    for row, prompt, completion, mismatched, logp in zip(*(columns[name] for name in ("row", "prompt_ids", "completion_ids", "KL_completion_ids", "ref_logps"))):
        matched[row] = (np.array((prompt + completion)[: options.max_length], dtype=np.int32).tobytes(), logp)
        tokens += sum(min(options.max_length, len(prompt) + len(ids)) for ids in (completion, mismatched))
    return Scored(require_computed(spans, tokens), 2 * len(matched), tokens, matched)


def require_computed(spans: list[Spent], least_tokens: int) -> Spent:
    """Return the only span, or SystemExit when fewer tokens went through the model than had to: log-probs of an earlier repeat were taken over."""
    [spent] = spans
    if spent.tokens_processed < least_tokens:
        raise SystemExit(f"only {spent.tokens_processed} tokens went through the model where at least {least_tokens} had to")
    return spent


def name_of(side: int | None) -> str:
    return "kto_ds" if side is None else f"TRL, batches of {side}"


def require_agreement(found: list[Scored]) -> float:
    """Return the largest relative difference of a matched log-prob between the first and any other; SystemExit unless rows, tokens and log-probs are the same."""
    first, differences = found[0].matched, [0.0]
    for other in (scored.matched for scored in found[1:]):
        if first.keys() != other.keys():
            raise SystemExit(f"rows that only one side kept: {sorted(first.keys() ^ other.keys())[:10]}")
        if differing := [row for row in first if first[row][0] != other[row][0]]:
            raise SystemExit(f"rows whose tokens differ between the sides: {differing[:10]}")
        differences += [abs(other[row][1] / logp - 1) for row, (_, logp) in first.items()]
    largest = float(np.max(differences))  # NaN if any is
    if not largest <= TOLERANCE:
        raise SystemExit(f"the log-probs differ by {largest:.1e} of their value, more than {TOLERANCE:.0e}")
    return largest


def describe(options: argparse.Namespace, made: str, taken: int, found: dict[int | None, list[Scored]], difference: float) -> str:
    num_rows = len(found[None][0].matched)
    speeds = {name: num_rows / statistics.median(scored.spent.cpu_seconds for scored in side) for name, side in found.items()}
    best = max((name for name in found if name is not None), key=speeds.get)
    rows = {
        "CPU seconds, every repeat": lambda name, side: ", ".join(f"{scored.spent.cpu_seconds:.1f}" for scored in side),
        "CPU seconds, median": lambda name, side: f"{num_rows / speeds[name]:.1f}",
        "of these in the kernel": lambda name, side: f"{statistics.median(scored.spent.system_seconds for scored in side):.1f}",
        "rows per second of CPU": lambda name, side: f"{speeds[name]:.3g}",
        "kto_ds is faster by": lambda name, side: "" if name is None else f"{speeds[None] / speeds[name]:.2f}x",
        "wall seconds, median": lambda name, side: f"{statistics.median(scored.spent.wall_seconds for scored in side):.1f}",
        "pairs": lambda name, side: f"{side[0].pairs:,}",
        "tokens of these pairs": lambda name, side: f"{side[0].tokens:,}",
        "tokens put through the model, padding included": lambda name, side: f"{side[0].spent.tokens_processed:,}",
    }
    return f"""{command_line()}

{cores()}, one thread used. {versions("trl", "torch", "transformers", "tokenizers")}.
{made}
{num_rows} of {taken} rows of `{options.rows.name}` have a prompt below {options.max_length:,} tokens, the same on both sides. {options.repeats} repeats, in turn.

{table(found.items(), name_of, rows)}

TRL with batches of {options.trl_batch_size}, as it trains: kto_ds is faster by {speeds[None] / speeds[options.trl_batch_size]:.2f}x. With batches of {best}, TRL's fastest here: {speeds[None] / speeds[best]:.2f}x.
The log-probs of the {num_rows} matched pairs differ by at most {difference:.1e} of their value.
"""
