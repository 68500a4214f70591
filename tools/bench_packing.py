"""Measure how well micro-batches are filled and balanced, and write the tables of docs/benchmarks/packing.md.

    python tools/bench_packing.py --write

Nothing is trained: the plan of steps, ranks and micro-batches comes from lengths alone. Two tables:

- real rows: `prepare` on files of real rows, then every step of one epoch on one rank; real tokens of all that go through the model, beside padded batches;
- a million synthetic rows on 2, 8 and 64 ranks: what ranks lose by waiting for each other, in a sample of the steps.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from bench_data import make_model, read_sentences
from benchmarks.gpu_model import COMPLETION_TOKENS, MAX_LENGTH, PROMPT_TOKENS, SEED, SHARED_PROMPTS
from benchmarks.page import PAGES, ROOT, around_markers, command_line, cores, versions
from benchmarks.process import in_fresh_process

from kto_ds.config import BatchConfig, RunConfig
from kto_ds.data.batch import row_length
from kto_ds.data.batch_plan import plan_batches
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.kl_groups import assign_kl_groups
from kto_ds.data.packing import Layout, MicroBatch, cost_of, share_out
from kto_ds.stages import prepare

PAGE = PAGES / "packing.md"
DATA = ROOT.parent / "shared" / "data"
MAX_TOKENS = BatchConfig().max_tokens_per_microbatch
PADDED_BATCH = 8  # rows of the padded batches beside ours
FILLER_TOKENS = 2
# Ranks and examples a step; 128 examples on 64 ranks are two a rank, whose longest no assignment can balance.
SIZES = [(2, 128), (8, 128), (64, 128), (64, 1024), (64, 2048)]


class Lengths(NamedTuple):
    """What a plan is made of: E examples, of which pair i < E is matched and pair E + i mismatched, and P prompts."""

    pair_prompts: np.ndarray  # [2E]
    pair_lengths: np.ndarray  # [2E]
    prompt_lengths: np.ndarray  # [P]
    kl_group_of: np.ndarray  # [E]

    def share_out(self, pairs: np.ndarray, layout: Layout, num_ranks: int) -> list[list[MicroBatch]]:
        return share_out(
            pairs, pair_prompts=self.pair_prompts, pair_lengths=self.pair_lengths, prompt_lengths=self.prompt_lengths,
            layout=layout, max_tokens=MAX_TOKENS, num_ranks=num_ranks,
        )  # fmt: skip

    def steps(self, global_batch_size: int, most: int | None = None) -> Iterator[np.ndarray]:
        """Yield the examples of every step of an epoch, or of `most` steps spread over it."""
        plan = plan_batches(self.kl_group_of, global_batch_size=global_batch_size, num_train_epochs=1, max_steps=None, shuffle=True, seed=SEED)
        for step in np.unique(np.linspace(1, plan.num_steps, min(most or plan.num_steps, plan.num_steps)).astype(int)):
            yield plan.examples_of(int(step))


class Plan(NamedTuple):
    """What one pass of a sample of steps comes to."""

    waited: float  # cost of the costliest micro-batch of every round, summed
    ran: float  # the mean one
    tokens: int  # real ones
    processed: int  # with what fills rows up, and fillers
    micro_batches: int  # those that are fillers included
    rounds: float  # a step
    row_lengths: int  # distinct ones
    token_counts: int  # distinct ones, which is what row lengths would be without rounding
    seconds: float  # a step, for planning


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, nargs="*", default=[DATA / "kto_en_demo.json", DATA / "dpo_en_demo.json"], help="files that prepare reads")
    parser.add_argument("--num_rows", type=int, default=1_000_000, help="of the synthetic plan")
    parser.add_argument("--steps", type=int, default=200, help="of the synthetic plan that are laid out")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}; otherwise the tables are only printed")
    options = parser.parse_args()
    around = around_markers(PAGE, "packing") if options.write else None
    if missing := [str(path) for path in options.rows if not path.is_file()]:
        raise SystemExit(f"--rows: no such file: {', '.join(missing)}")
    real = [line for path in options.rows for line in real_lines(path)]
    lengths = synthetic_lengths(options.num_rows)
    synthetic = [synthetic_line(lengths, num_ranks, size, kind, options.steps) for num_ranks, size in SIZES for kind in ("matched", "mismatched")]
    text = describe(options, real, synthetic)
    print(text)
    if around:
        PAGE.write_text(text.join(around), encoding="utf-8")


def real_lines(path: Path) -> list[str]:
    """Return the lines of a file's table: both passes, in the layout that shares prompts and in the one that does not."""
    with tempfile.TemporaryDirectory() as folder:
        in_fresh_process(prepare_rows, path, Path(folder))
        split = TokenizedSplit.load(Path(folder) / "run" / "dataset" / "train")
        lengths = Lengths(split.pair_prompts, split.pair_lengths, split.prompt_lengths, np.asarray(split.kl_group_of))
        lines = []
        for kind, first in (("matched", 0), ("mismatched", split.num_examples)):
            sizes = (lengths.prompt_lengths[lengths.pair_prompts] + lengths.pair_lengths)[first : first + split.num_examples]
            padded = sum(len(part) * part.max() for part in np.split(sizes, range(PADDED_BATCH, len(sizes), PADDED_BATCH)))
            for layout in ("prefix_shared", "packed"):
                plan = measure(lengths, layout, kind, num_ranks=1, global_batch_size=BatchConfig().global_batch_size)
                saved = 1 - plan.tokens / sizes.sum()
                fill = plan.processed / (plan.micro_batches * MAX_TOKENS)
                lines.append(
                    f"| `{path.name}` | {kind} | {layout} | {len(sizes):,} | {sizes.sum():,} | {saved:.1%} | {plan.processed:,} | **{plan.tokens / plan.processed:.4f}** "
                    f"| {sizes.sum() / padded:.3f} | {fill:.0%} |"
                )
        return lines


