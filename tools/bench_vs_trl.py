"""Measure kto_ds beside TRL on one CPU thread, and write the table of docs/benchmarks/cpu.md.

    python tools/bench_vs_trl.py precompute

It needs `pip install trl==1.16.0` besides kto_ds. `precompute` compares the reference log-probs: the same random-init Qwen3 model, tokenizer, rows and
length limit on both sides, float32, CPU time, every repeat in a process of its own, the sides in turn. What is timed is told in docs/benchmarks/cpu.md.
The log-probs of both sides must agree before a speed is written down.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from functools import wraps
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

import kto_ds

ROOT = Path(__file__).resolve().parents[1]
TRL_VERSION = "1.16.0"
VOCAB_SIZE = 32_768
HEAD_DIM = 64
SEED = 0
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TOLERANCE = 1e-4  # of a sequence's log-prob
# Neither library may find a second thread, a GPU or the network. DeepSpeed reads its variable on import, hence in the environment.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}


class Spent(NamedTuple):
    """What one span cost."""

    cpu_seconds: float  # of all threads
    system_seconds: float  # of these in the kernel, such as for memory asked for anew
    wall_seconds: float
    tokens_processed: int  # that went through the model, padding included


class Scored(NamedTuple):
    """One side's reference log-probs and what they cost."""

    spent: Spent
    pairs: int
    tokens: int  # of prompt and completion, summed over all pairs
    matched: dict[int, tuple[bytes, float]]  # row number, from 1: (ids of prompt and completion as int32, log-prob of the completion)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    precompute = commands.add_parser("precompute", help="reference log-probs", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    precompute.add_argument("--rows", type=Path, default=ROOT.parent / "shared" / "data" / "kto_en_demo.json", help="JSON array of rows with messages and label")
    precompute.add_argument("--num_rows", type=int, default=None, help="the first so many rows; default all")
    precompute.add_argument("--repeats", type=int, default=3)
    precompute.add_argument("--max_length", type=int, default=2048, help="tokens of prompt and completion together")
    precompute.add_argument("--hidden_size", type=int, default=256)
    precompute.add_argument("--num_layers", type=int, default=6)
    precompute.add_argument("--trl_batch_size", type=int, default=8, help="TRL's per_device_train_batch_size; 8 is its default")
    precompute.add_argument("--trl_ref_batch_sizes", type=int, nargs="*", default=[], help="values of TRL's precompute_ref_batch_size to measure besides")
    precompute.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks" / "cpu.md", help="Markdown file with the two markers")
    precompute.add_argument("--print_only", action="store_true", help="leave the file as it is")
    options = parser.parse_args()
    if not find_spec("trl") or version("trl") != TRL_VERSION:
        raise SystemExit(f"this compares with TRL {TRL_VERSION}: pip install trl=={TRL_VERSION}")
    if not options.rows.is_file():
        raise SystemExit(f"--rows: no such file: {options.rows}; give a JSON array of rows with messages and label, such as kto_en_demo.json of LLaMA-Factory")
    os.environ.update(ENVIRONMENT)
    around = None if options.print_only else around_markers(options.output, "precompute-ref")
    text = bench_precompute(options)
    print(text)
    if around:
        options.output.write_text(text.join(around), encoding="utf-8")


def around_markers(path: Path, name: str) -> tuple[str, str]:
    """Return what a Markdown file has up to the comment `<!-- name:begin -->` and from `<!-- name:end -->` on. A missing one must not show after an hour."""
    found = re.fullmatch(f"(.*<!-- {name}:begin -->\n).*(<!-- {name}:end -->.*)", path.read_text(encoding="utf-8") if path.is_file() else "", re.DOTALL)
    if not found:
        raise SystemExit(f"{path.name} needs the lines <!-- {name}:begin --> and <!-- {name}:end -->, or give --print_only")
    return found[1], found[2]




