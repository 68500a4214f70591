"""Measure `prepare` and the batch plan on many rows, and write the table of docs/benchmarks/data.md.

    python tools/bench_data.py --seed_rows rows.json --work_dir /tmp/bench --num_rows 1000000 --output docs/benchmarks/data.md

The rows are made of sentences of `--seed_rows` (messages and label, any file that prepare reads), with a prompt of its own each; the tokenizer is a
byte-level BPE trained on the same sentences. Three things are measured:

- the tokenizer's own batched speed: `tokenizer(texts)` on rendered conversations, in as many processes as prepare uses;
- `prepare` from JSONL to the artefact, wall time and the memory of all its processes together, sampled once a second;
- what training does with the artefact before its first step: opening it, the plan of one epoch, the micro-batches of one step.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import re
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
from benchmarks.process import in_fresh_process
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from kto_ds.data.batch_plan import plan_batches
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.packing import share_out
from kto_ds.rows.records import to_records
from kto_ds.rows.sources import read_blocks

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SAMPLE_ROWS = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed_rows", required=True, help="rows whose sentences are used")
    parser.add_argument("--work_dir", type=Path, required=True, help="room for the rows and the artefact: about 9 GB for a million rows")
    parser.add_argument("--num_rows", type=int, default=1_000_000)
    parser.add_argument("--tokens_per_row", type=int, default=700)
    parser.add_argument("--num_proc", type=int, default=2)
    parser.add_argument("--output", type=Path, default=None, help="Markdown file to write")
    options = parser.parse_args()
    options.work_dir.mkdir(parents=True, exist_ok=True)

    sentences = read_sentences(options.seed_rows)
    model = make_model(options.work_dir / "model", sentences)
    rows = options.work_dir / f"rows-{options.num_rows}.jsonl"
    if not rows.exists():
        write_rows(rows, sentences, model, options)
    own = tokenizer_speed(rows, model, options.num_proc)
    prepared = measure_prepare(rows, model, options)
    again = tokenizer_speed(rows, model, options.num_proc)  # the machine's speed drifts: before and after
    plan = in_fresh_process(measure_plan, options.work_dir / "run" / "dataset" / "train")
    text = describe(options, (own, again), prepared, plan)
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text, encoding="utf-8")


def read_sentences(path: str) -> list[str]:
    """Return the distinct sentences of all turns of the seed rows."""
    found: dict[str, None] = {}
    for block in read_blocks(path, None):
        for number, row in block.rows():
            for record in to_records(row, str(number)):
                for message in record.prompt + record.completion:
                    found.update(dict.fromkeys(part for part in re.split(r"(?<=[.!?\n])\s+", message["content"]) if len(part) > 20))
    return list(found)


def make_model(folder: Path, sentences: list[str]) -> Path:
    """Write a model configuration and a tokenizer of 32,000 tokens or as many as the sentences give; weights are not needed."""
    if folder.exists():
        return folder
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(sentences, trainers.BpeTrainer(vocab_size=32_000, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=8192).save_pretrained(folder)
    return folder


def write_rows(path: Path, sentences: list[str], model: Path, options: argparse.Namespace) -> None:
    """Write conversations of a third prompt and two thirds answer, their lengths spread around the mean."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    lengths = [len(ids) for ids in tokenizer(sentences)["input_ids"]]
    mean_sentence = sum(lengths) / len(lengths)
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8") as stream:
        for number in range(options.num_rows):
            count = max(3, round(options.tokens_per_row / mean_sentence * rng.lognormvariate(-0.08, 0.4)))
            chosen = rng.choices(sentences, k=count)
            cut = max(1, count // 3)
            messages = [
                {"role": "user", "content": f"Question {number}: {' '.join(chosen[:cut])}"},
                {"role": "assistant", "content": " ".join(chosen[cut:])},
            ]
            stream.write(json.dumps({"messages": messages, "label": rng.random() < 0.6}) + "\n")


def tokenizer_speed(rows: Path, model: Path, num_proc: int) -> dict:
    """Return rows and tokens a second of `tokenizer(texts)` in batches of 1,000, all processes together, on texts that are rendered beforehand."""
    with multiprocessing.get_context("spawn").Pool(num_proc) as pool:
        found = pool.starmap(_tokenize_sample, [(rows, model, share, num_proc) for share in range(num_proc)], chunksize=1)
    sizes = sum(sample.rows for sample in found)
    return {
        "rows_per_second": sum(sample.rows / sample.seconds for sample in found),
        "tokens_per_row": sum(sample.tokens for sample in found) / sizes,
        "cpu_per_row": sum(sample.cpu_seconds for sample in found) / sizes,
    }


class Sample(NamedTuple):
    rows: int
    tokens: int
    seconds: float
    cpu_seconds: float


def _tokenize_sample(rows: Path, model: Path, share: int, num_shares: int) -> Sample:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = AutoTokenizer.from_pretrained(model)
    with open(rows, encoding="utf-8") as stream:
        lines = [line for number, line in zip(range(SAMPLE_ROWS), stream) if number % num_shares == share]
    texts = [tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False) for line in lines]
    begin, begin_cpu, tokens = time.perf_counter(), time.process_time(), 0
    for start in range(0, len(texts), 1000):
        tokens += sum(map(len, tokenizer(texts[start : start + 1000])["input_ids"]))
    return Sample(len(texts), tokens, time.perf_counter() - begin, time.process_time() - begin_cpu)


