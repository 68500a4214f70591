"""How things are shown: on a terminal in boxes and bars that fit its width, in a pipe or a log file as plain lines without control codes."""

import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TextIO

from rich.box import ROUNDED
from rich.console import Console as Terminal
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

DEFAULT_COLUMNS = 80  # of a terminal that does not know
LINE_SECONDS = 30.0  # between two lines of a work bar that is no bar

Rows = Sequence[tuple[str, str]]  # label, value


def terminal_of(stream: TextIO) -> Terminal | None:
    """Return the terminal that the stream is, None where it is none that can redraw a line. Colours are left out with NO_COLOR."""
    if not stream.isatty():  # whatever FORCE_COLOR may say
        return None
    terminal = Terminal(file=stream, highlight=False, markup=False)
    if terminal.is_dumb_terminal or not terminal.is_terminal:
        return None
    fit(terminal)
    return terminal


def fit(terminal: Terminal) -> None:
    """Take the width of the stream itself: rich asks the streams of the process."""
    with suppress(OSError):  # of a terminal that is gone
        terminal.width = os.get_terminal_size(terminal.file.fileno()).columns or DEFAULT_COLUMNS


def plain_lines(title: str, rows: Rows) -> list[str]:
    """Return a box without its frame: its title, and one line a row."""
    width = max((len(label) for label, _ in rows), default=0)
    return [title, *(f"  {label:<{width}}  {value}" for label, value in rows)]


def show(title: str, rows: Rows, stream: TextIO | None = None) -> None:
    """Print labelled values: as a box on a terminal, where long values are folded, else as plain lines."""
    stream = stream or sys.stdout
    title, rows = _printable(title), [(label, _printable(value)) for label, value in rows]
    terminal = terminal_of(stream)
    if terminal is None:
        print("\n".join(plain_lines(title, rows)), file=stream, flush=True)
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True, overflow="crop")
    grid.add_column(overflow="fold")
    for label, value in rows:
        grid.add_row(Text(label), Text(value))
    terminal.print(Panel(grid, title=Text(title, style="bold"), title_align="left", box=ROUNDED, border_style="dim"))


def _printable(text: str) -> str:
    """Spell out control codes: paths and names come from files, and none may write them to a terminal."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


class WorkBar:
    """How far a piece of work is, on stderr: a bar on a terminal, elsewhere a line twice a minute."""

    def __init__(self, what: str, *, unit: str, total: int | None = None, is_shown: bool = True, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._what, self._unit, self._total, self._is_shown = what, unit, total, is_shown
        self._done, self._began = 0, time.monotonic()
        self._told_at = self._began
        on_terminal = is_shown and terminal_of(self._stream) is not None
        self._bar = tqdm(desc=what, total=total, unit=unit, unit_scale=True, dynamic_ncols=True, file=self._stream) if on_terminal else None

    def advance(self, amount: int) -> None:
        self._done += amount
        if self._bar is not None:
            self._bar.update(amount)
        elif self._is_shown and time.monotonic() - self._told_at >= LINE_SECONDS:
            self._told_at = time.monotonic()
            print(work_line(self._what, self._done, self._total, self._unit, self._told_at - self._began), file=self._stream, flush=True)

    def tell(self, line: str) -> None:
        """Print a line of its own to stdout, above the bar if there is one."""
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.write(line)

    def __enter__(self) -> "WorkBar":
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()


def work_line(what: str, done: int, total: int | None, unit: str, seconds: float) -> str:
    """Return what a work bar says in a log file after so many seconds."""
    rate = done / seconds if seconds > 0 else 0.0
    amount, unit = tqdm.format_sizeof(done), unit.strip()
    if total is None or not rate:
        return f"{what}: {amount} {unit}, {tqdm.format_sizeof(rate)} {unit}/s"
    return f"{what}: {amount} of {tqdm.format_sizeof(total)} {unit}, {tqdm.format_sizeof(rate)} {unit}/s, eta {duration((total - done) / rate)}"


def counted(number: float, thing: str) -> str:
    """Return a number, to three digits where it is no whole one, and the thing in its singular or plural: 1 step, 12 steps."""
    text = f"{number:,}" if isinstance(number, int) else f"{number:.3g}"
    return f"{text} {thing}{'' if text == '1' else 's'}"


def duration(seconds: float) -> str:
    """Return `seconds` in its two largest units: 45s, 3m12s, 1h04m, 2d03h."""
    minutes, hours, days = int(seconds) // 60, int(seconds) // 3600, int(seconds) // 86400
    if days:
        return f"{days}d{hours % 24:02}h"
    if hours:
        return f"{hours}h{minutes % 60:02}m"
    return f"{minutes}m{int(seconds) % 60:02}s" if minutes else f"{int(seconds)}s"
