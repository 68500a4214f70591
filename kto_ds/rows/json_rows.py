"""JSON lines and JSON arrays, read strictly and without holding the file: the reader only finds where rows end, whoever holds a block parses them."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import BinaryIO

from kto_ds.errors import UserError, excerpt
from kto_ds.rows.blocks import MAX_ROW_BYTES, MAX_TEXT, SHORTEN, TOO_LONG, in_blocks

CHUNK = 2**20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SPACE = re.compile(rb"[ \t\r\n]*+")
# Everything up to the next bracket outside of a string, in text whose escapes are masked. A string that is not closed is taken up to the end:
# so the group cannot fail behind a quote, which Python before 3.11.5 would keep as matched (python/cpython#106052).
UP_TO_BRACKET = re.compile(rb'[^"\[\]{}]*+(?:"[^"]*+"?+[^"\[\]{}]*+)*+')
SCALAR = re.compile(rb'"[^"]*+"?+[^,\]]*+|[^,\[\]{}]*+')
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
NOT_JSON = "write one object a line, or one array of objects"


@dataclass(frozen=True)
class JsonBlock:
    """Some rows of one file, each as (number, its bytes)."""

    place: str
    raw: list[tuple[int, bytes]]

    @property
    def num_rows(self) -> int:
        return len(self.raw)

    def rows(self) -> Iterator[tuple[int, dict | UserError]]:
        """Yield (number, row), or (number, error) for one that cannot be used; never raises."""
        for number, content in self.raw:
            try:
                yield number, _parse_object(content, f"{self.place}{number}")
            except UserError as error:
                yield number, error

    def text(self, number: int) -> str:
        """Return row `number` as it stands in the file, at most 10,000 characters."""
        content = next(content for found, content in self.raw if found == number)
        return content[: 4 * MAX_TEXT].decode(errors="replace").strip()[:MAX_TEXT]


def read_json_blocks(open_stream: Callable[[], BinaryIO], path: str) -> Iterator[JsonBlock]:
    """Yield the rows of a file of JSON lines, or of one JSON array. Raises UserError where an array is not built as one.

    A row is named by its line; where rows of an array share lines, by its number in the array.
    """
    # The suffix does not tell: .json files with one object a line are as common as .jsonl files with an array.
    with open_stream() as stream:
        is_array = _starts_array(stream)
    with open_stream() as stream:
        if is_array:
            yield from _array_blocks(_Window(stream, path), path)
        else:
            for raw in _cut(_lines(stream)):
                yield JsonBlock(f"{path}:", raw)


def _cut(rows: Iterator[tuple[int, bytes]]) -> Iterator[list[tuple[int, bytes]]]:
    return in_blocks(rows, lambda row: len(row[1]))


def _array_blocks(window: "_Window", path: str) -> Iterator[JsonBlock]:
    blocks = _cut(_array_elements(window))
    start = list(islice(blocks, 2))  # two, as a long row is a block of its own
    lines = [line for raw in start for line, _ in raw]
    have_lines = len(set(lines)) == len(lines)
    last, number = 0, 0
    for raw in chain(start, blocks):
        if not have_lines:
            raw = [(number + index, content) for index, (_, content) in enumerate(raw, start=1)]
            number += len(raw)
        elif len({last, *(line for line, _ in raw)}) <= len(raw):
            what = "rows share a line of this array, though the first ones each have their own"
            raise UserError(what, where=f"{path}:{last}", remedy="write each row on a line of its own, or all on one line")
        last = raw[-1][0]
        yield JsonBlock(f"{path}:" if have_lines else f"{path}:row ", raw)


def _starts_array(stream: BinaryIO) -> bool:
    start = stream.readline(CHUNK).removeprefix(BYTE_ORDER_MARK)
    while start.isspace():
        start = stream.readline(CHUNK)
    return start.lstrip().startswith(b"[")


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield (line, content) of the lines that are not blank. One over the limit is cut behind it, and so refused when it is parsed."""
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = stream.readline(CHUNK)
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if line and not line.isspace():
            yield number, line


