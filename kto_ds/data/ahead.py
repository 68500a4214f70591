"""Work that is done one item ahead, so that its consumer does not wait for it."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")


def ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield function(item) for every item, in order, while a thread already computes the next one. Its errors are raised where its result is due."""
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as executor:
        pending = None
        for item in items:
            following = executor.submit(function, item)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()