def measure_prepare(rows: Path, model: Path, options: argparse.Namespace) -> dict:
    """Run prepare as a user does and return its wall time and the largest memory of all its processes, RSS and PSS in bytes."""
    config = options.work_dir / "run.yaml"
    data = f"{{train: [{{path: {rows}}}], max_length: 2048, dataset_num_proc: {options.num_proc}}}"
    config.write_text(f"output_dir: {options.work_dir / 'run'}\nmodel: {{path: {model}}}\ndata: {data}\n", encoding="utf-8")
    begin, begin_cpu = time.perf_counter(), _children_cpu()
    peaks = {"rss": 0, "pss": 0, "main_rss": 0}
    with subprocess.Popen([sys.executable, "-m", "kto_ds", "prepare", "--config", str(config)], stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            _sample_memory(process.pid, peaks)
            time.sleep(1)
        print(process.stdout.read())
    if process.returncode:
        raise SystemExit(f"prepare ended with exit code {process.returncode}")
    return {"seconds": time.perf_counter() - begin, "cpu_seconds": _children_cpu() - begin_cpu, **peaks}


def _children_cpu() -> float:
    """CPU seconds of all processes that have ended, workers of prepare among them."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _sample_memory(pid: int, peaks: dict[str, int]) -> None:
    try:
        main = psutil.Process(pid)
        found = [process.memory_full_info() for process in (main, *main.children(recursive=True))]
    except psutil.Error:  # a process ended meanwhile
        return
    peaks["rss"] = max(peaks["rss"], sum(memory.rss for memory in found))
    peaks["pss"] = max(peaks["pss"], sum(memory.pss for memory in found))
    peaks["main_rss"] = max(peaks["main_rss"], found[0].rss)


def measure_plan(folder: Path) -> dict:
    """Return what it costs a training process to open the artefact, plan an epoch and lay out a step. Memory is the growth of the peak."""
    before = _peak_bytes()
    begin = time.perf_counter()
    split = TokenizedSplit.load(folder)
    opened = time.perf_counter()
    plan = plan_batches(split.kl_group_of, global_batch_size=128, num_train_epochs=1, max_steps=None, shuffle=True, seed=0)
    planned = time.perf_counter()
    examples = plan.examples_of(1)
    for pairs in (examples, split.mismatched_pairs(examples)):
        share_out(
            pairs, pair_prompts=split.pair_prompts, pair_lengths=split.pair_lengths, prompt_lengths=split.prompt_lengths,
            layout="prefix_shared", max_tokens=8192, num_ranks=8,
        )  # fmt: skip
    done = time.perf_counter()
    mapped = sum(file.stat().st_size for file in folder.iterdir())
    held = sum(array.nbytes for array in (split.pair_prompts, split.pair_lengths, split.prompt_lengths, plan.examples, plan.step_offsets))
    return {
        "open": opened - begin, "plan": planned - opened, "first_step": done - planned, "steps": plan.num_steps, "peak_growth": _peak_bytes() - before,
        "mapped": mapped, "held": held, "examples": split.num_examples, "tokens": int(split.matched_lengths.sum() + np.diff(split.prompt_offsets)[split.prompt_of].sum()),
    }  # fmt: skip


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe(options: argparse.Namespace, own: tuple[dict, dict], prepared: dict, plan: dict) -> str:
    gib = 2**30
    own_speed = sum(found["rows_per_second"] for found in own) / 2
    own_cpu = sum(found["cpu_per_row"] for found in own) / 2
    speed, cpu = options.num_rows / prepared["seconds"], prepared["cpu_seconds"] / options.num_rows
    libraries = ", ".join(f"{name} {version(name)}" for name in ("tokenizers", "transformers", "numpy", "datasets", "pyarrow"))
    return f"""# Data: prepare and plan

`{' '.join(['python', 'tools/bench_data.py', f'--num_rows {options.num_rows}', f'--num_proc {options.num_proc}'])} --seed_rows ... --work_dir ...`

{options.num_rows:,} conversations of {own[0]['tokens_per_row']:.0f} tokens on average ({plan['tokens']:,} tokens kept), JSONL, each with a prompt of its own.
{os.cpu_count()} cores ({platform.processor() or platform.machine()}), Python {platform.python_version()}, {libraries}.

| What | Figure |
|---|---|
| the tokenizer's own batched speed, {options.num_proc} processes (before, after) | {own[0]['rows_per_second']:,.0f}, {own[1]['rows_per_second']:,.0f} rows/s |
| `prepare`, from rows to the sealed artefact | {prepared['seconds']:,.0f} s, {speed:,.0f} rows/s |
| ratio of the two | {speed / own_speed:.2f} |
| CPU time a row: the tokenizer (before, after), `prepare` | {own[0]['cpu_per_row'] * 1e3:.2f}, {own[1]['cpu_per_row'] * 1e3:.2f}, {cpu * 1e3:.2f} ms |
| ratio of the two, tokenizer to `prepare` | {own_cpu / cpu:.2f} |
| memory of `prepare`, all processes: resident (shared pages counted in each), proportional | {prepared['rss'] / gib:.2f} GiB, {prepared['pss'] / gib:.2f} GiB |
| of this the main process, resident | {prepared['main_rss'] / gib:.2f} GiB |
| opening the artefact in a training process ({plan['mapped'] / gib:.2f} GiB are mapped) | {plan['open']:.2f} s |
| plan of one epoch ({plan['steps']:,} steps of 128) | {plan['plan']:.2f} s |
| micro-batches of the first step, both passes, 8 ranks | {plan['first_step']:.2f} s |
| growth of the training process's peak memory by these three, mapped pages that were read included | {plan['peak_growth'] / gib:.2f} GiB |
| of this held as copies | {plan['held'] / gib:.2f} GiB |
"""


if __name__ == "__main__":
    main()
