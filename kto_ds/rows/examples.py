"""Prompt, completion and label of every example in a row, as the row has them. What records ask of them besides: records.py."""

from collections.abc import Sequence
from typing import NamedTuple

from kto_ds.errors import UserError, excerpt
from kto_ds.rows.labels import MEANING, expected_labels, to_label
from kto_ds.rows.messages import AS_MESSAGES, Messages, text_message, to_message, to_messages
from kto_ds.rows.shapes import Row, Shape, columns_hint, text_of


class Example(NamedTuple):
    prompt: str | Messages
    completion: str | Messages
    desirable: bool
    name: str  # of the field with the completion


def read_examples(row: Row, shape: Shape) -> list[Example]:
    """Return what the row holds: one example, the two of a pair with the desirable one first, or one for every rated turn."""
    if "rejected" in shape.needs:
        return _pair(row, *_split_pair(row, shape), fields=("chosen", "rejected"), first_is_desirable=True)
    if "messages" in shape.needs:
        return _turns(row)
    label = to_label(row.values["label"], row.name("label"), row.where, row.rules.label_map) if "label" in row.values else _refuse_no_label(row)
    if "instruction" in shape.needs:
        return [Example(_instruction(row), [text_message("assistant", text_of(row, "output"))], label, row.name("output"))]
    prompt = _content(row, "prompt")
    if "output_A" in shape.needs:
        return _pair(row, prompt, _answer(row, "output_A", prompt), _answer(row, "output_B", prompt), fields=("output_A", "output_B"), first_is_desirable=label)
    if "output" in shape.needs:
        return [Example(prompt, _answer(row, "output", prompt), label, row.name("output"))]
    return [Example(prompt, _content(row, "completion"), label, row.name("completion"))]


# labels


def _refuse_no_label(row: Row, besides: str = "") -> bool:
    columns = row.rules.columns
    names = [columns[name] for name in ("label", "kto_tag") if name in columns] or ["label", "kto_tag"]
    found = "the field is missing" if row.raw.keys().isdisjoint(names) else "found null"
    name = "kto_tag" if found == "found null" and names[0] not in row.raw else row.name("label")
    hint = columns_hint(row, ["label"])
    if found == "found null":
        hint = "give the row a label, or remove it"
    elif besides and any(names[0] in message for message in row.values["messages"]):
        hint = "columns does not reach into turns: there the label is called label"
    raise UserError(f"{name}: {expected_labels(row.rules.label_map)}, {found}{besides}", where=row.where, remedy=f"{MEANING}; {hint}" if hint else MEANING)


def _turns(row: Row) -> list[Example]:
    """Read a conversation: a label for the last turn, a list of labels for the assistant's turns, or labels inside these."""
    messages, name = _conversation(row), row.name("messages")
    label, label_name = row.values.get("label"), row.name("label")
    rated = {index: message["label"] for index, message in enumerate(messages) if "label" in message}
    if rated:
        messages = [{key: value for key, value in message.items() if key != "label"} for message in messages]
        index = next(iter(rated))
        if label is not None:
            what = f"{label_name}: the row has a label and {name}[{index}] one of its own, found {excerpt(label)} and {excerpt(rated[index])}"
            raise UserError(what, where=row.where, remedy="label the row, or its turns")
        if wrong := [index for index in rated if messages[index]["role"] != "assistant"]:
            what = f"{name}[{wrong[0]}]: only assistant turns can have a label, found {excerpt(rated[wrong[0]])}"
            raise UserError(what, where=row.where, remedy="remove it, or write null")
        names = {index: f"{name}[{index}].label" for index in rated}
    elif isinstance(label, list):
        rated = _listed_labels(label, label_name, messages, row.where)
        names = {index: label_name for index in rated}
    elif label is None:
        _refuse_no_label(row, besides=f", and no assistant turn of {name} has a label")
    else:
        desirable = to_label(label, label_name, row.where, row.rules.label_map)
        return [Example(messages[:-1], messages[-1:], desirable, name)]
    labels = {index: to_label(value, names[index], row.where, row.rules.label_map) for index, value in rated.items()}
    return [Example(messages[:index], [messages[index]], desirable, f"{name}[{index}]") for index, desirable in labels.items()]


def _listed_labels(labels: list, name: str, messages: Messages, where: str) -> dict[int, object]:
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    remedy = f"give one entry for every assistant turn: true, false, or null for one that nobody rated; {MEANING}"
    if len(labels) != len(turns):
        raise UserError(f"{name}: expected true or false, found {excerpt(labels)}; entries: {len(labels)}, assistant turns: {len(turns)}", where=where, remedy=remedy)
    rated = {turn: label for turn, label in zip(turns, labels) if label is not None}
    if not rated:
        raise UserError(f"{name}: no turn is rated, found {excerpt(labels)}", where=where, remedy=remedy)
    return rated


# prompts and completions


def _content(row: Row, field: str) -> str | Messages:
    value, name = row.values[field], row.name(field)
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return to_messages(value, name, row.where)
    raise UserError(f"{name}: expected text or a list of messages, found {excerpt(value)}", where=row.where, remedy=f"write text; or {AS_MESSAGES}")


