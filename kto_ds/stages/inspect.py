"""The dataset artefact as the model will see it: counts, decoded examples with their mismatched partners, the layout of a step, a picture.

Beside it the reference artefact, as far as there is one. One process; no weights are read. A text is decoded from the token ids of the artefact, never taken from the rows.
"""

import contextlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from kto_ds.artifacts import incomplete_path, read_manifest, require_intact, state_of
from kto_ds.config import RunConfig
from kto_ds.config_data import DataConfig
from kto_ds.data.batch_plan import plan_batches
from kto_ds.data.dataset import REPORT, TokenizedSplit
from kto_ds.data.keys import find
from kto_ds.data.kl_sample import sample_groups
from kto_ds.data.packing import Layout, MicroBatch, require_fit
from kto_ds.data.reference import KEPT, ReferenceRows, committed_shards, join_rows, no_rows, plan_of, read_shard, read_shards
from kto_ds.data.reference_work import needed_pairs
from kto_ds.data.sharding import Sharding
from kto_ds.errors import UserError, excerpt
from kto_ds.model.support import choose_layout, read_model_config
from kto_ds.report.histograms import LengthLimits, Lengths, plot_lengths
from kto_ds.report.inspection import Fill, Reader, count_of, counts_by_source, counts_by_split, decoded, fill_table, heading, in_one_line, open_console
from kto_ds.report.reference_view import Scored, coverage_table, differing_fields, facts_table, listed, logp_table, lowest_examples, nats, verdict
from kto_ds.stages.identity import dataset_identity, origin_differences, reference_model, reference_origin, require_same_dataset, require_same_tokenizer, run_tokenizer
from kto_ds.stages.inputs import PRECOMPUTE_FIRST, PREPARE_FIRST, read_dataset_manifest, require_whole_dataset
from kto_ds.staging import resume_state

PARTNER_TOKENS_SHOWN = 60  # of the prompt that a completion is donated to
LEGEND = "⟦ ⟧ a special token   ⏎ the end of a line   \\x1b and the like: a character that does not print"
NAMES = {True: "desirable", False: "undesirable"}
STYLES = {True: "green", False: "red"}


class Reference(NamedTuple):
    """What lies in the place of the reference artefact."""

    state: str  # complete, unfinished, missing or damaged
    line: str  # how far it is, and what to do about it
    made: dict  # its manifest; the state that an unfinished one was begun in; empty where neither can be read
    rows: ReferenceRows  # without those of single tokens


def main(config: RunConfig, *, split: str, num_rows: int, step: int, num_ranks: int) -> None:
    """Show the dataset artefact of the run: `num_rows` examples of each label of `split`, and its `step` as `num_ranks` ranks would share it."""
    tokenizer = run_tokenizer(config)
    splits, manifest, mismatch = _open(config, tokenizer)
    _check_options(splits, split=split, num_rows=num_rows, num_ranks=num_ranks)
    examples, num_steps = examples_of_step(config, split, splits[split], step)
    layout, notice = choose_layout(read_model_config(config.model), config.model.layout)
    special_ids = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)

    reference = _open_reference(config.reference_dir)
    scored = {name: _scored(reference.rows, found, config.loss.loss_type) for name, found in splits.items()}

    console = open_console()
    if mismatch:
        console.print(Text(f"notice: train will refuse this artefact. {mismatch}"), soft_wrap=True)
    _show_counts(console, config.dataset_dir)
    heading(console, f"reference artefact {config.reference_dir}")
    console.print(Text(reference.line), soft_wrap=True)
    if reference.state in ("complete", "unfinished"):
        _show_reference(console, config, manifest, reference, scored)
        _show_lowest(console, split, splits[split], scored[split])
    _show_examples(console, split, splits[split], num_rows, Reader(tokenizer, special_ids), config.data, scored[split])
    heading(console, f"{split}: step {step:,} of {num_steps:,}, {count_of(len(examples), 'example')} on {count_of(num_ranks, 'rank')}, layout {layout}")
    if notice:
        console.print(Text(f"notice: {notice}"), soft_wrap=True)
    _show_step(console, config, splits[split], step, examples, layout=layout, num_ranks=num_ranks)
    console.print(Text(f"\npicture of the lengths: {in_one_line(str(_draw(config, split, splits)))}"), soft_wrap=True)


def _open(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, TokenizedSplit], dict, str]:
    """Return the splits by name, the manifest, and why the artefact is not that of the run, if it is not: one that train refuses may be what one wants to look at.

    UserError when it is missing, damaged, or of another tokenizer, which would decode it to nonsense.
    """
    folder = config.dataset_dir
    manifest = read_dataset_manifest(folder)
    require_same_tokenizer(config.model, manifest["identity"], where="model.path")
    require_whole_dataset(folder, manifest)
    try:
        require_same_dataset(dataset_identity(config, tokenizer), manifest["identity"], where=str(folder), remedy=PREPARE_FIRST)
        mismatch = ""
    except UserError as error:
        mismatch = str(error)
    return {name: TokenizedSplit.load(folder / name) for name in manifest["splits"]}, manifest, mismatch


