"""Pages of docs/benchmarks: a tool writes its text between two markers, and says on what it was measured."""

import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path

import kto_ds

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "benchmarks"


def around_markers(path: Path, name: str) -> tuple[str, str]:
    """Return what a Markdown file has up to the comment `<!-- name:begin -->` and from `<!-- name:end -->` on. A missing one must not show after an hour."""
    found = re.fullmatch(f"(.*<!-- {name}:begin -->\n).*(<!-- {name}:end -->.*)", path.read_text(encoding="utf-8") if path.is_file() else "", re.DOTALL)
    if not found:
        raise SystemExit(f"{path.name} needs the lines <!-- {name}:begin --> and <!-- {name}:end -->")
    return found[1], found[2]


def command_line() -> str:
    """Return the command and the day as a line of Markdown. Paths are of this machine, so only their last part is kept."""
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    return f"`python tools/{Path(sys.argv[0]).name} {' '.join(words)}`, {date.today().isoformat()}"


def versions(*names: str) -> str:
    return ", ".join([f"Python {platform.python_version()}", f"kto_ds {kto_ds.__version__}", *(f"{name} {version(name)}" for name in names)])


def cpu_name() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8")) if platform.system() == "Linux" else None
    return found[1] if found else platform.machine()


def cores() -> str:
    return f"{os.cpu_count()} cores ({cpu_name()})"


def table(columns: Iterable[tuple], name_of: Callable, rows: Mapping[str, Callable]) -> str:
    """Return a Markdown table: a column for every (key, value), headed name_of(key); a row for every function of key and value in `rows`."""
    columns = list(columns)
    lines = [f"| | {' | '.join(name_of(key) for key, _ in columns)} |", f"|---|{'---:|' * len(columns)}"]
    return "\n".join([*lines, *(f"| {what} | {' | '.join(cell(*column) for column in columns)} |" for what, cell in rows.items())])