def prepare_rows(path: Path, folder: Path) -> None:
    model = make_model(folder / "model", read_sentences(str(path)))
    data = {"train": [{"path": str(path)}], "max_length": MAX_LENGTH, "dataset_num_proc": 1}
    prepare.main(RunConfig.model_validate({"output_dir": str(folder / "run"), "seed": SEED, "model": {"path": str(model)}, "data": data}))


def synthetic_lengths(num_rows: int) -> Lengths:
    """Draw the lengths of `num_rows` rows and group them as prepare does."""
    rng = np.random.default_rng(SEED)
    prompt_of = np.repeat(np.arange(num_rows), np.where(rng.random(num_rows) < SHARED_PROMPTS, 2, 1))[:num_rows]
    prompt_lengths = np.minimum(draw(rng, PROMPT_TOKENS, prompt_of[-1] + 1), MAX_LENGTH - 1)
    completion_lengths = draw(rng, COMPLETION_TOKENS, num_rows)
    kl_group_of, mismatched_prompt_of = assign_kl_groups(
        prompt_of, rng.random(num_rows) < 0.5, kl_group_size=4, max_examples=BatchConfig().global_batch_size, shuffle=True, seed=SEED
    )
    pair_prompts = np.concatenate([prompt_of, mismatched_prompt_of])
    return Lengths(pair_prompts, np.minimum(np.tile(completion_lengths, 2), MAX_LENGTH - prompt_lengths[pair_prompts]), prompt_lengths, kl_group_of)


def draw(rng: np.random.Generator, lengths: tuple[float, float], size: int) -> np.ndarray:
    median, deviation = lengths
    return np.maximum(1, np.rint(rng.lognormal(np.log(median), deviation, size))).astype(np.int64)


def measure(lengths: Lengths, layout: Layout, kind: str, *, num_ranks: int, global_batch_size: int, most: int | None = None) -> Plan:
    first = 0 if kind == "matched" else len(lengths.kl_group_of)
    waited = ran = seconds = 0.0
    counts: list[int] = []  # tokens of every micro-batch, 0 for a filler
    num_steps = num_rounds = 0
    for examples in lengths.steps(global_batch_size, most):
        began = time.process_time()
        shares = lengths.share_out(examples + first, layout, num_ranks)
        seconds += time.process_time() - began
        costs = np.array([[cost_of(micro_batch, layout) for micro_batch in share] for share in shares])  # [ranks, rounds]
        waited, ran = waited + costs.max(axis=0).sum(), ran + costs.mean(axis=0).sum()
        counts += [sum(unit.tokens for unit in micro_batch) for share in shares for micro_batch in share]
        num_steps, num_rounds = num_steps + 1, num_rounds + costs.shape[1]
    rows = [row_length(tokens) if tokens else FILLER_TOKENS for tokens in counts]
    return Plan(waited, ran, sum(counts), sum(rows), len(rows), num_rounds / num_steps, len(set(rows)), len(set(counts)), seconds / num_steps)


def synthetic_line(lengths: Lengths, num_ranks: int, global_batch_size: int, kind: str, steps: int) -> str:
    plan = measure(lengths, "prefix_shared", kind, num_ranks=num_ranks, global_batch_size=global_batch_size, most=steps)
    print(f"{num_ranks} ranks, {global_batch_size} examples, {kind}: {plan.waited / plan.ran - 1:.1%}", file=sys.stderr, flush=True)
    return (
        f"| {num_ranks} | {global_batch_size:,} | {kind} | **{plan.waited / plan.ran - 1:.1%}** | {plan.rounds:.1f} | {plan.processed / (plan.micro_batches * MAX_TOKENS):.0%} "
        f"| {plan.tokens / plan.processed:.4f} | {plan.micro_batches:,} | {plan.token_counts:,} | {plan.row_lengths:,} | {plan.seconds * 1e3:.1f} |"
    )


def describe(options: argparse.Namespace, real: list[str], synthetic: list[str]) -> str:
    return f"""{command_line()}

{cores()}. {versions("numpy")}.

| Rows | Pass | Layout | Pairs | Tokens of prompt and completion | Saved by sharing prompts | Tokens through the model | Real of these | Real in padded batches of {PADDED_BATCH} | Fill of the budget |
|---|---|---|---:|---:|---:|---:|---:|---:|---:|
{chr(10).join(real)}

{options.num_rows:,} synthetic rows, a sample of at most {options.steps} steps of an epoch each:

| Ranks | Examples a step | Pass | Lost by waiting | Rounds a step | Fill of the budget | Real tokens | Micro-batches | Distinct token counts | Distinct row lengths | Planning, ms a step |
|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|
{chr(10).join(synthetic)}
"""


if __name__ == "__main__":
    main()
