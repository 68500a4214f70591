"""The table of docs/reliability.md from what the fault tests noted: `python -m tests.faults.table LEDGER PAGE`."""

import json
import os
import platform
import sys
from collections.abc import Iterable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import psutil

BEGIN, END = "<!-- fault table: begin, written by tests/faults/run.sh -->", "<!-- fault table: end -->"
LIBRARIES = ("deepspeed", "torch", "transformers")


class Row(NamedTuple):
    fault_id: str
    what: str
    stock: str = ""  # plain DeepSpeed, as measured in a prototype study on the same versions


ROWS = [
    Row("R1", "resume at every save point, bit for bit", "saves no random state: losses differ from the first resumed step where it matters"),
    Row("R2", "kill -9 at named places", "8 of 12 kills during saves of one tag left `latest` on a checkpoint that does not load"),
    Row("R3", "kill -9 of training at random moments", "as R2"),
    Row("R4", "kill -9 of precompute-ref", "has no such stage"),
    Row("R5", "a second fault during the recovery"),
    Row("R6", "flipped bits in a checkpoint", "torch.load noticed 0 of 300, safetensors 0 of 300"),
    Row("R7", "files cut, zeroed, deleted, swapped, added", "cut: an OSError, 6 of 6; a missing `latest` starts from scratch without a word"),
    Row("R8", "damaged artefacts, artefacts of another run"),
    Row("R9", "disk full", "`unexpected pos 2103552 vs 2103440`; 6 MB of debris keep the disk full"),
    Row("R10", "read-only folders"),
    Row("R11", "SIGTERM, SIGUSR1, SIGINT, wall time", "the launcher signals one rank at a time, up to 30 s each"),
    Row("R12", "launchers: a rank dies, the launcher is killed", "SIGTERM to the runner leaves orphans; kill -9 of the launcher ends with code 0"),
    Row("R13", "death of a rank", "39 s until the others end, code 247"),
    Row("R14", "a rank hangs", "gloo: an error after the whole timeout, 15.0 s of 15 s"),
    Row("R15", "NaN, infinity, spikes", "skips the step, counts it, never stops"),
    Row("R16", "another number of ranks", "every group gets the first one's lr and weight decay; Adam's step 4 becomes 16 after 6 steps"),
    Row("R17", "order of the data"),
    Row("R18", "wandb unreachable, killed, without space"),
    Row("R19", "bad inputs"),
    Row("R20", "fuzzed rows, configs, manifests"),
    Row("R21", "untrusted models, configs, templates, artefacts", "a pickled checkpoint ran code when loaded"),
    Row("R22", "secrets"),
    Row("R23", "2,000 steps, a save every 10: leaks"),
    Row("R24", "two starts in one folder"),
    Row("R25", "checkpoints of another version"),
    Row("R26", "safeguards taken out one at a time: does a test fail?"),
    Row("R27", "cost of a save above DeepSpeed's own"),
]


def rows_of(entries: Iterable[dict]) -> list[str]:
    """Return the lines of the table: a fault without an entry says so, several entries of one fault are added up."""
    found: dict[str, list[dict]] = {}
    for entry in entries:
        found.setdefault(entry["id"], []).append(entry)
    if unknown := found.keys() - {row.fault_id for row in ROWS}:
        raise ValueError(f"no row for {', '.join(sorted(unknown))}")
    lines = ["| id | what | method | injected | survived | seconds | plain DeepSpeed |", "|---|---|---|---|---|---|---|"]
    for row in ROWS:
        notes = found.get(row.fault_id, [])
        methods = "; ".join(dict.fromkeys(note["method"] for note in notes)) or "not run"
        figures = [f"{sum(note[name] for note in notes):,.0f}" for name in ("injected", "survived", "seconds")] if notes else ["", "", ""]
        stock = "; ".join(dict.fromkeys(filter(None, [row.stock, *(note["stock"] for note in notes)])))
        lines.append(f"| {' | '.join(text.replace('|', '/') for text in (row.fault_id, row.what, methods, *figures, stock))} |")
    return lines


def put_in(page: str, lines: list[str]) -> str:
    """Return the page with the lines between its two marks; ValueError when it has not both."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"the page needs one line {BEGIN} and after it one line {END}")
    return "\n".join([page[: page.index(BEGIN)] + BEGIN, *lines, page[page.index(END) :]])


def machine_line() -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    gib = psutil.virtual_memory().total / 2**30
    return f"{date.today()}, Python {platform.python_version()}, {libraries}; {len(os.sched_getaffinity(0))} cores, {gib:.0f} GiB, gloo on CPU, {platform.system()} {platform.machine()}."


def main(ledger: Path, page: Path) -> None:
    entries = [json.loads(line) for line in ledger.read_text(encoding="utf-8").splitlines()]
    page.write_text(put_in(page.read_text(encoding="utf-8"), ["", *rows_of(entries), "", machine_line(), ""]), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
