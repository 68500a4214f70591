"""Parquet and Arrow files, and datasets: rows that lie in columns with types."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import datasets
import pyarrow
import pyarrow.parquet

from kto_ds.errors import UserError, excerpt
from kto_ds.rows.blocks import MAX_BLOCK_BYTES, MAX_BLOCK_ROWS, MAX_ROW_BYTES, MAX_TEXT, TOO_LONG, in_blocks

READ_ROWS = 25  # at once from Parquet, which may write a text that 1,000 rows share only once


@dataclass(frozen=True)
class TableBlock:
    """Some rows of one Parquet or Arrow file or of a dataset, as an Arrow stream: a slice of a batch would be pickled with all of the batch."""

    place: str
    first: int
    num_rows: int
    stream: bytes
    features: datasets.Features

    def rows(self) -> Iterator[tuple[int, dict | UserError]]:
        """Yield (number, row), or (number, error) for one that cannot be used; never raises."""
        table = pyarrow.ipc.open_stream(self.stream).read_all()
        nested = {name: feature for name, feature in self.features.items() if _is_nested(feature)}
        for number, values in enumerate(_to_python(table), start=self.first):
            where = f"{self.place}{number}"
            try:
                if isinstance(values, Exception):
                    raise values
                if self.num_rows == 1 and len(self.stream) > MAX_ROW_BYTES:
                    raise UserError(TOO_LONG, where=where, remedy="shorten or remove the row")
                yield number, values | {name: _restored(values[name], feature) for name, feature in nested.items()}
            except UserError as error:
                yield number, error
            except Exception as error:  # the decoder of JSON text documents none of its own
                what = f"cannot be decoded: {type(error).__name__}: {excerpt(str(error), limit=400)}"
                yield number, UserError(what, where=where, remedy="mend or remove the row")

    def text(self, number: int) -> str:
        """Return row `number` as JSON, at most 10,000 characters."""
        [values] = _to_python(pyarrow.ipc.open_stream(self.stream).read_all().slice(number - self.first, 1))
        shown = str(values) if isinstance(values, Exception) else json.dumps(values, ensure_ascii=False, default=str)
        return shown[:MAX_TEXT]


def _to_python(table: pyarrow.Table) -> list[dict | Exception]:
    """Return the rows as dicts, and the error in the place of one with values that Python cannot hold, such as text that is no UTF-8."""
    errors = (ValueError, OverflowError, pyarrow.ArrowException)
    try:
        return table.to_pylist()
    except errors as error:
        return [error] if table.num_rows == 1 else [row for index in range(table.num_rows) for row in _to_python(table.slice(index, 1))]


def _is_nested(feature: object) -> bool:
    return _is_nested(feature.feature) if isinstance(feature, (datasets.List, datasets.LargeList)) else isinstance(feature, (dict, datasets.Json))


def _restored(value: object, feature: object) -> object:
    """Return `value` as it was before it got columns: without the nulls of keys that it lacks, and with what stands in it as JSON text.

    Images, audio and the like stay the bytes and paths that they are: datasets would open the files that they name.
    """
    if value is None:
        return None
    if isinstance(feature, dict):
        return {name: _restored(inner, feature[name]) for name, inner in value.items() if inner is not None}
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return [_restored(inner, feature.feature) for inner in value]
    # datasets stores values of mixed type as JSON text and says so in the schema.
    return feature.decode_example(value) if isinstance(feature, datasets.Json) and feature.decode else value


def read_parquet_blocks(path: str) -> Iterator[TableBlock]:
    """Yield the rows of a Parquet file, numbered from 1 over all its row groups."""
    with pyarrow.parquet.ParquetFile(path) as file:
        # By the file's own account as few as fit a block: rows of a book each would otherwise be many blocks at once.
        groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        mean_bytes = max((group.total_byte_size / max(group.num_rows, 1) for group in groups), default=0)
        batches = file.iter_batches(batch_size=max(1, min(READ_ROWS, int(MAX_BLOCK_BYTES / max(mean_bytes, 1)))))
        yield from read_table_blocks(path, file.schema_arrow, batches)


def read_arrow_blocks(path: str) -> Iterator[TableBlock]:
    """Yield the rows of an Arrow file, in either of its two forms."""
    with pyarrow.memory_map(path) as source:
        is_file = source.read(6) == b"ARROW1"  # the other form is a stream, as datasets writes it
        source.seek(0)
        reader = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
        batches = (reader.get_batch(index) for index in range(reader.num_record_batches)) if is_file else reader
        yield from read_table_blocks(path, reader.schema, batches)


def read_table_blocks(path: str, schema: pyarrow.Schema, batches: Iterable[pyarrow.RecordBatch]) -> Iterator[TableBlock]:
    """Cut the batches into blocks. Raises UserError for a repeated column name."""
    if len(set(schema.names)) < len(schema.names):
        raise UserError(f"a column name occurs twice: {excerpt(schema.names)}", where=path, remedy="give every column a name of its own")
    features = datasets.Features.from_arrow_schema(schema)
    first = 1
    for parts in in_blocks((part for batch in batches for part in _cut(batch)), lambda part: part.nbytes, lambda part: part.num_rows):
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, parts[0].schema) as writer:
            for part in parts:
                writer.write_batch(part)
        num_rows = sum(part.num_rows for part in parts)
        yield TableBlock(f"{path}:row ", first, num_rows, sink.getvalue().to_pybytes(), features)
        first += num_rows


def _cut(batch: pyarrow.RecordBatch) -> Iterator[pyarrow.RecordBatch]:
    for start in range(0, batch.num_rows, MAX_BLOCK_ROWS):
        yield from _halve(batch.slice(start, MAX_BLOCK_ROWS))


def _halve(batch: pyarrow.RecordBatch) -> Iterator[pyarrow.RecordBatch]:
    if batch.nbytes <= MAX_BLOCK_BYTES or batch.num_rows == 1:
        yield batch
        return
    for part in (batch.slice(0, batch.num_rows // 2), batch.slice(batch.num_rows // 2)):
        yield from _halve(part)
