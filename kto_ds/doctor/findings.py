"""What the doctor found out: one record a check, and how all of them are told."""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple

from rich.console import Console
from rich.table import Table

from kto_ds.errors import UserError
from kto_ds.redaction import redact

Verdict = Literal["ok", "warn", "wrong"]
COLOURS = {"ok": "green", "warn": "yellow", "wrong": "red"}
GIB = 1 << 30
WIDTH = 150  # characters, where the output is no terminal


class Finding(NamedTuple):
    """The outcome of a check. `warn`: it may cost speed or hours; `wrong`: the run would fail, hang, or compute something else."""

    name: str
    found: str
    verdict: Verdict = "ok"
    remedy: str = ""


def wrong_by(name: str, error: UserError) -> Finding:
    """Return the finding of a check that the run's own code has refused."""
    return Finding(name, f"{error.where}: {error.what}" if error.where else error.what, "wrong", error.remedy)


def worst(name: str, findings: Sequence[Finding], *, otherwise: str) -> Finding:
    """Return several findings of one check as one, those of its worst verdict only; `otherwise` is what was found where nothing is the matter."""
    for verdict in ("wrong", "warn"):
        if chosen := [finding for finding in findings if finding.verdict == verdict]:
            remedies = dict.fromkeys(finding.remedy for finding in chosen if finding.remedy)
            return Finding(name, "\n".join(dict.fromkeys(finding.found for finding in chosen)), verdict, "\n".join(remedies))
    return Finding(name, otherwise)


def check_settings(advice: Sequence[str]) -> Finding:
    """Tell the advice on the run's settings, which may cost its result but never stops it."""
    return Finding("settings", "\n".join(line.removeprefix("advice: ") for line in advice), "warn") if advice else Finding("settings", "as the KTO paper and TRL recommend")


def odd_ranks(values: Sequence[Hashable]) -> list[int]:
    """Return the ranks whose value is not that of most ranks; of several values as frequent, that of the lowest rank counts."""
    usual = [value for value, _ in Counter(values).most_common(1)]
    return [rank for rank, value in enumerate(values) if value not in usual]


def in_ranges(ranks: Sequence[int]) -> str:
    """Return ascending ranks in words: `rank 3`, `ranks 0-7, 12`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return f"rank{'s' if len(ranks) > 1 else ''} " + ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def in_words(num_bytes: int) -> str:
    return f"{num_bytes / GIB:,.1f} GiB" if num_bytes >= GIB else f"{num_bytes / (1 << 20):,.1f} MiB"


def show(findings: Sequence[Finding]) -> None:
    """Print the table of all findings."""
    table = Table(title="kto-ds doctor", title_justify="left", header_style="bold")
    table.add_column("check", no_wrap=True)
    table.add_column("found", ratio=3)
    table.add_column("verdict", no_wrap=True)
    table.add_column("remedy", ratio=2)
    for name, found, verdict, remedy in findings:
        table.add_row(name, redact(_printable(found)), verdict, redact(_printable(remedy)), style=None if verdict == "ok" else COLOURS[verdict])
    console = Console(markup=False, highlight=False)
    Console(markup=False, highlight=False, width=console.width if console.is_terminal else WIDTH).print(table)


def _printable(text: str) -> str:
    # What is shown comes from the environment and from files of others: none may write control codes to a terminal.
    return "".join(character if character == "\n" or character.isprintable() else ascii(character)[1:-1] for character in text)


def refuse_what_is_wrong(findings: Sequence[Finding]) -> None:
    """Raise UserError with everything that is wrong and the remedy of each, if anything is."""
    wrong = [finding for finding in findings if finding.verdict == "wrong"]
    if wrong:
        lines = [f"{number}. {name}: {found}\n     remedy: {remedy}".replace("\n", "\n  ") for number, (name, found, _, remedy) in enumerate(wrong, start=1)]
        raise UserError("\n  ".join([f"{len(wrong)} thing{'s are' if len(wrong) > 1 else ' is'} wrong:", *lines]), where="doctor")
