"""How large a block of rows may be: what is read at once, handed to another process, and shown of a row that was refused."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

MAX_BLOCK_ROWS = 1000
MAX_BLOCK_BYTES = 4 * 2**20
MAX_ROW_BYTES = 64 * 2**20
MAX_TEXT = 10_000  # characters of a row in the rejects file
TOO_LONG = f"a row is longer than {MAX_ROW_BYTES // 2**20} MiB"
SHORTEN = "is a comma, a quote or a line break missing? If not, shorten or remove the row"


T = TypeVar("T")


def in_blocks(parts: Iterable[T], size_of: Callable[[T], int], rows_of: Callable[[T], int] = lambda _: 1) -> Iterator[list[T]]:
    """Cut into lists of at most 1,000 rows and 4 MiB; a larger part is alone. Depends on the parts only, so that all runs cut alike.

    A part is a row, or several in one where `rows_of` says how many.
    """
    block, held, num_rows = [], 0, 0
    for part in parts:
        size, count = size_of(part), rows_of(part)
        if block and (num_rows + count > MAX_BLOCK_ROWS or held + size > MAX_BLOCK_BYTES):
            yield block
            block, held, num_rows = [], 0, 0
        block.append(part)
        held += size
        num_rows += count
    if block:
        yield block
