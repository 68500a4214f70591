"""How an inspected dataset is written to a terminal or a pipe: decoded tokens, escapes, tables of counts, the fill of micro-batches.

Whatever comes out of the data is escaped here before it is printed, and colour only repeats what the text says.
"""

import os
import sys
from collections.abc import Iterable
from io import TextIOWrapper
from typing import NamedTuple

import numpy as np
from rich.console import Console, Group
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

COLUMNS_WITHOUT_TERMINAL = 120
MICRO_BATCHES_SHOWN = 48
BAR_CELLS = 20
COLUMNS_SIDE_BY_SIDE = 4
TOKENS_SHOWN = 200  # of a text; the middle of a longer one is left out


class Reader(NamedTuple):
    """What turns token ids into text."""

    tokenizer: PreTrainedTokenizerBase
    special_ids: set[int]


class Fill(NamedTuple):
    """One micro-batch of one rank; ranks from 0, micro-batches from 1. Without units it is a filler."""

    rank: int
    number: int
    units: int
    prompts: int  # distinct ones
    pairs: int
    tokens: int  # real ones
    used: int  # of the token budget, padding included


def open_console() -> Console:
    """Return a console on standard output that decides on colours by itself: none in a pipe, nor where NO_COLOR is set."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # where the encoding lacks a character, its code point is shown
    # In a pipe nobody has said how wide a line may be, and rich would take 80 columns.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else COLUMNS_WITHOUT_TERMINAL
    return Console(width=width, markup=False, highlight=False, emoji=False)


def visible(text: str) -> str:
    """Return `text` with a sign at the end of each line, and escapes for all that does not print: control, format and bidirectional characters."""
    return "".join(char if char.isprintable() else "⏎\n" if char == "\n" else char.encode("unicode_escape").decode() for char in text)


def in_one_line(text: str) -> str:
    """The same for names, which have one line."""
    return visible(text).replace("⏎\n", "\\n")


def count_of(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def decoded(reader: Reader, ids: np.ndarray, style: str, *, most: int = TOKENS_SHOWN, after: np.ndarray | None = None) -> Text:
    """Return the text of the token ids [N], escaped, with special tokens marked; of many more than `most` tokens the middle is left out.

    `after` are the ids before: some tokenizers drop the space that begins a text, and only what stands before it brings it back.
    """
    ids, before = ids.tolist(), [] if after is None else after[-1:].tolist()
    if len(ids) <= 1.25 * most:  # to leave out a token or two helps nobody
        return _runs(reader, ids, before, style)
    head, left_out, tail = ids[: most // 2], ids[most // 2 : -(most // 2)], ids[-(most // 2) :]
    return Text.assemble(_runs(reader, head, before, style), (f" [... {count_of(len(left_out), 'token')} left out ...] ", "bold"), _runs(reader, tail, left_out[-1:], style))


def _runs(reader: Reader, ids: list[int], before: list[int], style: str) -> Text:
    """Decode ordinary tokens in stretches, since a character may take several of them, and special tokens one by one."""
    text, run = Text(), []
    for token_id in [*ids, None]:
        if token_id is not None and token_id not in reader.special_ids:
            run.append(token_id)
            continue
        if run:
            text.append(visible(_decode_after(reader.tokenizer, before, run)), style)
            before, run = run[-1:], []
        if token_id is not None:
            text.append(f"⟦{visible(reader.tokenizer.decode([token_id]))}⟧", "bold magenta")
            before = [token_id]
    if text.plain.endswith("\n"):
        text.right_crop(1)  # the sign of the line's end is enough
    return text


def _decode_after(tokenizer: PreTrainedTokenizerBase, before: list[int], ids: list[int]) -> str:
    alone, start, whole = (tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in (ids, before, before + ids))
    return whole.removeprefix(start) if whole.startswith(start) else alone


def heading(console: Console, text: str, style: str = "") -> None:
    console.print()
    title = Text(in_one_line(text), style=f"bold {style}")
    if title.cell_len + len(" ─") > console.width:  # a rule would cut it short
        console.print(title, soft_wrap=True)
    else:
        console.print(Rule(title, align="left", style=style or "none"))


def counts_by_split(report: dict[str, dict]) -> Group:
    """Return the counts of the splits side by side, of a few at a time; those of their sources are left out."""
    return Group(*_tables({name: _flatten({key: value for key, value in counts.items() if key != "sources"}) for name, counts in report.items()}))


def counts_by_source(split: str, sources: list[dict]) -> Group:
    """Return the paths of a split's sources, numbered, and a line of counts for each number: many may be listed, and paths are long."""
    paths = [source["path"] + (f", split {source['split']}" if source["split"] else "") for source in sources]
    lines = [Text(f"{number}. {in_one_line(path)}", no_wrap=True, overflow="ignore") for number, path in enumerate(paths, start=1)]
    counts = {f"{number}.": _flatten({key: value for key, value in source.items() if key not in ("path", "split")}) for number, source in enumerate(sources, start=1)}
    return Group(Text(f"\nsources of {in_one_line(split)}", style="bold"), *lines, *_tables(counts))


