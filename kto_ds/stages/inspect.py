"""The dataset artefact as the model will see it: counts, decoded examples with their mismatched partners, the layout of a step, a picture.

One process; no weights are read. A text is decoded from the token ids of the artefact, never taken from the rows.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console, Group
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from kto_ds.artifacts import read_manifest, require_intact
from kto_ds.config import RunConfig
from kto_ds.config_data import DataConfig
from kto_ds.data.batch_plan import plan_batches
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.packing import Layout, MicroBatch, make_units, require_fit, share_out
from kto_ds.data.split_report import REPORT
from kto_ds.errors import UserError, excerpt
from kto_ds.model.support import choose_layout, read_model_config
from kto_ds.report.histograms import LengthLimits, Lengths, plot_lengths
from kto_ds.report.inspection import Fill, counts_by_source, counts_by_split, fill_table, in_one_line, open_console, visible
from kto_ds.stages.identity import dataset_identity, require_same_dataset, require_same_tokenizer, run_tokenizer
from kto_ds.stages.inputs import PREPARE_FIRST

TOKENS_SHOWN, PARTNER_TOKENS_SHOWN = 200, 60  # of a text; the middle of a longer one is left out
LEGEND = "⟦ ⟧ a special token   ⏎ the end of a line   \\x1b and the like: a character that does not print"
NAMES = {True: "desirable", False: "undesirable"}
STYLES = {True: "green", False: "red"}


class Reader(NamedTuple):
    """What turns token ids into text."""

    tokenizer: PreTrainedTokenizerBase
    special_ids: set[int]


def main(config: RunConfig, *, split: str, num_rows: int, step: int, num_ranks: int) -> None:
    """Show the dataset artefact of the run: `num_rows` examples of each label of `split`, and its `step` as `num_ranks` ranks would share it."""
    tokenizer = run_tokenizer(config)
    splits, mismatch = _open(config, tokenizer)
    _check_options(splits, split=split, num_rows=num_rows, num_ranks=num_ranks)
    examples, num_steps = examples_of_step(config, split, splits[split], step)
    layout, notice = choose_layout(read_model_config(config.model), config.model.layout)
    special_ids = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)

    console = open_console()
    if mismatch:
        console.print(Text(f"notice: train will refuse this artefact. {mismatch}"), soft_wrap=True)
    _show_counts(console, config.dataset_dir)
    _show_examples(console, split, splits[split], num_rows, Reader(tokenizer, special_ids), config.data)
    _heading(console, f"{split}: step {step:,} of {num_steps:,}, {_count(len(examples), 'example')} on {_count(num_ranks, 'rank')}, layout {layout}")
    if notice:
        console.print(Text(f"notice: {notice}"), soft_wrap=True)
    _show_step(console, config, splits[split], examples, layout=layout, num_ranks=num_ranks)
    console.print(Text(f"\npicture of the lengths: {in_one_line(str(_draw(config, split, splits)))}"), soft_wrap=True)


def _open(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, TokenizedSplit], str]:
    """Return the splits by name, and why the artefact is not that of the run, if it is not: one that train refuses may be what one wants to look at.

    UserError when it is missing, damaged, or of another tokenizer, which would decode it to nonsense.
    """
    folder = config.dataset_dir
    manifest = read_manifest(folder, kind="dataset", remedy=PREPARE_FIRST)
    require_same_tokenizer(config.model, manifest, where="model.path")
    require_intact(folder, manifest, remedy=PREPARE_FIRST)
    try:
        require_same_dataset(dataset_identity(config, tokenizer), manifest["identity"], where=str(folder), remedy=PREPARE_FIRST)
        mismatch = ""
    except UserError as error:
        mismatch = str(error)
    return {name: TokenizedSplit.load(folder / name) for name in manifest["splits"]}, mismatch


def _check_options(splits: dict[str, TokenizedSplit], *, split: str, num_rows: int, num_ranks: int) -> None:
    if split not in splits:
        raise UserError(f"the dataset artefact has no split {excerpt(split)}", where="command line: --split", remedy=f"use one of {', '.join(splits)}")
    if num_rows < 0:
        raise UserError(f"{num_rows} examples cannot be shown", where="command line: --num_rows", remedy="give 0 or more")
    if num_ranks < 1:
        raise UserError(f"{num_ranks} ranks cannot share a step", where="command line: --num_ranks", remedy="give 1 or more")


def examples_of_step(config: RunConfig, name: str, split: TokenizedSplit, step: int) -> tuple[np.ndarray, int]:
    """Return (the examples of `step`, the number of steps). An evaluation takes its whole split at once, as its only step."""
    plan = None
    if name == "train":
        plan = plan_batches(
            split.kl_group_of, global_batch_size=config.batch.global_batch_size, num_train_epochs=config.train.num_train_epochs,
            max_steps=config.train.max_steps, shuffle=config.data.shuffle, seed=config.seed,
        )  # fmt: skip
    num_steps = plan.num_steps if plan else 1
    if not 1 <= step <= num_steps:
        why = "" if plan else ": an evaluation takes its whole split in one step"
        raise UserError(f"{name} has no step {step}{why}", where="command line: --step", remedy=f"give a number from 1 to {num_steps}")
    return plan.examples_of(step) if plan else np.arange(split.num_examples), num_steps


def _heading(console: Console, text: str, style: str = "") -> None:
    console.print()
    console.print(Rule(Text(in_one_line(text), style=f"bold {style}"), align="left", style=style or "none"))


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def _show_counts(console: Console, folder: Path) -> None:
    """Print what prepare counted: the splits side by side, then the sources of each."""
    report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    _heading(console, f"dataset artefact {folder}")
    console.print(counts_by_split(report))
    for name, counts in report.items():
        if counts.get("sources"):
            console.print(counts_by_source(name, counts["sources"]))


def _show_examples(console: Console, name: str, split: TokenizedSplit, num_rows: int, reader: Reader, data: DataConfig) -> None:
    if num_rows:
        console.print(Text(f"\n{LEGEND}", style="dim"))
    for desirable in (True, False):
        chosen = spread(np.flatnonzero(np.asarray(split.desirable) == desirable), num_rows)
        for number, example in enumerate(chosen.tolist(), start=1):
            _heading(console, f"{name}: {NAMES[desirable]} example {number} of {len(chosen)}, {split.row_name(example)}", STYLES[desirable])
            console.print(_example(split, example, reader, data))


def spread(ids: np.ndarray, count: int) -> np.ndarray:
    """Return `count` of the `ids`, evenly apart, or all of them if there are fewer."""
    count = min(count, len(ids))
    return ids[(2 * np.arange(count) + 1) * len(ids) // (2 * max(count, 1))]


def _example(split: TokenizedSplit, example: int, reader: Reader, data: DataConfig) -> Table:
    """Return the texts of an example and of its mismatched partner, with what there is to say about them on their left."""
    partner = int(split.mismatched_prompt_of[example])
    prompt, completion, partner_prompt = split.prompt(split.prompt_of[example]), split.completion(example), split.prompt(partner)
    stored, there = _stored_length(split, example), int(split.mismatched_lengths[example])
    cut = cut_of(split, example, reader.tokenizer.eos_token_id, data)
    donor = in_one_line(split.row_name(int((np.asarray(split.prompt_of) == partner).argmax())))
    donated = f"the completion is donated to the prompt of {donor}, {_count(len(partner_prompt), 'token')}; {there:,} of its {_count(stored, 'token')} fit there"
    texts = (
        (("prompt", _count(len(prompt), "token")), decoded(reader, prompt, "cyan")),
        (("completion", _count(len(completion), "token"), cut), decoded(reader, completion, STYLES[bool(split.desirable[example])], after=prompt)),
        (("mismatched", "partner"), Group(Text(donated), decoded(reader, partner_prompt, "cyan", most=PARTNER_TOKENS_SHOWN))),
    )  # fmt: skip
    table = Table.grid(padding=(0, 2, 1, 0), collapse_padding=False)
    table.add_column(no_wrap=True, min_width=17)
    table.add_column(overflow="fold")
    for (name, *facts), text in texts:
        table.add_row(Text.assemble((name, "bold"), *(f"\n{fact}" for fact in facts)), text)
    return table


def _stored_length(split: TokenizedSplit, example: int) -> int:
    return int(split.completion_offsets[example + 1] - split.completion_offsets[example])


def cut_of(split: TokenizedSplit, example: int, eos_id: int | None, data: DataConfig) -> str:
    """Say whether the completion lost its end. The artefact does not hold the lengths from before: one that ends at a limit may have ended there anyway."""
    completion = split.completion(example)
    if len(completion) < _stored_length(split, example):
        return "cut"
    room = data.max_length - len(split.prompt(split.prompt_of[example]))
    at_limit = len(completion) >= min(room, data.max_completion_length or room)
    return "at the limit: cut?" if at_limit and data.truncation_mode not in ("drop", "error") and completion[-1] != eos_id else "whole"


def decoded(reader: Reader, ids: np.ndarray, style: str, *, most: int = TOKENS_SHOWN, after: np.ndarray | None = None) -> Text:
    """Return the text of the token ids [N], escaped, with special tokens marked; of many more than `most` tokens the middle is left out.

    `after` are the ids before: some tokenizers drop the space that begins a text, and only what stands before it brings it back.
    """
    ids, before = ids.tolist(), [] if after is None else after[-1:].tolist()
    if len(ids) <= 1.25 * most:  # to leave out a token or two helps nobody
        return _runs(reader, ids, before, style)
    head, left_out, tail = ids[: most // 2], ids[most // 2 : -(most // 2)], ids[-(most // 2) :]
    return Text.assemble(_runs(reader, head, before, style), (f" [... {_count(len(left_out), 'token')} left out ...] ", "bold"), _runs(reader, tail, left_out[-1:], style))


def _runs(reader: Reader, ids: list[int], before: list[int], style: str) -> Text:
    """Decode ordinary tokens in stretches, since a character may take several of them, and special tokens one by one."""
    text, run = Text(), []
    for token_id in [*ids, None]:
        if token_id is not None and token_id not in reader.special_ids:
            run.append(token_id)
            continue
        if run:
            text.append(visible(_decode_after(reader.tokenizer, before, run)), style)
            before, run = run[-1:], []
        if token_id is not None:
            text.append(f"⟦{visible(reader.tokenizer.decode([token_id]))}⟧", "bold magenta")
            before = [token_id]
    if text.plain.endswith("\n"):
        text.right_crop(1)  # the sign of the line's end is enough
    return text


def _decode_after(tokenizer: PreTrainedTokenizerBase, before: list[int], ids: list[int]) -> str:
    alone, start, whole = (tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in (ids, before, before + ids))
    return whole.removeprefix(start) if whole.startswith(start) else alone


def _show_step(console: Console, config: RunConfig, split: TokenizedSplit, examples: np.ndarray, *, layout: Layout, num_ranks: int) -> None:
    max_tokens = config.batch.max_tokens_per_microbatch
    for title, pairs in (("policy pass, matched pairs", examples), ("KL pass, mismatched pairs", split.mismatched_pairs(examples))):
        if pairs is not examples and config.loss.loss_type != "kto":
            console.print(Text(f"\nno KL pass: {config.loss.loss_type} holds the reference point at 0"))
            continue
        prompts = split.pair_prompts[pairs]
        alone = int((split.prompt_lengths[prompts] + split.pair_lengths[pairs]).sum())
        fills = fills_of(pairs, split, layout=layout, max_tokens=max_tokens, num_ranks=num_ranks)
        title += "; the bars count padding" if layout == "padded" else ""
        table = fill_table(title, fills, num_prompts=len(np.unique(prompts)), max_tokens=max_tokens, ascii_only=console.options.ascii_only)
        console.print(table)
        if saved := alone - sum(fill.tokens for fill in fills):
            console.print(Text(f"shared prompts save {saved:,} of {alone:,} tokens ({saved / alone:.0%})"))
    try:
        require_fit(split.longest_pair_tokens, max_tokens, "batch.max_tokens_per_microbatch")
    except UserError as error:
        console.print(Text(f"\nnotice: train will refuse this split. {error}"), soft_wrap=True)


def fills_of(pairs: np.ndarray, split: TokenizedSplit, *, layout: Layout, max_tokens: int, num_ranks: int) -> list[Fill]:
    """Return every micro-batch that `pairs` [N] become, rank by rank, fillers included."""
    units = make_units(
        pairs, pair_prompts=split.pair_prompts, pair_lengths=split.pair_lengths, prompt_lengths=split.prompt_lengths, layout=layout, max_tokens=max_tokens
    )
    shares = share_out(units, num_ranks=num_ranks, layout=layout, max_tokens=max_tokens)
    return [_fill(rank, number, micro_batch, layout) for rank, share in enumerate(shares) for number, micro_batch in enumerate(share, start=1)]


def _fill(rank: int, number: int, micro_batch: MicroBatch, layout: Layout) -> Fill:
    tokens = sum(unit.tokens for unit in micro_batch)
    used = len(micro_batch) * max((unit.longest for unit in micro_batch), default=0) if layout == "padded" else tokens
    return Fill(rank, number, len(micro_batch), len({unit.prompt for unit in micro_batch}), sum(len(unit.pairs) for unit in micro_batch), tokens, used)


def _draw(config: RunConfig, name: str, splits: dict[str, TokenizedSplit]) -> Path:
    """Write the picture of a split's lengths beside the run's other files and return its path."""
    split, data = splits[name], config.data
    desirable = np.asarray(split.desirable)
    lengths = Lengths(split.prompt_lengths[split.prompt_of], np.asarray(split.matched_lengths), desirable)
    counts = {other: (int(found.desirable.sum()), int((~found.desirable).sum())) for other, found in splits.items()}
    picture = config.output_dir / f"inspect-{name.replace('/', '-')}.png"
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
        plot_lengths(name, lengths, LengthLimits(data.max_prompt_length, data.max_completion_length, data.max_length), counts, picture)
    except OSError as error:
        raise UserError(f"cannot write: {error.strerror or error}", where=str(picture), remedy="choose an output_dir you may write to") from error
    return picture
