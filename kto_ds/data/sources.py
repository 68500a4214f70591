"""Rows as they lie in a file, a saved dataset or the hub, each with the place it came from. What their fields mean: records.py."""

import csv
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
import pyarrow.parquet

from kto_ds.errors import UserError, excerpt

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
ARRAY_START = re.compile(r"\s*\[\s*(\])?")
ARRAY_NEXT = re.compile(r"\s*([,\]])\s*")
HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+|\w[\w-]*")
CSV_LABELS = {"true": True, "True": True, "false": False, "False": False}
PLACES = "give a JSON, JSONL, Parquet or CSV file, a folder saved by datasets, or a hub name with one of its splits"


def read_rows(path: str, split: str | None) -> Iterator[tuple[str, dict]]:
    """Yield (where, row) for every row of `path`; `where` is path:line where a row has a line, else path:row N, both from 1."""
    where = None
    try:
        for where, row in _open_source(path, split):
            yield where, row
    except UserError:
        raise
    except Exception as error:
        # On a damaged source the libraries let nearly anything out (KeyError, ArrowInvalid, httpx errors), and document none of it.
        place = f"cannot be read after {where}" if where else "cannot be read"
        raise UserError(f"{place}: {type(error).__name__}: {excerpt(str(error), limit=400)}", where=path, remedy=PLACES) from error
    if where is None:
        raise UserError("no rows", where=path, remedy="give a source with at least one row")


def _open_source(path: str, split: str | None) -> Iterator[tuple[str, dict]]:
    reader = FILE_READERS.get(Path(path).suffix.lower())
    if os.path.isfile(path):
        if reader is None:
            raise UserError("unknown kind of file", where=path, remedy=f"use one of {', '.join(FILE_READERS)}")
        if split is not None:
            raise UserError(f"split {excerpt(split)} is asked for, but a file has no splits", where=path, remedy="remove split")
        return reader(Path(path))
    # A mistyped file name must not cost a search of the hub.
    if not os.path.isdir(path) and (reader or not HUB_NAME.fullmatch(path)):
        raise UserError("no such file or folder", where=path, remedy=f"check the path; it is looked up from {excerpt(os.getcwd())}")
    return _numbered(path, _load_dataset(path, split))


def _numbered(path: str | Path, rows: Iterable) -> Iterator[tuple[str, object]]:
    return ((f"{path}:row {number}", row) for number, row in enumerate(rows, start=1))


def _load_dataset(path: str, split: str | None) -> datasets.Dataset:
    is_saved = any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json"))
    if not is_saved:
        return datasets.load_dataset(path, split=split or "train")
    saved = datasets.load_from_disk(path)
    if isinstance(saved, datasets.Dataset):
        if split not in (None, str(saved.split)):
            raise UserError(f"split {excerpt(split)} is asked for, but this is one dataset without splits", where=path, remedy="remove split")
        return saved
    chosen = split or (next(iter(saved)) if len(saved) == 1 else "train")
    if chosen not in saved:
        raise UserError(f"no split {excerpt(chosen)}", where=path, remedy=f"set split to one of {', '.join(map(ascii, saved))}")
    return saved[chosen]


def _json_rows(path: Path) -> Iterator[tuple[str, dict]]:
    with path.open("rb") as stream:
        first = next((line for line in stream if line.removeprefix(BYTE_ORDER_MARK).strip()), b"")
        stream.seek(0)
        # The suffix does not tell: .json files with one object a line are as common as .jsonl files with an array.
        is_array = first.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"[")
        yield from _array_rows(path, stream.read()) if is_array else _line_rows(path, stream)


def _line_rows(path: Path, lines: Iterable[bytes]) -> Iterator[tuple[str, dict]]:
    for line, content in enumerate(lines, start=1):
        text = _decode(content, path, line).strip()
        if not text:
            continue
        row, end = _parse_object(text, 0, path, line)
        if end < len(text):
            raise _not_json(f"found {excerpt(text[end:], limit=40)} after the object", path, line)
        yield f"{path}:{line}", row