def _conversation(row: Row) -> Messages:
    value, name = row.values["messages"], row.name("messages")
    if not isinstance(value, list):
        raise UserError(f"{name}: expected a list of messages, found {excerpt(value)}", where=row.where, remedy=AS_MESSAGES)
    return to_messages(value, name, row.where)


def _answer(row: Row, field: str, prompt: str | Messages) -> str | Messages:
    """Read an answer to `prompt`, which may be text to messages too."""
    answer = _content(row, field)
    return [text_message("assistant", answer)] if isinstance(answer, str) and isinstance(prompt, list) else answer


def _instruction(row: Row) -> Messages:
    history, name = row.values.get("history", []), row.name("history")
    is_dialogue = isinstance(history, list) and all(isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in history)
    if not is_dialogue:
        what = f"{name}: expected a list of [question, answer], found {excerpt(history)}"
        raise UserError(what, where=row.where, remedy='write it as [["question", "answer"], ...], each of them text')
    turns = [text_message(role, text) for pair in history for role, text in zip(("user", "assistant"), pair)]
    request = "\n".join(filter(None, (text_of(row, "instruction"), text_of(row, "input"))))
    if not request.strip():
        raise UserError(f"{row.name('instruction')}: empty, found {excerpt(request)}", where=row.where, remedy="give every completion an instruction")
    return [*turns, text_message("user", request)]


# pairs


def _pair(row: Row, prompt: str | Messages, *answers: str | Messages, fields: tuple[str, str], first_is_desirable: bool) -> list[Example]:
    names = [row.name(field) for field in fields]
    if answers[0] == answers[1]:
        what = f"{names[0]} and {names[1]} are the same, found {excerpt(answers[0])}"
        raise UserError(what, where=row.where, remedy="remove the row: one answer cannot be both better and worse")
    examples = [Example(prompt, answer, desirable, name) for answer, name, desirable in zip(answers, names, (first_is_desirable, not first_is_desirable))]
    return examples if first_is_desirable else examples[::-1]


def _split_pair(row: Row, shape: Shape) -> tuple[str | Messages, str | Messages, str | Messages]:
    if "instruction" in shape.needs:
        chosen, rejected = ([text_message("assistant", text_of(row, field))] for field in ("chosen", "rejected"))
        return _instruction(row), chosen, rejected
    chosen, rejected = _side(row, "chosen"), _side(row, "rejected")
    both = f"{row.name('chosen')} and {row.name('rejected')}"
    if isinstance(chosen, str) is not isinstance(rejected, str):
        what = f"{both}: expected both as text or both as messages, found rejected {excerpt(rejected)}"
        raise UserError(what, where=row.where, remedy="write both in the same form")
    if "messages" in shape.needs:
        prompt = _conversation(row)
    else:
        prompt = _content(row, "prompt") if "prompt" in shape.needs else None
    # UltraFeedback repeats as plain text the prompt that its conversations start with.
    is_repeated = isinstance(prompt, str) and isinstance(chosen, list)
    if prompt is not None and not is_repeated or chosen == rejected:
        return prompt or "", _without_prompt(chosen, prompt=prompt), _without_prompt(rejected, prompt=prompt)
    length = _common_length(chosen, rejected)
    if chosen[length - 1 : length] == " ":
        length -= 1  # most vocabularies join a space to the word after it
    if not 0 < length < min(len(chosen), len(rejected)):
        what = "without a prompt of the same kind they must start alike and then differ"
        raise UserError(f"{both}: {what}, found {excerpt(chosen)} and {excerpt(rejected)}", where=row.where, remedy="give the row a prompt, in the form of its answers")
    if is_repeated and prompt not in [message.get("content") for message in chosen[:length]]:
        what = f"{row.name('prompt')}: not a message that both chosen and rejected start with, found {excerpt(prompt)}"
        raise UserError(what, where=row.where, remedy="write the prompt as messages, or leave it out")
    return chosen[:length], chosen[length:], rejected[length:]


def _side(row: Row, field: str) -> str | Messages:
    value = row.values[field]
    is_message = isinstance(value, dict) and ("role" in value or "from" in value)
    return [to_message(value, row.name(field), row.where)] if is_message else _content(row, field)


def _without_prompt(whole: str | Messages, *, prompt: str | Messages | None) -> str | Messages:
    repeats_prompt = isinstance(whole, list) and isinstance(prompt, list) and whole[: len(prompt)] == prompt
    return whole[len(prompt) :] if repeats_prompt else whole


def _common_length(left: Sequence, right: Sequence) -> int:
    """Return how many leading elements two sequences share."""
    if isinstance(left, str):  # halving what is in doubt compares slices, a thousand times as fast as single characters
        low, high = 0, min(len(left), len(right))
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if left[low:middle] == right[low:middle] else (low, middle - 1)
        return low
    differing = (index for index, (one, other) in enumerate(zip(left, right)) if one != other)
    return next(differing, min(len(left), len(right)))
