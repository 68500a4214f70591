"""The folders below `checkpoints/`: which of them count, which go, and what a killed run left behind.

    step-00000120/                 sealed by its manifest; counts
    step-00000120.corrupt.1/       was found damaged and set aside; never counts, never deleted
    .tmp-*, .universal-*, .del-*   being written, being loaded, being deleted; of no worth once their run has ended
    .*.tmp, also in a checkpoint   a file being written, of no worth either
    latest                         name of the newest one, for people; nothing reads it
"""

import os
import re
import shutil
from pathlib import Path

from kto_ds.artifacts import MANIFEST, read_manifest
from kto_ds.errors import Unreadable, UserError, reading

KIND = "checkpoint"
NAME = re.compile(r"step-(\d{8})")
LEFTOVERS = (".tmp-*", ".universal-*", ".del-*", ".*.tmp", "step-*/.*.tmp")


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def step_folders(root: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of everything that has the name of a checkpoint, oldest first."""
    try:
        with reading(root):  # glob takes a folder that must not be listed for an empty one
            names = os.listdir(root)
    except OSError:
        names = []
    return sorted((int(match[1]), root / name) for name in names if (match := NAME.fullmatch(name)))


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of every sealed checkpoint, oldest first; not yet verified."""
    with reading(root):
        return [(step, folder) for step, folder in step_folders(root) if (folder / MANIFEST).is_file()]


def folder_bytes(folder: Path) -> int:
    """Return the bytes that the manifest of a checkpoint says its files have; 0 when it cannot be told, or when they have others."""
    try:
        files = read_manifest(folder, kind=KIND, remedy="")["files"]
        sizes = {name: os.lstat(folder / name).st_size for name in files}
    except (UserError, Unreadable, OSError):
        return 0
    return sum(sizes.values()) if all(sizes[name] == entry["bytes"] for name, entry in files.items()) else 0


def retain(root: Path, *, save_total_limit: int, best_step: int | None) -> None:
    """Delete all but the newest `save_total_limit` checkpoints and the best one. A folder whose files are not all there neither counts nor goes."""
    whole = [(step, folder) for step, folder in list_checkpoints(root) if folder_bytes(folder)]
    for step, folder in whole[:-save_total_limit]:
        if step != best_step:
            doomed = folder.with_name(f".del-{folder.name}")
            folder.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def sweep(root: Path) -> None:
    """Delete what a killed run left half-written or half-deleted. Only under the lock of the run."""
    for pattern in LEFTOVERS:
        for path in root.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def set_aside(path: Path, mark: str = "") -> None:
    """Rename what an earlier run left, or what is damaged, to a free name of its own: nothing is deleted."""
    if path.exists():
        number = next(number for number in range(1, 10_000) if not path.with_name(f"{path.name}{mark}.{number}").exists())
        path.rename(path.with_name(f"{path.name}{mark}.{number}"))
