"""What the fault tests did, one JSON line each, for the table of docs/reliability.md; nothing is written outside of run.sh."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def record(fault_id: str, method: str, *, injected: int, survived: int, seconds: float, stock: str = "") -> None:
    """Note that `injected` faults were put in, of which `survived` ended as promised; `stock` is what plain DeepSpeed made of them, where that was measured."""
    if path := os.environ.get("KTO_FAULT_LEDGER"):
        entry = {"id": fault_id, "method": method, "injected": injected, "survived": survived, "seconds": round(seconds, 1), "stock": stock}
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


class Tally:
    """Counts of one test."""

    def __init__(self):
        self.injected, self.survived = 0, 0


@contextmanager
def tally(fault_id: str, method: str, *, stock: str = "") -> Iterator[Tally]:
    """Record what is counted in the block with the time it took, also when it fails: a fault that was put in and not survived is what the table is for."""
    counts, began = Tally(), time.monotonic()
    try:
        yield counts
    finally:
        if counts.injected:
            record(fault_id, method, injected=counts.injected, survived=counts.survived, seconds=time.monotonic() - began, stock=stock)