def _open_reference(folder: Path) -> Reference:
    """Return what there is of the reference artefact. Nothing wrong with it is an error: the dataset can be looked at without it."""
    state = state_of(folder)
    if state == "unfinished":
        return _open_unfinished(incomplete_path(folder))
    if state == "missing":
        return Reference(state, f"{state}: {PRECOMPUTE_FIRST}", {}, no_rows(False))
    try:
        manifest = read_manifest(folder, kind="reference", remedy=PRECOMPUTE_FIRST)
        require_intact(folder, manifest, remedy=PRECOMPUTE_FIRST)
        rows = read_shards(folder / name for name in manifest["files"])
    except UserError as error:
        return Reference("damaged", in_one_line(f"notice: train will refuse this artefact. {error.where}: {error.what}; {error.remedy}"), {}, no_rows(False))
    beside = f"\nbeside it, {_open_unfinished(incomplete_path(folder)).line}" if incomplete_path(folder).exists() else ""
    return Reference("complete", f"complete: {count_of(len(rows.keys), 'log-prob')} in {count_of(len(manifest['files']), 'shard')}{beside}", manifest, rows)


def _open_unfinished(folder: Path) -> Reference:
    """The same for the folder of a precompute-ref that was cut short or is at work: only looked at."""
    state = resume_state(folder)
    kept, scored = [], []
    with contextlib.suppress(OSError):  # what is there may be renamed at any moment
        for plan, shards in ((KEPT, kept), (plan_of(state), scored)):
            for path in committed_shards(folder, plan).values():
                with contextlib.suppress(UserError):  # one that holds what cannot be
                    shards.append(read_shard(path).without_tokens())
    rows = join_rows(kept + scored, per_token=False)
    num_kept = sum(len(shard.keys) for shard in kept)
    done = f"{count_of(len(rows.keys), 'log-prob')} in {count_of(len(kept + scored), 'shard')} so far" + (f", {num_kept:,} of them taken over" if num_kept else "")
    return Reference("unfinished", f"unfinished: {done}; to go on, {PRECOMPUTE_FIRST}", state if isinstance(state, dict) else {}, rows)


def _scored(rows: ReferenceRows, split: TokenizedSplit, loss_type: str) -> Scored:
    """Return the log-probs of the pairs of a split, found by their content, as train finds them."""
    places = find(rows.keys, split.pair_keys)
    found = np.flatnonzero(places >= 0)
    found = found[rows.num_tokens[places[found]] == split.pair_lengths[found]]
    logps = np.full(len(split.pair_keys), np.nan)
    logps[found] = rows.logps[places[found]]
    return Scored(logps, split.pair_lengths, np.asarray(split.desirable), len(needed_pairs(split, loss_type)))


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


def _show_counts(console: Console, folder: Path) -> None:
    """Print what prepare counted: the splits side by side, then the sources of each."""
    report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    heading(console, f"dataset artefact {folder}")
    console.print(counts_by_split(report))
    for name, counts in report.items():
        if counts.get("sources"):
            console.print(counts_by_source(name, counts["sources"]))


def _show_reference(console: Console, config: RunConfig, dataset_manifest: dict, reference: Reference, scored: dict[str, Scored]) -> None:
    """Print what made a reference artefact, which pairs it has, how likely it finds them, and whether it is that of the run."""
    made = reference.made
    console.print(facts_table(made), Text(), coverage_table(scored), Text())
    if len(reference.rows.keys):
        console.print(logp_table(scored), Text())
    # The weights are not digested here: they may be tens of gigabytes.
    identity = made["identity"] if isinstance(made.get("identity"), dict) else {}
    expected = {"dtype": reference_model(config).dtype, **{key: value for key, value in dataset_manifest["identity"].items() if key in identity}}
    differences = differing_fields(expected, identity)
    for line in verdict(reference.state == "complete", differences, scored, PRECOMPUTE_FIRST) if made else []:
        console.print(Text(line), soft_wrap=True)
    others = origin_differences(reference_origin(config, dataset_manifest), made["origin"]) if isinstance(made.get("origin"), dict) else []
    if others := [line for line in others if line.split(":")[0] not in expected]:
        console.print(Text(listed("made with other settings, which are no matter where weights and pairs are the same:", others)), soft_wrap=True)


def _show_lowest(console: Console, name: str, split: TokenizedSplit, scored: Scored) -> None:
    if lowest := lowest_examples(scored, split.pair_keys):
        lines = [f"{split.row_name(example)}, {NAMES[bool(split.desirable[example])]}: {nats(scored, example)}" for example in lowest]
        console.print(Text(listed(f"\nlowest log-probs a token in {in_one_line(name)}, where a broken row would be:", lines)), soft_wrap=True)


