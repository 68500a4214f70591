"""wandb as a process beside training, which may be slow, stuck or dead without anybody waiting for it."""

import contextlib
import json
import math
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import kto_ds
from kto_ds.config import WandbConfig
from kto_ds.redaction import redact, redact_values
from kto_ds.report.metrics_file import Record

CLOSE_SECONDS = 10  # that the end of training waits for wandb
FINISH_SECONDS = 60  # that the process is left with after that
GOOD_END = b"done\n"
PROGRAM = "kto_ds.report.wandb_upload"


def wandb_order(
    settings: WandbConfig, mode: str, *, output_dir: Path, run_config: dict, sources: Mapping[str, Path] = {}, watch_from: int | None = None,
    stall_seconds: float = math.inf, export: Path | None = None, finish_seconds: float = FINISH_SECONDS, goes_offline: bool = True,
) -> dict:  # fmt: skip
    """Return what the process is told; see Order there. The wandb run of the record goes on, if it has one."""
    id_file = _id_file(output_dir)
    run_id = id_file.read_text(encoding="utf-8") if id_file.is_file() else secrets.token_hex(4)
    return {
        **{"mode": mode, "project": redact(settings.project), "name": redact(settings.name or output_dir.resolve().name), "run_id": run_id},
        **{"output_dir": str(output_dir), "run_config": redact_values(run_config), "goes_offline": goes_offline, "finish_seconds": finish_seconds},
        **{"sources": {kind: str(folder) for kind, folder in sources.items()}, "watch_from": watch_from, "stall_seconds": stall_seconds, "export": str(export or "")},
    }


def forget_run(output_dir: Path) -> None:
    """Let the next order be for a new wandb run."""
    with contextlib.suppress(OSError):  # such as of a file in the place of the folder; training goes on without wandb
        _id_file(output_dir).unlink()


def has_run(output_dir: Path) -> bool:
    """Tell whether the record has a wandb run."""
    return _id_file(output_dir).is_file()


def _id_file(output_dir: Path) -> Path:
    return output_dir / "wandb" / "run_id"


class WandbProcess:
    """A view of metrics.jsonl that may fail. What it has to say is told at the next record, or at the end."""

    def __init__(self, order: dict, *, tell: Callable[[str], None]):
        self._tell, self._half_line, self._has_warned, self._process = tell, b"", False, None
        folder = str(Path(kto_ds.__file__).parents[1])
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))}
        variables.pop("KTO_LAUNCH", None)  # by which launch scripts know whom to signal
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            # A session of its own: the signals of a terminal or a launcher are for the ranks.
            self._process = subprocess.Popen([sys.executable, "-m", PROGRAM], env=variables, start_new_session=True, **pipes)
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
            os.set_blocking(self._process.stdout.fileno(), False)
        except OSError as error:
            tell(f"warning: wandb is off; metrics.jsonl goes on: {error}")

    def log(self, record: Record) -> None:
        """Pass on what the process has said; it reads the record from metrics.jsonl by itself."""
        self._relay()

    def close(self, seconds: float = CLOSE_SECONDS, *, is_good: bool = True) -> bool:
        """Tell the process that training has ended, and whether well, and wait for it, so many seconds at most; return whether all records have arrived."""
        if self._process is None:
            return False
        with contextlib.suppress(OSError):  # the process is gone, and has not read its order
            self._process.stdin.write(GOOD_END if is_good else b"")
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            exit_code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            exit_code = None
        self._relay()
        if exit_code is None:
            so_far = f"within {seconds:g} s" if seconds else "yet"
            self._tell(f"warning: wandb has not taken everything {so_far} and is left to itself; kto-ds report --config RUN.yaml --wandb-sync uploads the rest")
        elif exit_code and not self._has_warned:
            self._tell(f"warning: wandb has ended with code {exit_code}; kto-ds report --config RUN.yaml --wandb-sync uploads what is missing")
        self._process.stdout.close()
        return exit_code == 0

    def _relay(self) -> None:
        """Tell the whole lines that have arrived."""
        if self._process is None:
            return
        *lines, self._half_line = (self._half_line + (self._process.stdout.read() or b"")).split(b"\n")
        for line in lines:
            self._has_warned |= line.startswith(b"warning")
            self._tell(redact(line.decode(errors="replace")))
