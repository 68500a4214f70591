"""rows -> records -> tokens -> KL groups -> dataset artefact."""

import json
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from kto_ds.artifacts import describe_folder, seal, staged_folder
from kto_ds.config import RunConfig, SourceConfig
from kto_ds.data.assemble import Assembled, assemble_split
from kto_ds.data.records import Record, to_records
from kto_ds.data.sources import read_rows
from kto_ds.data.tokenization import tokenize_records
from kto_ds.errors import UserError
from kto_ds.model.support import longest_servable, read_model_config
from kto_ds.runtime.deepspeed_config import read_deepspeed_config
from kto_ds.stages.identity import dataset_identity, library_versions, run_tokenizer


def main(config: RunConfig) -> None:
    model_config = read_model_config(config.model)
    read_deepspeed_config(config.deepspeed.config)  # a mistake there should not wait for train
    tokenizer = run_tokenizer(config)
    identity = dataset_identity(config, tokenizer)

    splits = {"train": _prepare_split(config, "train", config.data.train, tokenizer)}
    if config.data.eval:
        splits["eval"] = _prepare_split(config, "eval", config.data.eval, tokenizer)
    for assembled in splits.values():
        _require_fit(assembled, vocab_size=model_config.vocab_size, longest_servable=longest_servable(model_config))

    report = {name: assembled.report for name, assembled in splits.items()}
    with staged_folder(config.dataset_dir) as folder:
        for name, assembled in splits.items():
            assembled.split.save(folder / name)
        (folder / "data_report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        manifest = {"kind": "dataset", "identity": identity, "splits": list(splits), "libraries": library_versions()}
        seal(folder, manifest, describe_folder(folder))
    _print_report(report)
    print(f"dataset artefact: {config.dataset_dir}")


def _prepare_split(config: RunConfig, name: str, sources: list[SourceConfig], tokenizer: PreTrainedTokenizerBase) -> Assembled:
    records = list(_read_records(sources))
    tokens = tokenize_records(records, tokenizer, num_proc=config.data.dataset_num_proc)
    assembled = assemble_split(
        tokens["prompt_ids"][:],
        tokens["completion_ids"][:],
        desirable=[record.desirable for record in records],
        row_names=[record.where for record in records],
        max_length=config.data.max_length,
        kl_group_size=config.data.kl_group_size,
        max_group_examples=config.batch.global_batch_size,
        shuffle=config.data.shuffle,
        seed=config.seed,
        where=f"data.{name}",
    )
    if tokenizer.chat_template and all(isinstance(record.prompt, str) for record in records):
        print(f"{name}: notice: rows are plain text, joined as they are and ended by {tokenizer.eos_token}; the tokenizer's chat template is for rows of messages")
    assembled.report["boundary_merges"] = sum(tokens["boundary_merged"][:])
    return assembled


def _read_records(sources: list[SourceConfig]) -> Iterator[Record]:
    for source in sources:
        for where, row in read_rows(source.path, source.split):
            yield from to_records(row, where)


def _require_fit(assembled: Assembled, *, vocab_size: int, longest_servable: int | None) -> None:
    """Refuse ids that the model has no embedding for, and sequences longer than it serves."""
    largest = int(max(assembled.split.prompt_tokens.max(), assembled.split.completion_tokens.max()))
    if largest >= vocab_size:
        raise UserError(f"the tokenizer gives id {largest}, the model has {vocab_size} embeddings", where="model.path", remedy="use the tokenizer that belongs to the model")
    longest = assembled.report["longest_tokens"]
    if longest_servable and longest > longest_servable:
        raise UserError(f"a sequence has {longest} tokens, the model has only {longest_servable} positions to use", where="data.max_length", remedy=f"set it to {longest_servable} or less")


def _print_report(report: dict) -> None:
    for name, counts in report.items():
        print(
            f"{name}: {counts['examples']:,} examples ({counts['desirable']:,} desirable, {counts['undesirable']:,} undesirable) of {counts['rows']:,} rows, "
            f"{counts['distinct_prompts']:,} prompts, {counts['tokens']:,} tokens, {counts['kl_groups']:,} KL groups"
        )
        if counts["dropped_prompt_fills_max_length"]:
            print(f"  dropped: {counts['dropped_prompt_fills_max_length']:,} rows whose prompt fills max_length")
        if counts["truncated_completions"]:
            print(f"  truncated: {counts['truncated_completions']:,} completions lost their end")
        if counts["boundary_merges"]:
            print(f"  merged: in {counts['boundary_merges']:,} rows the completion begins inside the prompt's last token")
        if not (counts["desirable"] and counts["undesirable"]):
            print("  warning: all rows have the same label; KTO learns little from one side")