class _Window:
    """The part of a stream between the row being read and what has been read ahead."""

    def __init__(self, stream: BinaryIO, path: str):
        self.stream, self.path = stream, path
        self.held, self.at, self.line = b"", 0, 1  # what is read, where the next byte lies in it, and in which line
        self.masked = b""  # `held` without escaped quotes and backslashes, as long
        self.more()
        self.at = len(BYTE_ORDER_MARK) if self.held.startswith(BYTE_ORDER_MARK) else 0

    def more(self) -> bool:
        """Read on; false at the end. As much as is held already, lest a long row is gone through for every small piece."""
        held = self.held[self.at :]
        if len(held) > MAX_ROW_BYTES:
            raise UserError(TOO_LONG, where=f"{self.path}:{self.line}", remedy=SHORTEN)
        piece = self.stream.read(max(CHUNK, len(held)))
        self.held, self.at = held + piece, 0
        self.masked = self.held.replace(rb"\\", b"__").replace(rb"\"", b"__")
        return bool(piece)

    def take(self, end: int) -> bytes:
        taken = self.held[self.at : end]
        self.line += taken.count(b"\n")
        self.at = end
        return taken

    def peek(self) -> bytes:
        """Return the next byte that is no space, empty at the end."""
        while True:
            self.take(SPACE.match(self.held, self.at).end())
            if self.at < len(self.held) or not self.more():
                return self.held[self.at : self.at + 1]

    def take_element(self) -> bytes:
        """Return the element that starts here, up to the bracket that closes it. Needs peek first."""
        if self.held[self.at : self.at + 1] not in (b"{", b"["):
            while (end := SCALAR.match(self.masked, self.at).end()) == len(self.held) and self.more():
                pass
            return self.take(end)
        size = depth = 0
        while True:
            end = UP_TO_BRACKET.match(self.masked, self.at + size).end()
            mark = self.masked[end : end + 1]
            if not mark:
                if not self.more():
                    raise self.not_json("the file ends within this row")
                continue
            depth += 1 if mark in b"{[" else -1
            size = end + 1 - self.at
            if depth == 0:
                return self.take(end + 1)

    def not_json(self, what: str) -> UserError:
        return _not_json(what, f"{self.path}:{self.line}")

    def found(self) -> str:
        return excerpt(self.held[self.at : self.at + 40].decode(errors="replace")) if self.peek() else "the end of the file"


def _array_elements(window: _Window) -> Iterator[tuple[int, bytes]]:
    """Yield (line, content) of every element. Only what lies between elements is looked at, so that a bad row does not end the reading."""
    window.peek()
    window.take(window.at + 1)
    mark = b"]" if window.peek() == b"]" else b","
    while mark != b"]":
        if window.peek() in (b"", b",", b"]", b"}"):
            raise window.not_json(f"expected a row, found {window.found()}")
        line = window.line
        yield line, window.take_element()
        mark = window.peek()
        if mark not in (b",", b"]"):
            raise _not_json(f"expected , or ] after this row, found {window.found()}", f"{window.path}:{line}")
        if mark == b",":
            window.take(window.at + 1)
    window.take(window.at + 1)
    line = window.line
    if window.peek():
        raise _not_json(f"found {window.found()} after the array", f"{window.path}:{line}")


def _object_without_repeats(pairs: list[tuple[str, object]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        [(repeated, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"field {excerpt(repeated)} occurs twice in one object")
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


STRICT_JSON = json.JSONDecoder(object_pairs_hook=_object_without_repeats, parse_constant=_refuse_constant)


def _parse_object(content: bytes, where: str) -> dict:
    if len(content) > MAX_ROW_BYTES:
        raise UserError(TOO_LONG, where=where, remedy=SHORTEN)
    try:
        text = content.decode().strip()
        row, end = STRICT_JSON.raw_decode(text)
        if SURROGATE.search(text):
            json.dumps(row, ensure_ascii=False).encode()  # half of a UTF-16 pair has no UTF-8 and would fail in the tokenizer
        if not isinstance(row, dict):
            raise UserError(f"expected an object with fields, found {excerpt(row)}", where=where, remedy='give each row as {"field": value, ...}')
    except UnicodeDecodeError as error:
        raise UserError(f"not valid UTF-8: byte {content[error.start]:#04x}", where=where, remedy="save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" + (f" of its line {error.lineno}" if error.lineno > 1 else "")
        raise _not_json(f"{error.msg} at {place}, found {excerpt(text[error.pos : error.pos + 40])}", where) from error
    except (ValueError, RecursionError) as error:
        raise _not_json(str(error), where, remedy="mend or remove the row") from error
    if end < len(text):
        raise _not_json(f"found {excerpt(text[end : end + 40], limit=40)} after the object", where)
    return row


def _not_json(what: str, where: str, remedy: str = NOT_JSON) -> UserError:
    return UserError(f"not valid JSON: {what}", where=where, remedy=remedy)
