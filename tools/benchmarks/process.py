"""A measurement in a process of its own, and what is counted in it: CPU time, memory, tokens."""

import multiprocessing
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import wraps
from pathlib import Path
from typing import NamedTuple

import torch

# No library may find a second thread, a GPU or the network. DeepSpeed reads its variable on import, hence in the environment.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}


class Spent(NamedTuple):
    """What one span cost."""

    cpu_seconds: float  # of all threads
    system_seconds: float  # of these in the kernel, such as for memory asked for anew
    wall_seconds: float
    tokens_processed: int  # that went through the model, padding included
    peak_bytes: int  # the most that was resident in RAM meanwhile


def in_fresh_process(function: Callable, *arguments):
    """Run a function of a module where nothing was imported, allocated or cached before. Unlike a pool's, such a process may have workers of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def in_fresh_ranks(num_ranks: int, function: Callable, *arguments) -> list:
    """Run the function in as many processes as ranks of one run, each of one thread; return their results in rank order."""
    from kto_ds.runtime.collectives import free_port  # here, as DeepSpeed reads the environment on import

    port = free_port()
    with ProcessPoolExecutor(num_ranks, mp_context=multiprocessing.get_context("spawn")) as executor:
        return [future.result() for future in [executor.submit(_as_rank, rank, num_ranks, port, function, *arguments) for rank in range(num_ranks)]]


def _as_rank(rank: int, num_ranks: int, port: int, function: Callable, *arguments):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return function(*arguments)


class Meter:
    """What this process spends from the last start on, as often as one asks. All embeddings count their tokens for it."""

    def __init__(self):
        self._tokens, embed = 0, torch.nn.Embedding.forward

        def counting(embedding, ids):
            self._tokens += ids.numel()
            return embed(embedding, ids)

        torch.nn.Embedding.forward = counting
        self.start()

    def start(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak, begins again at what is resident now; Linux only
        self._tokens, self._began = 0, (time.process_time(), os.times().system, time.perf_counter())

    def read(self) -> Spent:
        now = (time.process_time(), os.times().system, time.perf_counter())
        return Spent(*(after - before for before, after in zip(self._began, now)), self._tokens, memory_bytes("VmHWM"))


def memory_bytes(field: str) -> int:
    """Return a field of this process's memory, such as VmRSS, what is resident in RAM now."""
    return int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def measured(function: Callable, spans: list[Spent]) -> Callable:
    """Return the function such that every call appends what it cost to `spans`."""
    meter = Meter()

    @wraps(function)
    def measuring(*arguments, **named):
        meter.start()
        result = function(*arguments, **named)
        spans.append(meter.read())
        return result

    return measuring
