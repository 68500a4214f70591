"""The config as text: YAML in and out, keys by name, and pydantic's findings as one message."""

import difflib
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from kto_ds.config import RunConfig, SourceConfig
from kto_ds.errors import UserError, excerpt

SEE_HELP = "kto-ds train --help says what every key takes"


def read_yaml(path: Path) -> dict:
    """Return the mapping in the YAML 1.2 file at `path`; duplicate keys and tags that build objects are errors."""
    try:
        values = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the config: {error.strerror}", where=str(path), remedy="give the path of a YAML file with --config") from error
    except (YAMLError, ValueError, RecursionError) as error:  # numbers and dates that are none are let out as ValueError
        raise UserError(f"not valid YAML: {' '.join(str(error).split())}", where=str(path)) from error
    if not isinstance(values, dict):
        raise UserError(f"expected a mapping of sections, found {excerpt(values)}", where=str(path))
    if odd := [key for key in values if not isinstance(key, str)]:
        raise UserError(f"expected the name of a section, found {excerpt(odd[0])}", where=str(path), remedy=SEE_HELP)
    return values


def write_yaml(config: RunConfig, stream) -> None:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    yaml.dump(config.model_dump(mode="json"), stream)


def known_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of the config, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from known_keys(field.annotation, f"{prefix}{name}.")


def nearest_key(key: str) -> str:
    """Return a hint with the known key most like `key`: in its own section first, then by its last part anywhere."""
    section, _, leaf = key.rpartition(".")
    known = list(known_keys())
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    if section.startswith(("data.train.", "data.eval.")):
        siblings = {name: f"{section}.{name}" for name in SourceConfig.model_fields}
    anywhere = {name.rpartition(".")[2]: name for name in reversed(known)}
    for candidates, cutoff in ((siblings, 0.6), (anywhere, 0.75), (siblings, 0.0), (anywhere, 0.0)):
        if close := difflib.get_close_matches(leaf, candidates, n=1, cutoff=cutoff):
            return f"did you mean {candidates[close[0]]}?" if cutoff else f"the nearest known key is {candidates[close[0]]}; all keys: kto-ds train --help"
    raise AssertionError("the config has keys")


def explain(error: ValidationError, where: str) -> UserError:
    """Turn pydantic's findings into one message that names each key, what was found, what is expected, and what to do."""
    findings = [_explain_one(found) for found in error.errors()]
    if len(findings) == 1:
        return UserError(findings[0][0], where=where, remedy=findings[0][1])
    lines = [f"{what}; {remedy}" if remedy != SEE_HELP else what for what, remedy in findings]
    return UserError("\n  ".join([f"{len(lines)} keys cannot be used", *lines]), where=where, remedy=SEE_HELP)


def _explain_one(found: dict) -> tuple[str, str]:
    """Return (what is wrong with which key, remedy); the checks of config.py say both in one text, with a semicolon between them."""
    # A part in angle brackets tells types of one key apart, and [key] a key from its value.
    key = ".".join(str(part) for part in found["loc"] if not str(part).startswith(("<", "[")))
    if found["type"] == "extra_forbidden":
        return f"{key}: unknown key", nearest_key(key)
    if found["type"] == "missing":
        return f"{key}: required, but not set", f"set {key} in the file, or give --{key}"
    message, _, remedy = found["msg"].removeprefix("Value error, ").partition("; ")
    return f"{key}: {message}; found {excerpt(found['input'])}" if key else message, remedy or SEE_HELP
