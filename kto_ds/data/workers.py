"""A few processes that each hold a tokenizer, and work through tasks in order. Results come in the order of the tasks."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import NamedTuple

from kto_ds.data.tokenization import RowTokenizer, TextRules, load_tokenizer
from kto_ds.errors import KtoError

# Starting processes costs seconds, as much as some blocks of 1,000 rows: small data stays in this one.
MIN_TASKS_FOR_PROCESSES = 5
MAX_DEFAULT_PROCESSES = 16  # each takes about half a GiB; who has the memory may ask for more
TASKS_AHEAD = 3  # for each process: enough to keep it busy, few enough to bound the memory


class TokenizerSource(NamedTuple):
    """Where a process finds its tokenizer."""

    path: str
    revision: str | None
    trust_remote_code: bool
    rules: TextRules


class Workers:
    """`with Workers(source, num_proc) as workers: workers.map(function, tasks)`; `function` gets the process's RowTokenizer first."""

    def __init__(self, source: TokenizerSource, num_proc: int | None):
        self.num_proc = num_proc or min(len(os.sched_getaffinity(0)), MAX_DEFAULT_PROCESSES)
        self._source = source
        self._pool: ProcessPoolExecutor | None = None
        self._own: RowTokenizer | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable, tasks: Iterable[tuple]) -> Iterator:
        """Yield function(row_tokenizer, *task) of every task, in order; `tasks` is read only as far as the work has come."""
        tasks = iter(tasks)
        first = list(islice(tasks, MIN_TASKS_FOR_PROCESSES))
        if self.num_proc == 1 or (len(first) < MIN_TASKS_FOR_PROCESSES and self._pool is None):
            self._own = self._own or _row_tokenizer(self._source)
            yield from (function(self._own, *task) for task in chain(first, tasks))
        else:
            yield from self._map_in_pool(function, chain(first, tasks))

    def _map_in_pool(self, function: Callable, tasks: Iterator[tuple]) -> Iterator:
        if self._pool is None:
            # Spawned, not forked: the tokenizer and Arrow have threads, whose locks a fork would copy as they stand.
            self._pool = ProcessPoolExecutor(self.num_proc, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(self._source,))
        waiting: deque[Future] = deque()
        try:
            for task in tasks:
                with _deaf_to_interrupts():  # which the processes that this starts inherit: the main one ends the work, and says so once
                    waiting.append(self._pool.submit(_run, function, task))
                if len(waiting) >= self.num_proc * TASKS_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise KtoError("a worker process died, perhaps for lack of memory; run the command again to go on, with a smaller data.dataset_num_proc") from error
        finally:
            for future in waiting:
                future.cancel()


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _row_tokenizer(source: TokenizerSource) -> RowTokenizer:
    return RowTokenizer(load_tokenizer(source.path, revision=source.revision, trust_remote_code=source.trust_remote_code), source.rules)


_worker_tokenizer: RowTokenizer | None = None  # of this process, when it is a worker


def _start_worker(source: TokenizerSource) -> None:
    global _worker_tokenizer
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _worker_tokenizer = _row_tokenizer(source)


def _die_with_parent() -> None:
    """A main process that was killed cannot end its workers, and they would wait for tasks for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _run(function: Callable, task: tuple):
    return function(_worker_tokenizer, *task)
