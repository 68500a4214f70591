"""The one shape that every row is brought to, checked before anything is tokenized. SHAPES lists the rows that are read."""

from collections.abc import Sequence
from dataclasses import dataclass

from kto_ds.errors import UserError, excerpt

Messages = list[dict]

SHAPES = {
    "prompt, completion and label": {"prompt", "completion", "label"},
    "chosen and rejected, with a prompt or with a common start": {"chosen", "rejected"},
    "messages and label": {"messages", "label"},
}


@dataclass(frozen=True)
class Record:
    """One example. Prompt and completion are both plain text, or both messages with at least role and content."""

    prompt: str | Messages
    completion: str | Messages
    desirable: bool
    where: str


def to_records(row: dict, where: str) -> list[Record]:
    """Return the one record of a labelled row, or the two of a paired row, the desirable one first."""
    fields = _shape_of(row, where)
    if "chosen" in fields:
        prompt, chosen, rejected = _split_pair(row, where)
        desirable = _record(prompt=prompt, completion=chosen, field="chosen", desirable=True, where=where)
        return [desirable, _record(prompt=prompt, completion=rejected, field="rejected", desirable=False, where=where)]
    label = _label(row, where)
    if "messages" in fields:
        prompt, completion = _split_last_turn(row, where)
        return [_record(prompt=prompt, completion=completion, field="messages", desirable=label, where=where)]
    prompt, completion = _content(row, "prompt", where), _content(row, "completion", where)
    return [_record(prompt=prompt, completion=completion, field="completion", desirable=label, where=where)]


def common_length(left: Sequence, right: Sequence) -> int:
    """Return how many leading elements two sequences share."""
    differing = (index for index, (one, other) in enumerate(zip(left, right)) if one != other)
    return next(differing, min(len(left), len(right)))


def _shape_of(row: dict, where: str) -> set[str]:
    # Tables fill the cells that a row does not have with null.
    present = {field for field, value in row.items() if value is not None}
    fits = [shape for shape, fields in SHAPES.items() if fields <= present]
    if not fits:  # a row that lacks nothing but its label is told so
        fits = [shape for shape, fields in SHAPES.items() if fields - {"label"} <= present]
    if not fits:
        empty = sorted(row.keys() - present)
        found = f"found {excerpt(list(row))}" + (f", of which {excerpt(empty)} null" if empty else "")
        raise UserError(f"fields of no known shape: {found}", where=where, remedy=f"give {'; or '.join(SHAPES)}")
    if len(fits) > 1:
        raise UserError(f"fields of more than one shape: {'; '.join(fits)}", where=where, remedy="keep the fields of one shape")
    return SHAPES[fits[0]]


def _label(row: dict, where: str) -> bool:
    label = row.get("label")
    if isinstance(label, bool):
        return label
    found = f"found {excerpt(label)}" if "label" in row else "the field is missing"
    raise UserError(f"label: expected true or false, {found}", where=where, remedy="true marks a desirable completion, false an undesirable one")


def _content(row: dict, field: str, where: str) -> str | Messages:
    value = row[field]
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return [_message(message, f"{field}[{index}]", where) for index, message in enumerate(value)]
    raise UserError(f"{field}: expected text or a list of messages, found {excerpt(value)}", where=where)


def _message(message: object, name: str, where: str) -> dict:
    if not isinstance(message, dict):
        raise UserError(f"{name}: expected a message with role and content, found {excerpt(message)}", where=where)
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise UserError(f"{name}: expected {key} to be text, found {excerpt(message)}", where=where)
    # Chat templates may read more than role and content; null is how tables write a key that is not there.
    return {key: value for key, value in message.items() if value is not None}


def _split_last_turn(row: dict, where: str) -> tuple[Messages, Messages]:
    messages = _content(row, "messages", where)
    if not isinstance(messages, list):
        raise UserError(f"messages: expected a list of messages, found {excerpt(messages)}", where=where)
    return messages[:-1], messages[-1:]


def _split_pair(row: dict, where: str) -> tuple[str | Messages, str | Messages, str | Messages]:
    chosen, rejected = _content(row, "chosen", where), _content(row, "rejected", where)
    if type(chosen) is not type(rejected):
        raise UserError(f"chosen and rejected: expected both as text or both as messages, found rejected {excerpt(rejected)}", where=where)
    prompt = None if row.get("prompt") is None else _content(row, "prompt", where)
    # UltraFeedback repeats as plain text the prompt that its conversations start with.
    is_repeated = isinstance(prompt, str) and isinstance(chosen, list)
    if prompt is not None and not is_repeated:
        return prompt, _without_prompt(chosen, prompt=prompt), _without_prompt(rejected, prompt=prompt)
    length = common_length(chosen, rejected)
    if chosen[length - 1 : length] == " ":
        length -= 1  # most vocabularies join a space to the word after it
    if not 0 < length < min(len(chosen), len(rejected)):
        what = "without a prompt of the same kind they must start alike and then differ"
        raise UserError(f"chosen and rejected: {what}, found {excerpt(chosen)} and {excerpt(rejected)}", where=where)
    if is_repeated and prompt not in [message["content"] for message in chosen[:length]]:
        raise UserError(f"prompt: not a message that both chosen and rejected start with, found {excerpt(prompt)}", where=where)
    return chosen[:length], chosen[length:], rejected[length:]


def _without_prompt(whole: str | Messages, *, prompt: str | Messages) -> str | Messages:
    repeats_prompt = isinstance(whole, list) and whole[: len(prompt)] == prompt
    return whole[len(prompt) :] if repeats_prompt else whole


def _record(*, prompt: str | Messages, completion: str | Messages, field: str, desirable: bool, where: str) -> Record:
    if type(prompt) is not type(completion):
        raise UserError(f"prompt and {field}: expected both as text or both as messages, found prompt {excerpt(prompt)}", where=where)
    if not _plain(prompt).strip():
        raise UserError(f"prompt: empty, found {excerpt(prompt)}", where=where, remedy="give every completion a prompt")
    for message in completion if isinstance(completion, list) else []:
        if message["role"] != "assistant":
            raise UserError(f"{field}: expected an assistant turn as the completion, found {excerpt(message)}", where=where)
    if not _plain(completion).strip():
        raise UserError(f"{field}: the completion is empty, found {excerpt(completion)}", where=where, remedy="mend or remove the row")
    return Record(prompt=prompt, completion=completion, desirable=desirable, where=where)


def _plain(content: str | Messages) -> str:
    return content if isinstance(content, str) else "".join(message["content"] for message in content)
