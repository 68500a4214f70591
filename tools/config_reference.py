"""Write docs/config.md, every key of a run's config, from the schema itself."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kto_ds.config import RunConfig
from kto_ds.stages.resume import ALLOWED, FIXED

PAGE = Path(__file__).resolve().parent.parent / "docs" / "config.md"
HEAD = """\
# Every key of a config

Made from the schema by `python tools/config_reference.py`; `kto-ds <command> --help` says the same. A key is set in RUN.yaml, or as an option: `--optim.learning_rate 5e-7`.
An unknown key, or a value of another kind, is an error that names the nearest key. `kto-ds train --config RUN.yaml --print-config` prints all of them with the values of a run.

The last column says what a run that goes on from a checkpoint does when the key has another value than before: *fixed* refuses, *flag* asks for `--accept-changes`, nothing says what changed and goes on; but a
change of rows, limits, template or reference is refused all the same, by the digests of what was trained on.
"""
KINDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}
SIGNS = {Ge: "≥", Gt: ">", Le: "≤", Lt: "<"}


def page() -> str:
    """Return the page as Markdown."""
    lines, headings = [HEAD], set()
    for key, *columns in rows(RunConfig):
        heading = key.split(".")[0] if "." in key else "the run"
        if heading not in headings:
            headings.add(heading)
            lines.append(f"\n## {heading}\n\n| key | value | default | what it does | resume |\n|---|---|---|---|---|")
        lines.append(f"| `{key}` | {' | '.join(columns)} |")
    return "\n".join(lines) + "\n"


def rows(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str, str, str]]:
    """Yield (key, kind, default, description, what a resume does) of every key of a section and of those below."""
    schema = section.model_json_schema()
    for name, field in section.model_fields.items():
        key, below = f"{prefix}{name}", _section(field.annotation)
        if below is None or field.description:  # a section that may be left out as a whole has a description
            kind = "section" if below else _kind(schema["properties"][name], schema) + _bounds(field)
            default = "**required**" if field.is_required() else f"`{json.dumps(schema['properties'][name].get('default'))}`"
            yield key, kind, default, field.description.replace("|", "\\|").replace("<", "&lt;"), _on_resume(key)
        if below is not None:
            yield from rows(below, f"{key}.")


def _section(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a key is, or may be; None for a key that has a value of its own."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else [annotation]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _kind(part: dict, schema: dict) -> str:
    if inner := part.get("anyOf") or part.get("oneOf"):
        return " or ".join(_kind(one, schema) for one in inner)
    if "enum" in part:
        return ", ".join(f"`{value}`" for value in part["enum"])
    if "const" in part:
        return f"`{part['const']}`"
    if "$ref" in part:
        keys = schema["$defs"][part["$ref"].rpartition("/")[2]].get("properties")
        return f"`{{{', '.join(keys)}}}`" if keys else "any value"
    if part["type"] == "array":
        return f"list of {_kind(part['items'], schema)}"
    if part["type"] == "object":
        return f"mapping of names to {_kind(part['additionalProperties'], schema)}"
    return KINDS[part["type"]]


def _bounds(field: FieldInfo) -> str:
    """Return the limits of a number, which may be one of several kinds of value, such as ` (> 0)`."""
    limits, todo = {}, [*field.metadata, field.annotation]
    while todo:
        part = todo.pop(0)
        if type(part) in SIGNS:
            limits[type(part)] = dataclasses.astuple(part)[0]  # of two of a kind the later one is the narrower
        todo += part.metadata if isinstance(part, FieldInfo) else [*get_args(part)[:1], *part.__metadata__] if get_origin(part) is Annotated else get_args(part)
    return f" ({', '.join(f'{SIGNS[kind]} {limit}' for kind, limit in limits.items())})" if limits else ""


def _on_resume(key: str) -> str:
    return next((word for word, keys in (("fixed", FIXED), ("flag", ALLOWED)) if any(f"{key}.".startswith(f"{listed}.") for listed in keys)), "")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
