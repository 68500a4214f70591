"""How a reference artefact is written to a terminal or a pipe: what made it, which pairs it has, how likely the reference finds them.

Legend: E examples; pairs i < E are matched, pairs E + i mismatched.
"""

from typing import NamedTuple

import numpy as np
from rich.table import Table

from kto_ds.errors import excerpt
from kto_ds.report.inspection import count_of, figures_table, in_one_line

DIGITS_SHOWN = 12  # of a digest
PERCENTILES = (5, 50, 95)
LOWEST_SHOWN = 3


class Scored(NamedTuple):
    """What the reference artefact has of a split."""

    logps: np.ndarray  # [2E] float64, nats of the whole completion, NaN where it has none
    lengths: np.ndarray  # [2E] tokens of the completion
    desirable: np.ndarray  # [E] bool
    num_needed: int  # pairs that the loss reads: 2E, or the E matched ones

    @property
    def per_token(self) -> np.ndarray:
        return self.logps / self.lengths

    @property
    def num_absent(self) -> int:
        return int(np.isnan(self.logps[: self.num_needed]).sum())


def facts_table(made: dict) -> Table:
    """Return what made an artefact, one fact a line. `made` is its manifest, or the state of an unfinished one; what it does not say is left out."""
    identity, origin, libraries = (made[key] if isinstance(made.get(key), dict) else {} for key in ("identity", "origin", "libraries"))
    quantized = identity.get("quantization")
    facts = {
        "model": origin.get("model.path"),
        "revision": origin.get("model.revision") or "none",
        "digest of its files": str(identity.get("reference model"))[:DIGITS_SHOWN],
        "dtype": identity.get("dtype"),
        "quantisation": "none" if quantized in (None, "null") else quantized,
        "layout": made.get("layout"),
        "attention kernel": made.get("attention"),
        "other kernels": made.get("kernels"),
        "single tokens": "each has its log-prob" if made.get("per_token") is True else "no, sums only",
        "libraries": ", ".join(f"{name} {version}" for name, version in libraries.items()),
    }
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if value and (origin or name not in ("model", "revision")):
            table.add_row(name, in_one_line(str(value)))
    return table


def coverage_table(splits: dict[str, Scored]) -> Table:
    """Return, for each split, how many of the pairs that the loss reads have a log-prob."""
    table = figures_table("pairs with a log-prob", ["matched", "mismatched"])
    for name, scored in splits.items():
        size = len(scored.desirable)
        halves = [np.isfinite(half) for half in (scored.logps[:size], scored.logps[size : scored.num_needed])]
        table.add_row(in_one_line(name), *(f"{half.sum():,} of {len(half):,}" if len(half) else "not needed" for half in halves))
    return table


def logp_table(splits: dict[str, Scored]) -> Table:
    """Return percentiles of the log-prob a token: of the matched pairs of each label, and of the mismatched pairs."""
    table = figures_table("log-prob in nats a token", ["pairs", *(f"{percent}th percentile" if percent != 50 else "median" for percent in PERCENTILES)])
    for name, scored in splits.items():
        matched, mismatched = np.split(scored.per_token, 2)
        for kind, values in (("desirable", matched[scored.desirable]), ("undesirable", matched[~scored.desirable]), ("mismatched", mismatched)):
            values = values[np.isfinite(values)]
            if len(values):
                table.add_row(f"{in_one_line(name)}: {kind}", f"{len(values):,}", *(f"{value:.2f}" for value in np.percentile(values, PERCENTILES)))
    return table


def lowest_examples(scored: Scored, keys: np.ndarray) -> list[int]:
    """Return up to LOWEST_SHOWN examples whose completion the reference finds least likely a token, a text that is there twice once; `keys` [2E, 2]."""
    matched = scored.per_token[: len(scored.desirable)]
    found: dict[bytes, int] = {}
    for example in np.argsort(matched, kind="stable")[: np.isfinite(matched).sum()].tolist():
        found.setdefault(keys[example].tobytes(), example)
        if len(found) == LOWEST_SHOWN:
            break
    return list(found.values())


def nats(scored: Scored, pair: int) -> str:
    """Return the log-prob of a pair in words."""
    logp = float(scored.logps[pair])
    return "no log-prob" if np.isnan(logp) else f"{logp:,.1f} nats, {logp / int(scored.lengths[pair]):.2f} a token"


def listed(head: str, lines: list[str]) -> str:
    """Return a head and, indented, its lines, each of which takes one line whatever it holds."""
    return "\n  ".join([head, *map(in_one_line, lines)])


def differing_fields(expected: dict, found: dict) -> list[str]:
    """Return one line for each field of `expected` that has another value in `found`."""
    return [f"{key}: this run has {excerpt(value)}, the artefact has {excerpt(found.get(key))}" for key, value in expected.items() if found.get(key) != value]


def verdict(is_complete: bool, differences: list[str], splits: dict[str, Scored], remedy: str) -> list[str]:
    """Return what train will say to the artefact, as far as that can be told without its weights; `differences` are those of what it was made for."""
    if not is_complete:
        return [listed("notice: begun for another run:", differences)] if differences else []
    refused = "notice: train will refuse this artefact"
    lines = [listed(f"{refused}: {remedy}", differences)] if differences else []
    absent, needed = sum(split.num_absent for split in splits.values()), sum(split.num_needed for split in splits.values())
    if absent:
        lines.append(f"{refused}: {absent:,} of {count_of(needed, 'pair')} have no log-prob; {remedy}")
    return lines or ["train would find every pair; it also compares the weights, not read here"]
