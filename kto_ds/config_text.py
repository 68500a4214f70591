"""The config as text: YAML in and out, keys by name, and pydantic's findings as one message."""

import copy
import difflib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python
from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode

from kto_ds.config import RunConfig
from kto_ds.config_data import FIELDS, SourceConfig
from kto_ds.errors import UserError, excerpt
from kto_ds.redaction import redact_values

MAX_VALUES = 1_000_000  # of a config; a few lines of aliases within aliases stand for billions
SEE_HELP = "kto-ds <command> --help says what every key takes"
# What a remedy shows as the value of a key that takes a mapping, and of the keys of a source.
EXAMPLES = {
    "path": "rows.jsonl", "split": "train", "weight": 2, "columns": {"prompt": "question"}, "label_map": {"up": True, "down": False},
    "chat_template_kwargs": {"enable_thinking": False},
}  # fmt: skip
A_SOURCE = r"data\.(?:train|eval)(?:\..*)?\.\d+"


class _Constructor(SafeConstructor):
    def construct_mapping(self, node, deep=False):
        """Leave keys such as true and TRUE as they are written: to Python True and 1 are one key, and a table has its labels in its own case."""
        if isinstance(node, MappingNode):
            node.value = [(_as_written(key), value) for key, value in node.value]
        return super().construct_mapping(node, deep=deep)


def _as_written(key):
    if isinstance(key, ScalarNode) and key.tag == "tag:yaml.org,2002:bool":
        return ScalarNode("tag:yaml.org,2002:str", key.value, key.start_mark, key.end_mark)
    return key


def read_yaml(path: Path) -> dict:
    """Return the mapping in the YAML 1.2 file at `path`; duplicate keys and tags that build objects are errors. Keys are never booleans."""
    yaml, text = YAML(typ="safe", pure=True), ""
    yaml.Constructor = _Constructor
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.load(text)
    except OSError as error:
        raise UserError(f"cannot read the config: {error.strerror}", where=str(path), remedy="give the path of a YAML file with --config") from error
    except (YAMLError, ValueError, RecursionError) as error:  # numbers and dates that are none are let out as ValueError
        raise _not_yaml(error, path, text) from error
    if _num_values(values) > MAX_VALUES:
        what = f"its aliases (*name) stand for more than {MAX_VALUES:,} values"
        raise UserError(what, where=str(path), remedy="write a config without aliases within aliases")
    if not isinstance(values, dict):
        remedy = _looks_like_data(path, text) or "give a YAML config, with sections such as model: {path: some/model}"
        raise UserError(f"expected a mapping of sections, found {excerpt(values)}", where=str(path), remedy=remedy)
    if odd := [key for key in values if not isinstance(key, str)]:
        raise UserError(f"expected the name of a section, found {excerpt(odd[0])}", where=str(path), remedy=SEE_HELP)
    if values.keys() & set(FIELDS) and not values.keys() & RunConfig.model_fields.keys():
        raise UserError(f"expected the config of a run, found a row with {excerpt(min(values))}", where=str(path), remedy=_looks_like_data(path, text) or SEE_HELP)
    return values


def _num_values(value: object, known: dict[int, float] | None = None) -> float:
    """Return how many values there are with every alias written out; infinitely many where one holds itself."""
    known = {} if known is None else known
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = float("inf")  # until it has been counted
        known[id(value)] = 1 + sum(_num_values(inner, known) for inner in (value.values() if isinstance(value, dict) else value))
    return known[id(value)]


def _not_yaml(error: Exception, path: Path, text: str) -> UserError:
    where, what = str(path), str(error).replace('in "<unicode string>", ', "at ")
    remedy = "mend it, as key: value, indented by spaces, with brackets closed and texts with : or # in quotes"
    if isinstance(error, MarkedYAMLError):
        # Its own text goes on with an excerpt of the file and with advice for programmers.
        what = f"{error.problem or error.context}".partition(" with value ")[0]
        if mark := error.problem_mark or error.context_mark:
            where = f"{path}:{mark.line + 1}"
    if what.startswith("found duplicate key"):
        remedy = "keep one of them"
    elif isinstance(error, UnicodeDecodeError):
        remedy = "save the config as UTF-8 text"
    return UserError(f"not valid YAML: {' '.join(what.split())}", where=where, remedy=_looks_like_data(path, text) or remedy)


def _looks_like_data(path: Path, text: str) -> str:
    """Return a remedy if the file is rows rather than a config, or an empty text."""
    lines = text.lstrip("\ufeff \t\r\n").splitlines() or [""]
    kind = ""
    if path.suffix in (".parquet", ".arrow"):
        kind = "a table"
    elif path.suffix in (".csv", ".tsv") or re.fullmatch(r'["\w ]+([,;\t]["\w ]+)+', lines[0]):
        kind = "CSV data"
    elif re.match(r'[\[{]\s*[{"]', lines[0]) and "output_dir" not in text:
        kind = "JSON rows" if len(lines) == 1 or lines[0].startswith("[") else "JSON lines"
    return f"give a YAML config, and name data files in its data.train; this looks like {kind}" if kind else ""


