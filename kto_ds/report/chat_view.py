"""What the person at the terminal sees of a chat: answers side by side where there is room, below each other elsewhere, as they come."""

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

WIDE = 100  # columns from which on two answers have room beside each other
STYLES = ("bold green", "bold yellow")
TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # what follows would be shown in another order, our own words too
Hear = Callable[[str, str], None]  # (name of who speaks, the next piece of the answer)


class Reward(NamedTuple):
    """What policy and reference think of an answer."""

    of: str  # who gave it
    reward: float  # beta * (policy - reference)
    policy_logp: float
    reference_logp: float
    num_tokens: int


@contextmanager
def hearing(console: Console, names: Sequence[str]) -> Iterator[Hear]:
    """Show answers as their pieces are handed over."""
    with _columns(console, names) if console.is_terminal and console.width >= WIDE and len(names) > 1 else _lines(console, names) as hear:
        yield hear


@contextmanager
def _columns(console: Console, names: Sequence[str]) -> Iterator[Hear]:
    texts = dict.fromkeys(names, "")

    def table() -> Table:
        drawn = Table(expand=True, show_edge=False, pad_edge=False)
        for name, style in zip(names, STYLES):
            drawn.add_column(Text(name, style), ratio=1, overflow="fold")
        drawn.add_row(*map(Text, texts.values()))
        return drawn

    with Live(table(), console=console, refresh_per_second=8) as live:

        def hear(name: str, piece: str) -> None:
            texts[name] += printable(piece)
            live.update(table())

        yield hear


@contextmanager
def _lines(console: Console, names: Sequence[str]) -> Iterator[Hear]:
    styles, heard = dict(zip(names, STYLES)), []

    def write(text: Text | str) -> None:
        console.print(text, end="", soft_wrap=True, markup=False, highlight=False)

    def hear(name: str, piece: str) -> None:
        if name not in heard:
            write(Text(f"{name}: " if not heard else f"\n{name}: ", styles[name]))
            heard.append(name)
        write(printable(piece))

    try:
        yield hear
    finally:
        if heard:
            write("\n")


def show_rewards(console: Console, rewards: Sequence[Reward]) -> None:
    for found in rewards:
        what = f"reward of the {found.of}'s answer: {found.reward:+.3f}"
        why = f"log-prob {found.policy_logp:.2f} by the policy, {found.reference_logp:.2f} by the reference, {found.num_tokens} token{'s' if found.num_tokens > 1 else ''}"
        tell(console, f"{what}  ({why})", "dim")


def tell(console: Console, text: str, style: str = "") -> None:
    console.print(Text(printable(text), style), soft_wrap=True)


def printable(text: str) -> str:
    """Return a text without control codes: what a model says must not move the cursor. Spaces and joiners of other scripts are text."""
    return "".join("\N{REPLACEMENT CHARACTER}" if _is_control(character) else character for character in text)


def _is_control(character: str) -> bool:
    return character in TURNING or unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"
