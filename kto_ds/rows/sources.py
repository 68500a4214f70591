"""Rows as they lie in files, a saved dataset or the hub, cut into blocks that are parsed elsewhere. What their fields mean: records.py."""

import glob
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import datasets
import pyarrow

from kto_ds.errors import UserError, excerpt
from kto_ds.rows.arrow_rows import TableBlock, read_arrow_blocks, read_parquet_blocks, read_table_blocks
from kto_ds.rows.blocks import MAX_BLOCK_ROWS
from kto_ds.rows.csv_rows import CsvBlock, read_csv_blocks
from kto_ds.rows.json_rows import JsonBlock, read_json_blocks

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5": ".zst"}
TEXT_KINDS = (".json", ".jsonl", ".csv")
KINDS = (*TEXT_KINDS, ".parquet", ".arrow", *(kind + compression for kind in TEXT_KINDS for compression in COMPRESSIONS))
SAVED_MARKS = ("dataset_dict.json", "state.json")
HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+|\w[\w-]*")
# No hub dataset is named so: what ends like this is a file that is not there.
FILE_NAME = re.compile(r".*\.(jsonl?|csv|tsv|txt|parquet|arrow|gz|zst|bz2|xz|zip)", re.IGNORECASE)
PLACES = "give a JSON, JSONL, CSV, Parquet or Arrow file, a glob of such files, a folder saved by datasets, or a hub name with one of its splits"
DAMAGED = "see whether the file is whole and of the kind that its name says; copy or download it again"

Block = JsonBlock | CsvBlock | TableBlock


def list_files(path: str, split: str | None) -> list[str]:
    """Return the files that a glob finds, sorted. A plain file, a folder and a hub name give themselves.

    Raises UserError where nothing is found, or something that cannot be read as rows.
    """
    files = [path]
    if not os.path.lexists(path) and glob.has_magic(path):
        files = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
        if not files:
            raise UserError("no file fits this pattern", where=path, remedy=f"check the pattern; it is looked up from {excerpt(os.getcwd())}")
    for file in files:
        _require_source(file, split)
    return files


def read_blocks(path: str, split: str | None, *, label_fields: tuple[str, ...] = ("label", "kto_tag")) -> Iterator[Block]:
    """Yield the rows of one file or dataset in blocks of at most 1,000 rows and 4 MiB, the same ones at each reading.

    `label_fields` are the columns of a CSV file whose cells true and false are read as booleans. Rows that cannot be used come out of Block.rows;
    UserError is raised for what no single row can be blamed for: nothing there, a damaged file, no rows.
    """
    _require_source(path, split)
    num_rows = 0
    try:
        for block in _open_source(path, split, label_fields):
            yield block
            num_rows += block.num_rows
    except UserError:
        raise
    except Exception as error:
        # On a damaged source the libraries let nearly anything out (KeyError, ArrowInvalid, httpx errors), and document none of it.
        place = f"cannot be read after {num_rows} rows" if num_rows else "cannot be read"
        remedy = DAMAGED if os.path.isfile(path) else PLACES
        raise UserError(f"{place}: {type(error).__name__}: {excerpt(str(error), limit=400)}", where=path, remedy=remedy) from error
    if num_rows == 0:
        raise UserError("no rows", where=path, remedy="give a source with at least one row")


def _kind(path: str) -> tuple[str, str | None]:
    """Return the suffix that tells how rows are written, and the compression: rows.jsonl.gz gives (".jsonl", "gzip")."""
    name = Path(path.lower())
    compression = COMPRESSIONS.get(name.suffix)
    return (Path(name.stem).suffix if compression else name.suffix), compression


def _require_source(path: str, split: str | None) -> None:
    if os.path.isfile(path):
        kind, compression = _kind(path)
        if kind + (Path(path.lower()).suffix if compression else "") not in KINDS:
            raise UserError("unknown kind of file", where=path, remedy=f"use one of {', '.join(KINDS)}")
        if split is not None:
            raise UserError(f"split {excerpt(split)} is asked for, but a file has no splits", where=path, remedy="remove split")
    elif os.path.isdir(path):
        _require_saved_dataset(path, split or "train")
    elif FILE_NAME.fullmatch(path) or not HUB_NAME.fullmatch(path):  # a mistyped file name must not cost a search of the hub
        raise UserError("no such file or folder", where=path, remedy=f"check the path; it is looked up from {excerpt(os.getcwd())}")


def _require_saved_dataset(path: str, split: str) -> None:
    if any(os.path.isfile(os.path.join(path, name)) for name in SAVED_MARKS):
        return
    # Two levels, as a copy of a hub dataset has them: the path may be the root of a disk by mistake.
    files = [file for pattern in ("*", "*/*") for file in sorted(Path(path).glob(pattern)) if file.name.lower().endswith(KINDS) and file.is_file()]
    if not files:
        raise UserError("this folder holds neither a saved dataset nor data files", where=path, remedy=PLACES)
    # As datasets takes them: where names tell splits apart, such as test.jsonl, rows of another split are not to come along.
    of_split = [file for file in files if re.search(rf"(?<![a-zA-Z]){re.escape(split)}(?![a-zA-Z])", file.name)]
    first = (of_split or files)[0]
    kind = next(kind for kind in sorted(KINDS, key=len, reverse=True) if first.name.lower().endswith(kind))
    pattern = first.parent / ((f"*{split}*" if of_split else "*") + first.name[-len(kind) :])
    raise UserError("this folder was not saved by datasets", where=path, remedy=f"for the data files in it give a glob such as {excerpt(str(pattern), limit=400)}")


def _open_source(path: str, split: str | None, label_fields: tuple[str, ...]) -> Iterator[Block]:
    if not os.path.isfile(path):
        return _dataset_blocks(path, split)
    kind, _ = _kind(path)
    if kind in TEXT_KINDS:
        _require_readable_text(path)
    if kind == ".csv":
        return read_csv_blocks(_open_bytes(path), path, label_fields)
    if kind in TEXT_KINDS:
        return read_json_blocks(lambda: _open_bytes(path), path)
    return read_parquet_blocks(path) if kind == ".parquet" else read_arrow_blocks(path)


def _open_bytes(path: str) -> BinaryIO:
    _, compression = _kind(path)
    if compression is None:
        return open(path, "rb", buffering=2**20)
    return io.BufferedReader(pyarrow.input_stream(path, compression=compression), 2**20)


def _require_readable_text(path: str) -> None:
    with _open_bytes(path) as stream:
        start = stream.read(4)
    # Without a byte order mark, text that starts with ASCII has every other byte empty.
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0\0" in (start[::2], start[1::2]):
        raise UserError("looks like UTF-16", where=path, remedy="save the file as UTF-8")
    if start[:2] in MAGIC:
        suffix = MAGIC[start[:2]]
        raise UserError("is compressed, but its name does not say so", where=path, remedy=f"name it {excerpt(Path(path).name + suffix)}, or uncompress it")


def _dataset_blocks(path: str, split: str | None) -> Iterator[Block]:
    dataset = _load_dataset(path, split)
    tables = dataset.with_format("arrow").iter(batch_size=MAX_BLOCK_ROWS)
    batches = (batch for table in tables for batch in table.to_batches())
    return read_table_blocks(path, dataset.features.arrow_schema, batches)


def _load_dataset(path: str, split: str | None) -> datasets.Dataset:
    if not os.path.isdir(path):
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
