"""How large a block of rows may be: what is read at once, handed to another process, and shown of a row that was refused."""

from collections.abc import Callable, Iterable, Iterator

MAX_BLOCK_ROWS = 1000
MAX_BLOCK_BYTES = 4 * 2**20
MAX_ROW_BYTES = 64 * 2**20
MAX_TEXT = 10_000  # characters of a row in the rejects file
TOO_LONG = f"a row is longer than {MAX_ROW_BYTES // 2**20} MiB"
SHORTEN = "is a comma, a quote or a line break missing? If not, shorten or remove the row"


def in_blocks(rows: Iterable[tuple], size_of: Callable[[tuple], int]) -> Iterator[list[tuple]]:
    """Cut into lists of at most 1,000 rows and 4 MiB; a larger row is alone. Depends on the rows only, so that all runs cut alike."""
    block, held = [], 0
    for row in rows:
        size = size_of(row)
        if block and (len(block) == MAX_BLOCK_ROWS or held + size > MAX_BLOCK_BYTES):
            yield block
            block, held = [], 0
        block.append(row)
        held += size
    if block:
        yield block
