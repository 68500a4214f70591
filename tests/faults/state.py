"""What a run ended with, as digests, and which of its checkpoints are whole. Reads the files by itself: the code that is tested must not vouch for itself."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from tests.distributed.runs import read_metrics
from tests.distributed.tiny_run import status_of, without_timings


def final_state(run: Path) -> dict[str, object]:
    """Return what two runs must have in common to be the same run: SHA-256 of all tensors and numbers of the last checkpoint, its files, metrics, status."""
    newest = newest_intact(run)
    assert newest is not None, f"no whole checkpoint in {run}"
    state = sorted((newest / "state").glob("*.pt"))
    return {
        "step": step_of(newest),
        "tensors": {path.name: _sha256(_leaves(torch.load(path, map_location="cpu", weights_only=False))) for path in state},
        "other files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(newest.rglob("*.safetensors"))},
        "metrics": {split: without_timings(read_metrics(run, split)) for split in ("train", "eval")},
        "status": status_of(run),
        "checkpoints": sorted(path.name for path in (run / "checkpoints").iterdir() if path.name.startswith((".", "step-")) and ".corrupt." not in path.name),
    }


def _leaves(value: object, name: str = "") -> Iterator[tuple[str, bytes]]:
    """Yield (place, bytes) of every tensor and plain value: weights, masters, moments, steps, schedule."""
    match value:
        case Tensor():
            yield f"{name} {value.dtype} {tuple(value.shape)}", value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        case dict():
            for key in sorted(value, key=str):
                yield from _leaves(value[key], f"{name}/{key}")
        case list() | tuple():
            for number, part in enumerate(value):
                yield from _leaves(part, f"{name}/{number}")
        case bool() | int() | float() | str() | None:
            yield name, repr(value).encode()


def _sha256(leaves: Iterator[tuple[str, bytes]]) -> str:
    digest = hashlib.sha256()
    for name, content in leaves:
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def checkpoints_of(run: Path) -> list[Path]:
    """Return the folders that have the name of a checkpoint, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if path.name.removeprefix("step-").isdigit())


def is_intact(folder: Path) -> bool:
    """Whether every file that the manifest lists is there with its size and digest."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        return bool(files) and all(
            (folder / name).stat().st_size == entry["bytes"] and xxhash.xxh3_128((folder / name).read_bytes()).hexdigest() == entry["digest"] for name, entry in files.items()
        )
    except (OSError, ValueError, KeyError):
        return False


def newest_intact(run: Path) -> Path | None:
    return next((folder for folder in reversed(checkpoints_of(run)) if is_intact(folder)), None)


def steps_begun(run: Path) -> int:
    """Return the last step that was logged, 0 before the first one."""
    path = run / "metrics.jsonl"
    return max((record["step"] for record in read_whole(path) if record["split"] == "train"), default=0) if path.exists() else 0


def read_whole(path: Path) -> Iterator[dict]:
    """Yield the records of a file whose last line may be cut short by a kill."""
    for line in path.read_text(errors="replace").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return