def _show_examples(console: Console, name: str, split: TokenizedSplit, num_rows: int, reader: Reader, data: DataConfig, scored: Scored) -> None:
    if num_rows:
        console.print(Text(f"\n{LEGEND}", style="dim"))
    for desirable in (True, False):
        chosen = spread(np.flatnonzero(np.asarray(split.desirable) == desirable), num_rows)
        for number, example in enumerate(chosen.tolist(), start=1):
            heading(console, f"{name}: {NAMES[desirable]} example {number} of {len(chosen)}, {split.row_name(example)}", STYLES[desirable])
            console.print(_example(split, example, reader, data, scored))


def spread(ids: np.ndarray, count: int) -> np.ndarray:
    """Return `count` of the `ids`, evenly apart, or all of them if there are fewer."""
    count = min(count, len(ids))
    return ids[(2 * np.arange(count) + 1) * len(ids) // (2 * max(count, 1))]


def _example(split: TokenizedSplit, example: int, reader: Reader, data: DataConfig, scored: Scored) -> Table:
    """Return the texts of an example and of its mismatched partner, with what there is to say about them on their left."""
    partner = int(split.mismatched_prompt_of[example])
    prompt, completion, partner_prompt = split.prompt(split.prompt_of[example]), split.completion(example), split.prompt(partner)
    stored, there = _stored_length(split, example), int(split.mismatched_lengths[example])
    cut = cut_of(split, example, reader.tokenizer.eos_token_id, data)
    donor = in_one_line(split.row_name(int((np.asarray(split.prompt_of) == partner).argmax())))
    donated = f"the completion is donated to the prompt of {donor}, {count_of(len(partner_prompt), 'token')}; {there:,} of its {count_of(stored, 'token')} fit there"
    pairs = {"matched": example, "mismatched": int(split.mismatched_pairs(example))}
    texts = [
        (("prompt", count_of(len(prompt), "token")), decoded(reader, prompt, "cyan")),
        (("completion", count_of(len(completion), "token"), cut), decoded(reader, completion, STYLES[bool(split.desirable[example])], after=prompt)),
        (("mismatched", "partner"), Group(Text(donated), decoded(reader, partner_prompt, "cyan", most=PARTNER_TOKENS_SHOWN))),
    ]  # fmt: skip
    if np.isfinite(scored.logps[list(pairs.values())]).any():
        texts.append((("reference",), Text("\n".join(f"{kind}: {nats(scored, pair)}" for kind, pair in pairs.items()))))
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


def _show_step(console: Console, config: RunConfig, split: TokenizedSplit, step: int, examples: np.ndarray, *, layout: Layout, num_ranks: int) -> None:
    sample = sample_groups(split.kl_group_of[examples], fraction=config.loss.kl_fraction, seed=config.seed, step=step)
    mismatched = split.mismatched_pairs(examples[sample.places])
    of_all = f" of {len(np.unique(split.kl_group_of[examples]))} KL groups, of which loss.kl_fraction draws {len(sample.weights)}" if sample.averages is not None else ""
    size = config.batch.sequence_parallel_size
    passes = [("policy pass, matched pairs", examples, config.batch.max_tokens_per_microbatch), (f"KL pass, mismatched pairs{of_all}", mismatched, config.batch.scoring_tokens)]
    for title, pairs, max_tokens in passes:
        if pairs is not examples and config.loss.loss_type != "kto":
            console.print(Text(f"\nno KL pass: {config.loss.loss_type} holds the reference point at 0"))
            continue
        alone = int((split.prompt_lengths[split.pair_prompts[pairs]] + split.pair_lengths[pairs]).sum())
        fills = fills_of(pairs, split, layout=layout, max_tokens=size * max_tokens, num_ranks=max(1, num_ranks // size))
        title += f"; each rank stands for {size} that share its rows" if size > 1 else ""
        title += "; the bars count padding" if layout == "padded" else ""
        console.print(fill_table(title, fills, num_prompts=len(np.unique(split.pair_prompts[pairs])), max_tokens=size * max_tokens, ascii_only=console.options.ascii_only))
        if saved := alone - sum(fill.tokens for fill in fills):
            console.print(Text(f"shared prompts save {saved:,} of {alone:,} tokens ({saved / alone:.0%})"))
    try:
        require_fit(split.longest_pair_tokens, config.batch.max_tokens_per_microbatch, "batch.max_tokens_per_microbatch", group_size=size)
    except UserError as error:
        console.print(Text(f"\nnotice: train will refuse this split. {error}"), soft_wrap=True)


def fills_of(pairs: np.ndarray, split: TokenizedSplit, *, layout: Layout, max_tokens: int, num_ranks: int) -> list[Fill]:
    """Return every micro-batch that `pairs` [N] become, rank by rank, fillers included."""
    shares = Sharding(layout, max_tokens, 0, num_ranks, torch.device("cpu")).shares(pairs, split)
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
