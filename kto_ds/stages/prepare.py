"""rows -> checked -> tokens -> KL groups -> dataset artefact. A killed run goes on where it was when the command is given again."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kto_ds.artifacts import describe_folder, seal
from kto_ds.config import LossConfig, RunConfig
from kto_ds.config_data import HELD_OUT, DataConfig, SourceConfig
from kto_ds.data.assemble import Grouping, Rows, SplitIndex, hold_out, index_split, read_index, repeat_by_weight, save_split
from kto_ds.data.balance import LARGEST_RATIO, LEAST_RATIO, TOLERANCE, recommended_weights, weight_ratio
from kto_ds.data.ingest import Problem, SourceFile, Summary, check_rows, refuse_bad_rows, rejected_rows, summarize, tokenize_rows
from kto_ds.data.segments import Limits
from kto_ds.data.dataset import REPORT
from kto_ds.data.split_report import source_reports, split_report
from kto_ds.data.tokenization import TextRules
from kto_ds.data.workers import TokenizerSource, Workers
from kto_ds.errors import UserError, excerpt
from kto_ds.model.support import longest_servable, read_model_config
from kto_ds.report.screen import WorkBar
from kto_ds.rows.records import RowRules
from kto_ds.runtime.deepspeed_config import check_zero_section, read_deepspeed_config
from kto_ds.runtime.signals import interruptible
from kto_ds.stages.identity import assembly_identity, library_versions, run_tokenizer, source_files, tokenization_identity
from kto_ds.staging import can_resume, claim_folder, require_own_place, resumable_folder

HELD_OUT_SPLIT = f"eval/{HELD_OUT}"
SEGMENTS = "segments"  # in the unfinished artefact
REJECTED = "rejected_rows.jsonl"
PARTS = {"train", "eval", REPORT, REJECTED}  # of a dataset artefact


# What a count of the report means to a user, where it is not 0.
REMARKS = {
    "rejected_rows": f"rejected rows: {{}} (they break a rule; listed in {REJECTED})",
    "dropped_examples": f"dropped examples: {{}} (beyond the length limits; listed in {REJECTED})",
    "truncated_prompts": "truncated prompts: {} (cut to data.max_prompt_length)",
    "truncated_completions": "truncated completions: {} (their end is lost, and with it the token that ends a turn)",
    "boundary_merges": "merged boundaries: {} (the completion begins inside the prompt's last token)",
    "special_token_text": "warning: examples whose text spells special tokens: {} (the tokenizer takes them for control tokens)",
    "control_characters": "warning: examples with control characters: {}",
    "duplicates": "warning: repeated examples: {} (prompt, completion and label of an earlier one)",
    "contradictions": "warning: examples whose prompt and completion occur with both labels: {}",
    "examples_with_training_prompts": "warning: examples whose prompt is trained on too: {}",
}


class Tokenized(NamedTuple):
    """What became of the sources listed under one name of the config."""

    sources: list[SourceConfig]
    files: list[SourceFile]
    segments: list[tuple[int, Path]]  # (index of the file, segment)
    summary: Summary


class Split(NamedTuple):
    tokenized: Tokenized
    rows: Rows  # once each
    index: SplitIndex


def main(config: RunConfig) -> None:
    with interruptible("what is tokenized so far is kept"):
        _prepare(config)


def _prepare(config: RunConfig) -> None:
    model_config = read_model_config(config.model)
    _require_positions(config.data.max_length, longest_servable(model_config))
    deepspeed_config = read_deepspeed_config(config.deepspeed.config)  # a mistake there should not wait for train
    check_zero_section(deepspeed_config.get("zero_optimization", {}), where=config.deepspeed.config)
    tokenizer = run_tokenizer(config)
    sources = {"train": config.data.train, **config.data.eval_splits}
    files = {name: _list_files(config, listed) for name, listed in sources.items()}
    libraries = library_versions()
    tokenization = tokenization_identity(config, tokenizer)
    resume_identity = {**tokenization, "libraries": libraries}
    require_own_place(config.dataset_dir, "dataset", lambda name: name in PARTS)
    claim_folder(config.output_dir)

    with Workers(_tokenizer_source(config), config.data.dataset_num_proc) as workers:
        if not can_resume(config.dataset_dir, resume_identity):
            for name, listed in files.items():
                _check(config.data, name, listed, workers)
        else:
            print("an earlier prepare was cut short: its work is gone on with")
        with resumable_folder(config.dataset_dir, resume_identity) as folder:
            tokenized = {}
            for name, listed in files.items():
                with _progress(f"tokenize {name}") as on_rows:
                    segments = tokenize_rows(listed, folder / SEGMENTS / name, _limits(config.data), workers, on_rows)
                tokenized[name] = Tokenized(sources[name], listed, segments, summarize(listed, segments))
            for name, found in tokenized.items():
                _require_usable(config.data, name, found.summary, vocab_size=model_config.vocab_size)
            splits = _assemble(config, tokenized)
            report = {name: _report(name, split, splits["train"]) for name, split in splits.items()}
            _write(folder, splits, report, tokenized)
            identity = {**tokenization, **assembly_identity(config)}
            manifest = {"kind": "dataset", "identity": identity, "splits": list(splits), "libraries": libraries}
            seal(folder, manifest, describe_folder(folder, besides=folder / SEGMENTS))
            shutil.rmtree(folder / SEGMENTS)
    _print_report(report, config.loss)
    print(f"dataset artefact: {config.dataset_dir}; look at it with kto-ds inspect")


def _list_files(config: RunConfig, sources: list[SourceConfig]) -> list[SourceFile]:
    return [
        SourceFile(path, source.split, RowRules(columns=source.columns, label_map=source.label_map), number)
        for number, source in enumerate(sources)
        for path in source_files(config, source)
    ]


def _tokenizer_source(config: RunConfig) -> TokenizerSource:
    data, model = config.data, config.model
    rules = TextRules(data.append_eos, data.special_tokens_in_text, data.chat_template_kwargs)
    return TokenizerSource(model.path, model.revision, model.trust_remote_code, rules)


def _limits(data: DataConfig) -> Limits:
    return Limits(data.max_length, data.max_prompt_length, data.max_completion_length, data.truncation_mode)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes numbers of rows."""
    with WorkBar(what, unit=" rows") as bar:
        yield bar.advance