def _tables(columns: dict[str, dict[str, object]]) -> list[Table]:
    entries = list(columns.items())
    return [_table(dict(entries[start : start + COLUMNS_SIDE_BY_SIDE])) for start in range(0, len(entries), COLUMNS_SIDE_BY_SIDE)]


def _table(columns: dict[str, dict[str, object]]) -> Table:
    """Return a table with a row for every key that any column has."""
    table = figures_table("", [in_one_line(name) for name in columns])
    for key in dict.fromkeys(key for column in columns.values() for key in column):
        table.add_row(in_one_line(key), *(_written(column.get(key, "")) for column in columns.values()))
    return table


def figures_table(first: str, columns: Iterable[str]) -> Table:
    """Return a table without rows yet: `first` heads a column of labels, `columns` those of figures."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(first, no_wrap=True)  # what is folded is the figures; with a min_width rich would cut off the last of them
    for column in columns:
        table.add_column(column, justify="right", vertical="bottom", overflow="fold")
    return table


def _flatten(counts: dict, prefix: str = "") -> dict[str, object]:
    """Return nested counts as one mapping, its keys in words."""
    flat: dict[str, object] = {}
    for key, value in counts.items():
        words = prefix + key.replace("_", " ")
        flat.update(_flatten(value, f"{words}: ") if isinstance(value, dict) else {words: value})
    return flat


def _written(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"
    return in_one_line(str(value)) if not isinstance(value, list) else ", ".join(map(_written, value)) or "none"


def fill_table(title: str, fills: list[Fill], *, num_prompts: int, max_tokens: int, ascii_only: bool) -> Table:
    """Return a line a micro-batch, up to MICRO_BATCHES_SHOWN, and the total of all; `num_prompts` distinct prompts are in them together."""
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("rank", "micro-batch", "units", "prompts", "pairs", "tokens"):
        table.add_column(column, justify="right")
    table.add_column(f"fill of {max_tokens:,} tokens", no_wrap=True)
    for fill in fills[:MICRO_BATCHES_SHOWN]:
        bar = _bar(fill.used / max_tokens, ascii_only) if fill.units else "filler, scores nothing"
        table.add_row(*(f"{count:,}" for count in fill[:6]), Text(bar, style="" if fill.units else "dim"))
    if len(fills) > MICRO_BATCHES_SHOWN:
        table.add_row("...", *[""] * 5, f"{len(fills) - MICRO_BATCHES_SHOWN:,} more micro-batches")
    total = Fill(*(sum(column) for column in zip(*fills, strict=True)))
    counts = (len(fills), total.units, num_prompts, total.pairs, total.tokens)
    table.add_row("all", *(f"{count:,}" for count in counts), _bar(total.used / (max_tokens * len(fills)), ascii_only), style="bold")
    return table


def _bar(share: float, ascii_only: bool) -> str:
    full, empty = "#." if ascii_only else "█░"
    cells = min(round(BAR_CELLS * share), BAR_CELLS)
    return f"{full * cells}{empty * (BAR_CELLS - cells)} {share:>4.0%}{' too long' if share > 1 else ''}"