def write_yaml(config: RunConfig, stream) -> None:
    """Write every key with its value."""
    dump_values(config.model_dump(mode="json"), stream)


def dump_values(values: dict, stream) -> None:
    """Write a mapping as YAML; the values of secret-looking environment variables are left out."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    yaml.dump(redact_values(values), stream)


def known_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of the config, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        # A section that may be null is a union.
        for kind in get_args(field.annotation) if isinstance(field.annotation, UnionType) else [field.annotation]:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from known_keys(kind, f"{prefix}{name}.")


def with_changes(values: dict, changes: Mapping[str, object], *, where: str) -> dict:
    """Return the nested values of a config with some dotted keys changed. Of a section, what is not named stays as it is; UserError for a key that there is not."""
    changed, known = copy.deepcopy(values), set(known_keys())
    for key, value in _by_leaf(to_jsonable_python(changes, serialize_unknown=True), known):  # a Path as text, a tuple as a list
        if key not in known:
            raise UserError(f"{key}: unknown key", where=where, remedy=nearest_key(key))
        section, (*path, leaf) = changed, key.split(".")
        for name in path:
            section[name] = section = section[name] if isinstance(section.get(name), dict) else {}
        if not (value == {} and _is_section(key, known) and isinstance(section.get(leaf), dict)):  # an empty mapping names nothing
            section[leaf] = value
    return changed


def _by_leaf(changes: dict, known: set[str], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield (dotted key, value); those of a section one by one."""
    for name, value in changes.items():
        key = f"{prefix}{name}"
        if value and isinstance(value, dict) and _is_section(key, known):
            yield from _by_leaf(value, known, f"{key}.")
        else:
            yield key, value


def _is_section(key: str, known: set[str]) -> bool:
    return any(other.startswith(f"{key}.") for other in known)


def leaves(section: type[BaseModel], values: dict, prefix: str = "") -> dict[str, object]:
    """Return the values of a dumped config by dotted key; a list or a mapping that a user fills is one value."""
    found: dict[str, object] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found.update(leaves(field.annotation, values[name], f"{prefix}{name}."))
        else:
            found[prefix + name] = values[name]
    return found


def nearest_key(key: str, as_option: bool = False) -> str:
    """Return a hint with the known key most like `key`: in its own section first, then by its last part anywhere.

    A key of a source is no option; with `as_option` the hint shows the sources as one.
    """
    section, _, leaf = key.rpartition(".")
    in_source = re.fullmatch(A_SOURCE, section) is not None
    near_source = not section or re.fullmatch(r"data(\.train|\.eval(\..*)?)?", section) is not None
    known = list(known_keys())
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    if in_source:
        siblings = {name: f"{section}.{name}" for name in SourceConfig.model_fields}
    anywhere = {name.rpartition(".")[2]: name for name in reversed(known)}
    # At the top, path may be that of the model.
    of_sources = [name for name in SourceConfig.model_fields if near_source and (section or name != "path")]
    for candidates, cutoff in ((siblings, 0.6), (of_sources, 0.75), (anywhere, 0.75), (siblings, 0.0), (anywhere, 0.0)):
        if close := difflib.get_close_matches(leaf, candidates, n=1, cutoff=cutoff):
            if candidates is of_sources or (in_source and as_option and candidates is siblings):
                return f"{close[0]} belongs to a source: {_sources('data.eval' if section.startswith('data.eval') else 'data.train', close[0], as_option)}"
            if in_source and not cutoff:
                return f"a source has {', '.join(SourceConfig.model_fields)}"
            return f"did you mean {candidates[close[0]]}?" if cutoff else f"the nearest known key is {candidates[close[0]]}; all keys: kto-ds <command> --help"
    raise AssertionError("the config has keys")


def _written(value: object, as_option: bool) -> str:
    """Return an example as one line of YAML, or as JSON for the command line."""
    if as_option:
        return json.dumps(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_written(key, False)}: {_written(inner, False)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_written(inner, False) for inner in value) + "]"
    # What YAML may take for something else than a text is quoted, and JSON's quotes are YAML's too.
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z_/][\w./-]*", value) and value.lower() not in ("true", "false", "null")
    return str(value) if plain else json.dumps(value)