def make_model(folder: Path, all_rows: list[dict], options: argparse.Namespace) -> str:
    """Write a seeded Qwen3 model and a byte-level BPE of at most VOCAB_SIZE tokens trained on all rows; return what they came out as, in words."""
    texts = [message["content"] for row in all_rows for message in row["messages"]]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special, alphabet = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    heads = options.hidden_size // HEAD_DIM
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE, hidden_size=options.hidden_size, intermediate_size=3 * options.hidden_size, num_hidden_layers=options.num_layers, head_dim=HEAD_DIM,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 2), max_position_embeddings=max(4096, options.max_length), tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    characters = sum(map(len, texts)) / sum(len(tokenizer(text)["input_ids"]) for text in texts)
    head = VOCAB_SIZE * options.hidden_size
    layers = sum(weight.numel() for weight in model.parameters()) - head
    return (
        f"Tokenizer: {len(tokenizer):,} tokens, {characters:.1f} characters a token. Model: Qwen3, float32, hidden size {options.hidden_size}, {options.num_layers} layers "
        f"with {layers / 1e6:.1f} million weights, head with {head / 1e6:.1f} million (vocabulary {VOCAB_SIZE:,}, tied)."
    )


def in_fresh_process(function: Callable, *arguments):
    """Run a function of this module where nothing was imported, allocated or cached before. Unlike a pool's, such a process may have workers of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def measured(function: Callable, spans: list[Spent]) -> Callable:
    """Return the function such that every call appends what it cost to `spans`. From now on all embeddings count their tokens."""
    counted, embed = [0], torch.nn.Embedding.forward

    def counting(self, ids):
        counted[0] += ids.numel()
        return embed(self, ids)

    @wraps(function)
    def measuring(*arguments, **named):
        counted[0], wall, system, cpu = 0, time.perf_counter(), os.times().system, time.process_time()
        result = function(*arguments, **named)
        spans.append(Spent(time.process_time() - cpu, os.times().system - system, time.perf_counter() - wall, counted[0]))
        return result

    torch.nn.Embedding.forward = counting
    return measuring


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
    table = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:], "label": row["label"], "row": number} for number, row in enumerate(rows, 1)]
    config = KTOConfig(
        output_dir=output_dir, loss_type="kto", precompute_ref_log_probs=True, per_device_train_batch_size=options.trl_batch_size,
        precompute_ref_batch_size=ref_batch_size, max_length=options.max_length, model_init_kwargs={"dtype": "float32"}, bf16=False, use_cpu=True, report_to=[],
    )  # fmt: skip
    trainer = KTOTrainer(model=model, args=config, train_dataset=Dataset.from_list(table), processing_class=AutoTokenizer.from_pretrained(model))
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


def bench_precompute(options: argparse.Namespace) -> str:
    all_rows = json.loads(options.rows.read_text(encoding="utf-8"))
    rows = all_rows[: options.num_rows]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        made = make_model(work / "model", all_rows, options)
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
    table = [f"| {what} | " + " | ".join(cell(name, side) for name, side in found.items()) + " |" for what, cell in rows.items()]
    libraries = ", ".join(f"{name} {version(name)}" for name in ("trl", "torch", "transformers", "tokenizers"))
    command = " ".join(Path(word).name if "/" in word else word for word in sys.argv[1:])  # paths are of this machine
    return f"""`python tools/bench_vs_trl.py {command}`, {date.today().isoformat()}

{os.cpu_count()} cores ({cpu_name()}), one thread used. Python {platform.python_version()}, kto_ds {kto_ds.__version__}, {libraries}.
{made}
{num_rows} of {taken} rows of `{options.rows.name}` have a prompt below {options.max_length:,} tokens, the same on both sides. {options.repeats} repeats, in turn.

| | {" | ".join(map(name_of, found))} |
|---|{"---:|" * len(found)}
{chr(10).join(table)}

TRL with batches of {options.trl_batch_size}, as it trains: kto_ds is faster by {speeds[None] / speeds[options.trl_batch_size]:.2f}x. With batches of {best}, TRL's fastest here: {speeds[None] / speeds[best]:.2f}x.
The log-probs of the {num_rows} matched pairs differ by at most {difference:.1e} of their value.
"""


def cpu_name() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8")) if platform.system() == "Linux" else None
    return found[1] if found else platform.machine()


if __name__ == "__main__":
    main()
