"""Token ids of every record. The completion starts where the tokens of the prompt and of the whole text part ways."""

import json
from functools import partial

import datasets
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kto_ds.data.records import Messages, Record, common_length
from kto_ds.errors import UserError, excerpt

TOKEN_IDS = datasets.List(datasets.Value("int32"))
FEATURES = datasets.Features({"prompt_ids": TOKEN_IDS, "completion_ids": TOKEN_IDS, "boundary_merged": datasets.Value("bool")})


def load_tokenizer(path: str, *, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Return the tokenizer that lies at `path`, a folder or a hub name."""
    try:
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:
        # Damaged tokenizer files surface as KeyError, AttributeError or a bare Exception, not only as OSError and ValueError.
        found = f"{type(error).__name__}: {excerpt(str(error), limit=400)}"
        remedy = "give a folder with tokenizer files, or a hub name"
        raise UserError(f"cannot load the tokenizer {excerpt(path)}: {found}", where="model.path", remedy=remedy) from error


def tokenize_records(records: list[Record], tokenizer: PreTrainedTokenizerBase, *, num_proc: int | None) -> datasets.Dataset:
    """Return one row of `prompt_ids`, `completion_ids` and `boundary_merged` a record, in order, whatever `num_proc` is."""
    assert records, "there is nothing to tokenize"
    _check_tokenizer(tokenizer, records)
    # As JSON, because an Arrow column cannot hold text here and messages there; a table's dates and the like turn to text.
    rows = datasets.Dataset.from_dict({"record": [json.dumps((r.prompt, r.completion, r.where), default=str) for r in records]})
    return rows.map(
        partial(_tokenize_row, tokenizer=tokenizer),
        num_proc=None if num_proc is None else min(num_proc, len(records)),
        features=FEATURES,
        remove_columns="record",
        keep_in_memory=True,
        desc="tokenize",
    )


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, records: list[Record]) -> None:
    name = excerpt(tokenizer.name_or_path)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {name} has no eos_token", where="model.path", remedy="set eos_token in its tokenizer_config.json")
    conversation = next((record for record in records if isinstance(record.prompt, list)), None)
    if conversation and not tokenizer.chat_template:
        remedy = "add a chat_template.jinja to the tokenizer's folder, or give prompt and completion as plain text"
        raise UserError(f"a row of messages needs a chat template, and the tokenizer {name} has none", where=conversation.where, remedy=remedy)


def _tokenize_row(row: dict, *, tokenizer: PreTrainedTokenizerBase) -> dict:
    prompt, completion, where = json.loads(row["record"])
    if isinstance(prompt, str):
        prompt_ids, whole_ids = _tokenize_text(tokenizer, prompt=prompt, completion=completion)
    else:
        prompt_ids, whole_ids = _tokenize_messages(tokenizer, prompt=prompt, completion=completion, where=where)
    boundary = common_length(prompt_ids, whole_ids)
    if boundary == 0:
        raise UserError("no token of the prompt is left before the completion", where=where, remedy="end the prompt on a token boundary")
    if boundary == len(whole_ids):
        what = "no token of the completion is left after the prompt"
        raise UserError(f"{what}: {excerpt(completion)}", where=where, remedy="check that the chat template renders the last turn")
    return {"prompt_ids": prompt_ids[:boundary], "completion_ids": whole_ids[boundary:], "boundary_merged": boundary < len(prompt_ids)}


def _tokenize_text(tokenizer: PreTrainedTokenizerBase, *, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    whole_ids = tokenizer(prompt + completion)["input_ids"]
    if whole_ids[-1:] != [tokenizer.eos_token_id]:
        whole_ids = whole_ids + [tokenizer.eos_token_id]
    return tokenizer(prompt)["input_ids"], whole_ids


def _tokenize_messages(tokenizer: PreTrainedTokenizerBase, *, prompt: Messages, completion: Messages, where: str) -> tuple[list[int], list[int]]:
    try:
        return (
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False),
            tokenizer.apply_chat_template(prompt + completion, tokenize=True, return_dict=False),
        )
    except Exception as error:
        # A chat template is a program that comes with the tokenizer: it may raise anything, and its message is what the user needs.
        what = f"the chat template refuses the row: {type(error).__name__}: {excerpt(str(error), limit=400)}"
        raise UserError(what, where=where, remedy="mend the row, or use a chat template that renders it") from error
