"""CSV files with a header. Every cell is text, but for the labels true and false."""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from kto_ds.errors import UserError, excerpt
from kto_ds.rows.blocks import MAX_ROW_BYTES, MAX_TEXT, SHORTEN, TOO_LONG, in_blocks

CSV_LABELS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}  # TRUE is how spreadsheets save it
QUOTING = 'put cells that hold commas, quotes or line breaks between " and write " inside them twice'


@dataclass(frozen=True)
class CsvBlock:
    """Some rows of one CSV file as cells, with the header's names."""

    place: str
    first: int
    names: list[str]
    label_fields: tuple[str, ...]
    cells: list[list[str]]

    @property
    def num_rows(self) -> int:
        return len(self.cells)

    def rows(self) -> Iterator[tuple[int, dict | UserError]]:
        """Yield (number, row), or (number, error) for one that cannot be used; never raises."""
        for number, cells in enumerate(self.cells, start=self.first):
            try:
                yield number, self._row(cells, f"{self.place}{number}")
            except UserError as error:
                yield number, error

    def _row(self, cells: list[str], where: str) -> dict:
        if len(cells) != len(self.names):
            what = f"expected {len(self.names)} cells as in the header, found {len(cells)}: {excerpt(cells)}"
            raise UserError(what, where=where, remedy=QUOTING)
        try:
            "".join(cells).encode()
        except UnicodeEncodeError as error:  # the file is opened with surrogateescape, lest one bad byte ends the reading
            byte = ord(error.object[error.start]) - 0xDC00
            raise UserError(f"not valid UTF-8: byte {byte:#04x}", where=where, remedy="save the file as UTF-8") from error
        row = {name: cell or None for name, cell in zip(self.names, cells)}
        labels = {name: CSV_LABELS.get(row[name], row[name]) for name in self.label_fields if name in row}
        return row | labels  # only these: a completion may well be the word "true"

    def text(self, number: int) -> str:
        """Return row `number` as a CSV line, at most 10,000 characters."""
        line = io.StringIO()
        csv.writer(line).writerow(self.cells[number - self.first])
        return line.getvalue()[:MAX_TEXT].encode(errors="replace").decode().rstrip("\r\n")


def read_csv_blocks(stream: BinaryIO, path: str, label_fields: tuple[str, ...]) -> Iterator[CsvBlock]:
    """Yield the rows of a CSV file with a header. Raises UserError for a header that cannot be used and for a quote out of place."""
    csv.field_size_limit(MAX_ROW_BYTES)  # the default refuses a completion over 128 KiB
    with io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        lines = _cells_of_lines(text, path)
        names = next(lines, [])
        _require_header(names, path)
        number = 1
        for cells in in_blocks(lines, lambda cells: sum(map(len, cells))):
            yield CsvBlock(f"{path}:row ", number, names, label_fields, cells)
            number += len(cells)


def _cells_of_lines(text: io.TextIOBase, path: str) -> Iterator[list[str]]:
    """Yield the cells of the header and of every row that is not blank."""
    place, number = "in the header", 0
    try:
        for cells in csv.reader(_bounded_lines(text, path), strict=True):
            if cells:
                yield cells
                place, number = f"after row {number}" if number else "after the header", number + 1
    except csv.Error as error:  # where a quote is out of place nobody knows what the rows after it are
        raise UserError(f"not valid CSV {place}: {error}", where=path, remedy=QUOTING) from error


def _bounded_lines(text: io.TextIOBase, path: str) -> Iterator[str]:
    number = 0
    while line := text.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise UserError(TOO_LONG, where=f"{path}:{number}", remedy=SHORTEN)
        yield line


def _require_header(names: list[str], path: str) -> None:
    if len(set(names)) < len(names):
        raise UserError(f"a column name occurs twice: {excerpt(names)}", where=path, remedy="give every column a name of its own")
    for separator in (";", "\t"):
        if len(names) == 1 and separator in names[0]:
            what = f"the file looks separated by {separator!r}: the header is one cell, {excerpt(names[0])}"
            raise UserError(what, where=path, remedy="save it with commas between the cells")
