"""What the person at the terminal sees of the steps of a run."""

import sys
import time
from typing import TextIO

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kto_ds.report.metrics_file import Record
from kto_ds.report.screen import duration, fit, terminal_of

# label, metric, format: of a plain line, which scripts read
SHOWN = (
    ("epoch", "epoch", ".2f"),
    ("skipped", "skipped_steps", "d"),
    ("loss", "loss", ".4f"),
    ("kl", "kl", ".3g"),
    ("margin", "rewards/margins", ".3g"),
    ("auc", "rewards/auc", ".3f"),
    ("lr", "learning_rate", ".1e"),
    ("grad", "grad_norm", ".3g"),
    ("tok/s", "tokens_per_second", ",.0f"),
    ("mfu", "mfu", ".1%"),
)
# and below the bar, the first ones first where there is no room for all
SHOWN_BELOW = (
    ("loss", "loss", ".4f"),
    ("margin", "rewards/margins", ".3g"),
    ("z", "kl", ".3g"),
    ("tok/s", "tokens_per_second", ",.0f"),
    ("MFU", "mfu", ".1%"),
    ("lr", "learning_rate", ".1e"),
    ("grad", "grad_norm", ".3g"),
    ("skipped", "skipped_steps", "d"),
)
GAP = "  "
ROOM_FOR_A_BAR = 8  # columns


class Console:
    """A bar on a terminal, redrawn once a second; one plain line a record elsewhere."""

    def __init__(self, total_steps: int, done_steps: int = 0, stream: TextIO | None = None):
        self._stream = stream or sys.stdout
        self._total_steps, self._done_steps, self._began = total_steps, done_steps, time.monotonic()
        self._last: Record | None = None  # of the training split
        self._stepping_since, self._last_at, self._seconds_left = self._began, self._began, 0.0
        self._terminal = terminal_of(self._stream)
        self._live = None
        if self._terminal:
            self._live = Live(get_renderable=self._view, console=self._terminal, refresh_per_second=1, redirect_stderr=sys.stderr.isatty())
            self._live.start()
            self._terminal.show_cursor()  # a run that is ended from outside would leave the terminal without one

    def log(self, record: Record) -> None:
        if record["split"] != "train":
            self.tell(GAP.join([record["split"], self._progress(record["step"]), *shown(record, SHOWN)]))
            return
        self._last_at = time.monotonic()
        steps_taken = max(record["step"] - self._done_steps, 1)
        if self._last is None:  # what came before the first step, such as answers of the untrained policy, does not come again
            self._stepping_since = self._last_at - steps_taken * record["seconds"]
        self._last = record
        self._seconds_left = (self._last_at - self._stepping_since) / steps_taken * (self._total_steps - record["step"])
        if self._live is None:
            self.tell(GAP.join([self._progress(record["step"]), *shown(record, SHOWN), f"eta {duration(self._seconds_left)}"]))
        else:
            self._live.refresh()

    def tell(self, line: str) -> None:
        if self._terminal is None:
            print(line, file=self._stream, flush=True)
        else:
            self._terminal.print(Text(line), soft_wrap=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()

    def _progress(self, step: int) -> str:
        return f"step {step}/{self._total_steps}"

    def _view(self) -> Group:
        """Return the bar with its times, and the metrics of the last record below it."""
        fit(self._terminal)  # which may have been resized
        now, width = time.monotonic(), self._terminal.width
        step = self._last["step"] if self._last else self._done_steps
        left = max(self._seconds_left - (now - self._last_at), 0)
        head = self._progress(step)
        tail = f"{step / self._total_steps:4.0%}  {duration(now - self._began)}" + (f"  eta {duration(left)}" if self._last else "")
        line = Table.grid(padding=(0, 1), expand=True)
        line.add_column(no_wrap=True, overflow="crop")  # an ellipsis is not in every encoding
        if len(head) + len(tail) + ROOM_FOR_A_BAR <= width:
            line.add_column(ratio=1)
            line.add_row(head, ProgressBar(total=self._total_steps, completed=step), tail)
        else:
            line.add_row(f"{head} {tail}")
        return Group(line, Text(fitting(shown(self._last or {}, SHOWN_BELOW), width), no_wrap=True, overflow="crop"))


def shown(record: Record, columns: tuple[tuple[str, str, str], ...]) -> list[str]:
    """Return the metrics of `columns` that the record has, each with its label."""
    return [f"{label} {record[metric]:{form}}" for label, metric, form in columns if metric in record]


def fitting(texts: list[str], width: int) -> str:
    """Return as many texts, from the first on, as fit side by side into the width."""
    while len(texts) > 1 and len(GAP.join(texts)) > width:
        texts = texts[:-1]
    return GAP.join(texts)
