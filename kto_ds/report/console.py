"""What the person at the terminal sees of a run."""

import sys
import time
from typing import TextIO

from tqdm import tqdm

from kto_ds.report.metrics_file import Record

# label, metric, format
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
)
SHOWN_IN_BAR = ("loss", "margin", "kl", "tok/s")


def bar_interval() -> float:
    """Return the least seconds between two states of a bar on stderr: in a file each of them is a line."""
    return 0.5 if sys.stderr.isatty() else 30.0


class Console:
    """A bar on a terminal, one line a record elsewhere."""

    def __init__(self, total_steps: int, done_steps: int = 0, stream: TextIO | None = None):
        self._stream = stream or sys.stdout
        self._total_steps, self._done_steps, self._began = total_steps, done_steps, time.monotonic()
        self._bar = tqdm(total=total_steps, initial=done_steps, unit="step", dynamic_ncols=True, file=self._stream) if self._stream.isatty() else None

    def log(self, record: Record) -> None:
        shown = {label: f"{label} {record[metric]:{form}}" for label, metric, form in SHOWN if metric in record}
        progress = f"step {record['step']}/{self._total_steps}"
        if record["split"] != "train":
            self.tell("  ".join([f"{record['split']}  {progress}", *shown.values()]))
        elif self._bar is None:
            self.tell("  ".join([progress, *shown.values(), f"eta {duration(self._seconds_left(record['step']))}"]))
        else:
            self._bar.set_postfix_str("  ".join(shown[label] for label in SHOWN_IN_BAR if label in shown), refresh=False)
            self._bar.update(record["step"] - self._bar.n)

    def tell(self, line: str) -> None:
        if self._bar is None:
            print(line, file=self._stream, flush=True)
        else:
            self._bar.write(line, file=self._stream)

    def _seconds_left(self, step: int) -> float:
        steps_taken = max(step - self._done_steps, 1)
        return (time.monotonic() - self._began) / steps_taken * (self._total_steps - step)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """Return `seconds` in its two largest units: 45s, 3m12s, 1h04m, 2d03h."""
    minutes, hours, days = int(seconds) // 60, int(seconds) // 3600, int(seconds) // 86400
    if days:
        return f"{days}d{hours % 24:02}h"
    if hours:
        return f"{hours}h{minutes % 60:02}m"
    return f"{minutes}m{int(seconds) % 60:02}s" if minutes else f"{int(seconds)}s"