def _array_rows(path: Path, content: bytes) -> Iterator[tuple[str, dict]]:
    text = _decode(content, path, line=1)
    line, counted, mark = 1, 0, ARRAY_START.match(text)
    while mark[1] != "]":
        start = mark.end()
        line, counted = line + text.count("\n", counted, start), start
        row, end = _parse_object(text, start, path, line)
        yield f"{path}:{line}", row
        mark = ARRAY_NEXT.match(text, end)
        if mark is None:
            raise _not_json(f"expected , or ] after this object, found {excerpt(text[end : end + 40])}", path, line)
    if tail := text[mark.end() :].strip():
        raise _not_json(f"found {excerpt(tail, limit=40)} after the array", path, line)


def _decode(content: bytes, path: Path, line: int) -> str:
    try:
        return content.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        raise UserError(f"not valid UTF-8: byte {error.object[error.start]:#04x}", where=f"{path}:{line}", remedy="save the file as UTF-8") from error


def _object_without_repeats(pairs: list[tuple[str, object]]) -> dict:
    row = {}
    for name, value in pairs:
        if name in row:
            raise ValueError(f"field {excerpt(name)} occurs twice in one object")
        row[name] = value
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


STRICT_JSON = json.JSONDecoder(object_pairs_hook=_object_without_repeats, parse_constant=_refuse_constant)


def _parse_object(text: str, start: int, path: Path, line: int) -> tuple[dict, int]:
    try:
        row, end = STRICT_JSON.raw_decode(text, start)
        if "\\u" in text[start:end]:
            json.dumps(row, ensure_ascii=False).encode()  # a lone surrogate has no UTF-8 and would fail in the tokenizer
    except json.JSONDecodeError as error:
        line += text.count("\n", start, error.pos)
        raise _not_json(f"{error.msg} at column {error.colno}, found {excerpt(text[error.pos : error.pos + 40])}", path, line) from error
    except (ValueError, RecursionError) as error:
        raise _not_json(str(error), path, line) from error
    if not isinstance(row, dict):
        raise UserError(f"expected an object with fields, found {excerpt(row)}", where=f"{path}:{line}")
    return row, end


def _not_json(what: str, path: Path, line: int) -> UserError:
    return UserError(f"not valid JSON: {what}", where=f"{path}:{line}", remedy="write one object a line, or one array of objects")


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict]]:
    with pyarrow.parquet.ParquetFile(path) as table:
        _refuse_repeats(table.schema_arrow.names, path)
        # datasets stores values of mixed type as JSON text and says so in the schema.
        features = datasets.Features.from_arrow_schema(table.schema_arrow)
        rows = (features.decode_example(row) for batch in table.iter_batches(batch_size=1024) for row in batch.to_pylist())
        yield from _numbered(path, rows)


def _csv_rows(path: Path) -> Iterator[tuple[str, dict]]:
    csv.field_size_limit(sys.maxsize)  # the default refuses a completion over 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as stream:
        lines = filter(None, csv.reader(stream, strict=True))
        names = next(lines, [])
        _refuse_repeats(names, path)
        for where, cells in _numbered(path, lines):
            if len(cells) != len(names):
                raise UserError(f"expected {len(names)} cells as in the header, found {len(cells)}: {excerpt(cells)}", where=where)
            row = {name: cell or None for name, cell in zip(names, cells)}
            if "label" in row:  # only here: a completion may well be the word "true"
                row["label"] = CSV_LABELS.get(row["label"], row["label"])
            yield where, row


def _refuse_repeats(names: list[str], path: Path) -> None:
    if len(set(names)) < len(names):
        raise UserError(f"a column name occurs twice: {excerpt(names)}", where=str(path))


FILE_READERS = {".json": _json_rows, ".jsonl": _json_rows, ".parquet": _parquet_rows, ".csv": _csv_rows}
