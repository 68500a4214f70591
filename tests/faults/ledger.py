"""What the fault tests did, one JSON line each, for the table of docs/reliability.md; nothing is written outside of run.sh."""

import json
import os
from pathlib import Path


def record(fault_id: str, method: str, *, injected: int, survived: int, seconds: float, stock: str = "") -> None:
    """Note that `injected` faults were put in, of which `survived` ended as promised; `stock` is what plain DeepSpeed made of them, where that was measured."""
    if path := os.environ.get("KTO_FAULT_LEDGER"):
        entry = {"id": fault_id, "method": method, "injected": injected, "survived": survived, "seconds": round(seconds, 1), "stock": stock}
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