def _check(data: DataConfig, name: str, files: list[SourceFile], workers: Workers) -> None:
    with _progress(f"check {name}") as on_rows:
        checked = check_rows(files, workers, on_rows)
    _refuse_too_many(data, checked.problems, checked.num_bad, checked.num_rows)


def _refuse_too_many(data: DataConfig, problems: list[Problem], num_bad: int, num_rows: int) -> None:
    if num_bad and (data.on_bad_row == "error" or num_bad > data.max_bad_fraction * num_rows):
        refuse_bad_rows(problems, num_bad, num_rows, max_bad_fraction=data.max_bad_fraction)


def _require_usable(data: DataConfig, name: str, found: Summary, *, vocab_size: int) -> None:
    """Refuse rows that only the tokenizer, its chat template or a limit found fault with, and tokens that the model does not know."""
    _refuse_too_many(data, found.problems, found.num_bad, found.num_rows)
    if found.num_bad and found.num_bad == found.num_rows:
        refuse_bad_rows(found.problems, found.num_bad, found.num_rows, max_bad_fraction=None)
    if found.first_dropped and not found.num_examples:
        where, reason = found.first_dropped
        remedy = "raise data.max_length, or cut the prompts by setting data.max_prompt_length"
        raise UserError(f"none of the {found.num_dropped:,} examples of data.{name} fits, the first: {reason}", where=where, remedy=remedy)
    if found.largest_id >= vocab_size:
        what = f"the tokenizer gives id {found.largest_id}, the model has {vocab_size} embeddings"
        raise UserError(what, where="model.path", remedy="use the tokenizer that belongs to the model")


def _assemble(config: RunConfig, tokenized: dict[str, Tokenized]) -> dict[str, Split]:
    data = config.data
    grouping = Grouping(data.max_length, data.kl_group_size, config.batch.global_batch_size, data.shuffle, config.seed)
    rows_of = {name: (found, read_index(found.segments)) for name, found in tokenized.items()}
    train, train_rows = rows_of["train"]
    if data.held_out_fraction is not None:
        is_held_out = hold_out(train_rows, data.held_out_fraction, config.seed)
        rows_of["train"] = train, train_rows.select(~is_held_out)
        rows_of[HELD_OUT_SPLIT] = train, train_rows.select(is_held_out)
    splits = {}
    for name, (found, rows) in rows_of.items():
        examples = rows
        if name == "train":
            source_of = np.array([file.source for file in found.files])[rows.file_of]
            examples = rows.select(repeat_by_weight(rows, source_of, [source.weight for source in found.sources], config.seed))
            _require_both_labels(examples, data.allow_one_label)
        where = "data.held_out_fraction" if name == HELD_OUT_SPLIT else f"data.{name.replace('/', '.')}"
        splits[name] = Split(found, rows, index_split(examples, grouping, where=where))
    return splits


