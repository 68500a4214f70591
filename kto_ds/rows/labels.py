"""Thumbs up or thumbs down, as a row says it. Only true and false count, unless the source's label_map says what else does."""

import json
import math

import numpy as np

from kto_ds.errors import UserError, excerpt

MEANING = "true marks a desirable completion, false an undesirable one"
# Words that a remedy can be made of: the one for a desirable completion, and the other.
OPPOSITES = (
    ("true", "false"), ("yes", "no"), ("up", "down"), ("good", "bad"), ("positive", "negative"), ("like", "dislike"), ("liked", "disliked"), ("accepted", "rejected"),
    ("right", "wrong"), ("correct", "incorrect"), ("thumbs_up", "thumbs_down"), ("\N{THUMBS UP SIGN}", "\N{THUMBS DOWN SIGN}"),
)  # fmt: skip
MAX_PASTED = 60  # characters of a label in a remedy


def shown(value: object) -> str:
    """Return a value for a message: null, booleans and numbers as JSON writes them, all else as `excerpt` does."""
    if isinstance(value, np.generic):
        value = value.item()
    return json.dumps(value) if value is None or isinstance(value, (bool, float)) else excerpt(value)


def expected_labels(label_map: dict | None) -> str:
    """Return what a label may be, for a message."""
    if not label_map:
        return "expected true or false"
    return f"expected one of label_map's keys {', '.join(excerpt(_as_text(key)) for key in label_map)}"


def to_label(value: object, name: str, where: str, label_map: dict | None) -> bool:
    """Return whether the completion is desirable. `label_map` turns other values into true and false; its keys are compared as JSON text."""
    if isinstance(value, np.generic):
        value = value.item()
    if label_map:
        return _mapped(value, name, where, {_as_text(key): desirable for key, desirable in label_map.items()})
    if isinstance(value, bool):
        return value
    raise UserError(f"{name}: {expected_labels(None)}, found {shown(value)}", where=where, remedy=_remedy(value))


def _mapped(value: object, name: str, where: str, label_map: dict[str | None, bool]) -> bool:
    text = _as_text(value)
    if text is None or text not in label_map:
        remedy = f"add the value to label_map, or mend the row; {MEANING}"
        if text is not None and len(text) <= MAX_PASTED:
            # Which of the two it is the user must say: a map may well call 0 desirable.
            remedy = f"add {_quoted(text)}: true to label_map for a desirable completion, {_quoted(text)}: false for an undesirable one; or mend the row"
        raise UserError(f"{name}: {expected_labels(label_map)}, found {shown(value)}", where=where, remedy=remedy)
    return label_map[text]


def _as_text(value: object) -> str | None:
    """Return JSON's text of a label, 1 for 1.0 too, or None for what cannot be one."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (bool, int)):
        return json.dumps(value)
    if isinstance(value, float):
        return None if math.isnan(value) else json.dumps(value)
    return str(value) if isinstance(value, str) else None


def _quoted(text: str) -> str:
    """Return a text as a key in YAML that is a text there too: without quotes TRUE is a boolean, and an emoji may not be shown as it is."""
    escaped = text.encode("unicode_escape").decode("ascii").replace('"', '\\"')
    return f'"{escaped}"'


def _opposites(text: str) -> tuple[str, str] | None:
    """Return the pair of words that `text` is one of, written in its case."""
    for pair in OPPOSITES:
        if text.lower() in pair:
            cased = str.upper if text.isupper() else str.capitalize if text[0].isupper() else str.lower
            good, bad = (text if word == text.lower() else cased(word) for word in pair)
            return good, bad
    return None


def _remedy(value: object) -> str:
    text = _as_text(value)
    if text is None:
        return MEANING
    if text.lstrip("+-").isdigit():
        keys = "{1: true, -1: false}" if text == "-1" else "{1: true, 0: false}"
        others = "" if text in ("1", "0", "-1") else ", with every number that the table has"
        return f"{MEANING}; for numbers set label_map: {keys} on the source{others}"
    if not isinstance(value, str):
        return MEANING
    if words := _opposites(text):
        unquoted = "write it without quotes, or " if text in ("true", "false") else ""
        good, bad = map(_quoted, words)
        return f"{MEANING}; {unquoted}set label_map: {{{good}: true, {bad}: false}} on the source"
    return f"{MEANING}; for words set label_map on the source, such as label_map: {{good: true, bad: false}}"
