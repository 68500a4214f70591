"""Thumbs up or thumbs down, as a row says it. Only true and false count, unless the source's label_map says what else does."""

import json
import math

import numpy as np

from kto_ds.errors import UserError, excerpt

MEANING = "true marks a desirable completion, false an undesirable one"


def to_label(value: object, name: str, where: str, label_map: dict | None) -> bool:
    """Return whether the completion is desirable. `label_map` turns other values into true and false; its keys are compared as JSON text."""
    if isinstance(value, np.generic):
        value = value.item()
    if label_map:
        return _mapped(value, name, where, {_as_text(key): desirable for key, desirable in label_map.items()})
    if isinstance(value, bool):
        return value
    raise UserError(f"{name}: expected true or false, found {excerpt(value)}", where=where, remedy=_remedy(value))


def _mapped(value: object, name: str, where: str, label_map: dict[str | None, bool]) -> bool:
    text = _as_text(value)
    if text is None or text not in label_map:
        keys = ", ".join(excerpt(key) for key in label_map)
        remedy = f"add the value to label_map, or mend the row; {MEANING}"
        raise UserError(f"{name}: expected one of label_map's keys {keys}, found {excerpt(value)}", where=where, remedy=remedy)
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


def _remedy(value: object) -> str:
    if isinstance(value, str) and value in ("true", "false"):
        return f"{MEANING}; write it without quotes, or set label_map: {{true: true, false: false}} on the source"
    if str(_as_text(value)).lstrip("+-").isdigit():
        return f"{MEANING}; for numbers set label_map: {{1: true, 0: false}} on the source"
    if isinstance(value, str):
        return f"{MEANING}; for words set label_map on the source, such as label_map: {{good: true, bad: false}}"
    return MEANING