def _require_both_labels(rows: Rows, allow_one_label: bool) -> None:
    num_desirable = int(rows.desirable.sum())
    if num_desirable in (0, len(rows.desirable)) and len(rows.desirable) and not allow_one_label:
        label = "desirable" if num_desirable else "undesirable"
        what = f"all {len(rows.desirable):,} examples are {label}: with one label KTO only moves all log-probs one way"
        raise UserError(what, where="data.train", remedy="add rows with the other label, or set data.allow_one_label: true")


def _require_positions(max_length: int, longest: int | None) -> None:
    """Refuse a limit beyond what the model serves before anything is tokenized under it."""
    if longest and max_length > longest:
        raise UserError(f"sequences may have {max_length} tokens, the model has only {longest} positions to use", where="data.max_length", remedy=f"set it to {longest} or less")


def _report(name: str, split: Split, train: Split) -> dict:
    """Return what data_report.json says about one split, its sources apart."""
    found = split.tokenized
    source_of_file = np.array([file.source for file in found.files])
    by_source = source_reports(split.rows, split.index, source_of_file, len(found.sources))
    # What was read for the held-out split was read for the training split, and is counted there.
    read = [{} if name == HELD_OUT_SPLIT else found.summary.by_source[number] for number in range(len(found.sources))]
    totals = {key: sum(counts[key] for counts in read) for key in read[0]}
    sources = [
        {"path": source.path, "split": source.split, "weight": source.weight, **counts, **more} for source, counts, more in zip(found.sources, read, by_source)
    ]
    train_keys = None if name == "train" else train.index.rows.prompt_keys
    return {**totals, **split_report(split.rows, split.index, train_keys), "unused_fields": sorted(found.summary.unused), "sources": sources}


def _write(folder: Path, splits: dict[str, Split], report: dict, tokenized: dict[str, Tokenized]) -> None:
    for name in ("train", "eval"):  # an attempt that was cut short while it wrote may have had other splits
        shutil.rmtree(folder / name, ignore_errors=True)
    for name, split in splits.items():
        places = split.tokenized.summary.places
        save_split(split.index, split.tokenized.segments, [places[file] for file in range(len(places))], folder / name)
    (folder / REPORT).write_text(json.dumps(report, indent=1), encoding="utf-8")
    with open(folder / REJECTED, "w", encoding="utf-8") as stream:
        for name, found in tokenized.items():
            stream.writelines(json.dumps({"split": name, **row}) + "\n" for row in rejected_rows(found.segments))


def _print_report(report: dict, loss: LossConfig) -> None:
    for name, counts in report.items():
        rows = "the training rows" if name == HELD_OUT_SPLIT else f"{counts['rows']:,} rows"
        print(
            f"{name}: {counts['examples']:,} examples ({counts['desirable']:,} desirable, {counts['undesirable']:,} undesirable) of {rows}, "
            f"{counts['distinct_prompts']:,} prompts, {counts['tokens']:,} tokens, {counts['kl_groups']:,} KL groups"
        )
        for line in _remarks(counts):
            print(f"  {line}")
        if name == "train" and (advice := _weights_advice(counts, loss)):
            print(f"  {advice}")


def _remarks(counts: dict) -> Iterator[str]:
    """Yield what a user should know about a split, one line each."""
    for key, remark in REMARKS.items():
        if count := counts.get(key):
            yield remark.format(f"{count:,}")
    if counts["unused_fields"]:
        yield f"unused: fields {', '.join(map(_printable, counts['unused_fields']))}"
    if not (counts["desirable"] and counts["undesirable"]):
        yield "warning: all examples have the same label"


def _printable(text: str) -> str:
    return text if text.isprintable() else excerpt(text)


def _weights_advice(counts: dict, loss: LossConfig) -> str:
    """Return what to do about labels that the weights of the loss leave out of balance, or nothing."""
    found = counts["desirable"], counts["undesirable"]
    if not all(found):
        return ""
    ratio = weight_ratio(*found, *recommended_weights(*found, loss.desirable_weight, loss.undesirable_weight))
    if LEAST_RATIO / TOLERANCE <= ratio <= LARGEST_RATIO * TOLERANCE:
        return ""
    desirable, undesirable = recommended_weights(*found, "auto", "auto")
    return (
        f"note: weighted by the loss, desirable examples count {ratio:.3g} times as much as undesirable ones, beyond 1 to 4/3 (arXiv 2402.01306, Eq. 8); "
        f"desirable_weight {desirable:.3g} and undesirable_weight {undesirable:.3g} would balance them, and so would auto"
    )