def _sources(key: str, field: str, as_option: bool, path: object = None) -> str:
    """Return how to write the sources of `data.train`, `data.eval` or `data.eval.<name>`, with `path` if it can be shown."""
    path = path if isinstance(path, str) and path.isprintable() and 0 < len(path) <= 60 and "'" not in path else EXAMPLES["path"]
    value: object = [{"path": path, field: path if field == "path" else EXAMPLES[field]}]
    option = ".".join(key.split(".")[:2])
    if name := key[len(option) + 1 :]:
        value = {name if name.isprintable() and "'" not in name else "name": value}
    return f"--{option} '{json.dumps(value)}'" if as_option else f"{option.partition('.')[2]}: {_written(value, False)} in section data"


def explain(error: ValidationError, where: str, options: Collection[str] = ()) -> UserError:
    """Turn pydantic's findings into one message that names each key, what was found, what is expected, and what to do.

    `options` are the keys that the command line has set: a remedy for them is JSON, where one for the file is YAML.
    """
    findings = [_explain_one(found, options) for found in error.errors()]
    if len(findings) == 1:
        return UserError(findings[0][0], where=where, remedy=findings[0][1])
    lines = [f"{what}; {remedy}" if remedy != SEE_HELP else what for what, remedy in findings]
    return UserError("\n  ".join([f"{len(lines)} keys cannot be used", *lines]), where=where, remedy=SEE_HELP)


def _explain_one(found: dict, options: Collection[str]) -> tuple[str, str]:
    """Return (what is wrong with which key, remedy); the checks of config.py say both in one text, with a semicolon between them."""
    # A part in angle brackets tells types of one key apart, and [key] a key from its value.
    key = ".".join(str(part) for part in found["loc"] if not str(part).startswith(("<", "[")))
    as_option = any(key == option or key.startswith(option + ".") for option in options)
    if found["type"] == "extra_forbidden":
        if found["loc"][-1] == key and "." in key and key in known_keys():  # the name that an option has
            return f"{key}: unknown key", f"write sections one within another: {': {'.join(key.split('.'))}: ...{'}' * key.count('.')}"
        return f"{key}: unknown key", nearest_key(key, as_option)
    if found["type"] == "missing":
        return f"{key}: required, but not set", _how_to_set(key, as_option)
    message, _, remedy = found["msg"].removeprefix("Value error, ").partition("; ")
    if found["type"] in ("model_type", "model_attributes_type", "dict_type", "list_type", "too_short"):
        message, remedy = _expected(key, found["input"], as_option)
    elif not remedy and (inside := re.match(rf"{A_SOURCE}\.(\w+)", key)) and inside[1] in SourceConfig.model_fields:
        remedy = f"{inside[1]} is {SourceConfig.model_fields[inside[1]].description}"
    elif not remedy and key in ("data.train", "data.eval"):
        remedy = f"write {_sources(key, 'path', as_option)}"
    return f"{key}: {message}; found {excerpt(found['input'])}" if key else message, remedy or SEE_HELP


def _how_to_set(key: str, as_option: bool) -> str:
    section, _, leaf = key.rpartition(".")
    if re.fullmatch(A_SOURCE, section):
        return f"every source has a {leaf}: {_sources(section.rpartition('.')[0], leaf, as_option)}"
    if key in ("data", "data.train"):
        return f"set {_sources('data.train', 'path', False)} in the file, or give {_sources('data.train', 'path', True)}"
    needed = "model.path" if key == "model" else key
    return f"set {needed} in the file, or give --{needed}"


def _expected(key: str, found: object, as_option: bool) -> tuple[str, str]:
    """Return (what belongs at a key that takes a list, a mapping or a section, how to write it)."""
    leaf = key.rpartition(".")[2]
    path = found.get("path") if isinstance(found, dict) else found
    if re.fullmatch(A_SOURCE, key):
        sources = key.rpartition(".")[0]
        return f"expected a source such as {_written({'path': EXAMPLES['path']}, as_option)}", f"write {_sources(sources, 'path', as_option, path)}"
    if re.fullmatch(r"data\.eval\.\w+", key) and leaf in SourceConfig.model_fields:
        return "expected a list of sources, as path and its like belong to a source", f"write {_sources('data.eval', leaf, as_option, path)}"
    if key.startswith(("data.train", "data.eval")) and leaf not in EXAMPLES:
        return "expected at least one source" if found == [] else "expected a list of sources", f"write {_sources(key, 'path', as_option, path)}"
    if leaf in EXAMPLES:
        example = _written(EXAMPLES[leaf], as_option)
        return f"expected a mapping such as {example}", f"write {leaf}: {example}" if not as_option else f"write it as JSON, such as {example}"
    keys = [name.rpartition(".")[2] for name in known_keys() if name.rpartition(".")[0] == key]
    how = f"give --{key}.{keys[0]} and its like" if as_option else f"write {leaf}: {{{keys[0]}: ...}}"
    return f"expected a section with keys such as {keys[0]}", f"{how}; the section has {', '.join(keys)}"
