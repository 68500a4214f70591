"""Checkpoints that are whole or absent.

    checkpoints/step-00000120/manifest.json        step, world size, what the run was, size and digest of every file
                              state/               DeepSpeed's files: parameters, master weights, moments, scheduler

A save goes to `.tmp-step-*`, is synced and digested by all ranks, sealed by rank 0 and renamed. A name is never written twice.
Nothing else needs saving: dropout is off, and the data order is a pure function of seed and step.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kto_ds.artifacts import MANIFEST, damaged_files, describe_file, fsync_path, read_manifest, seal
from kto_ds.errors import KtoError, UserError
from kto_ds.runtime.collectives import World, barrier, gather_objects, on_main_rank
from kto_ds.runtime.engine import Engine
from kto_ds.staging import fresh_folder

KIND = "checkpoint"
TAG = "state"
NAME = re.compile(r"step-(\d{8})")


class Checkpoint(NamedTuple):
    folder: Path
    manifest: dict

    @property
    def step(self) -> int:
        return self.manifest["step"]


def save_checkpoint(engine: Engine, root: Path, *, step: int, record: dict, save_total_limit: int, world: World) -> None:
    """Write the state after `step`. All ranks call this; `record` goes into the manifest: what a resume compares and what it needs to know.

    KtoError when it cannot be written: on the rank that meets it while DeepSpeed writes, and the launcher ends the others; on all ranks from there on.
    """
    final, staging = root / f"step-{step:08d}", root / f".tmp-step-{step:08d}"
    on_main_rank(lambda: fresh_folder(staging))
    try:
        engine.deepspeed.save_checkpoint(str(staging), tag=TAG, client_state={"kto_ds": {"step": step}}, save_latest=False)
    except (OSError, RuntimeError) as error:
        # The other ranks wait in a barrier of DeepSpeed's own, so there is nothing to agree on: this rank ends, and the launcher the rest.
        raise _unwritable(final, f"rank {world.rank}: {str(error).splitlines()[0]}") from error
    barrier()
    on_main_rank(lambda: _remove_scripts(staging))
    names = sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file())
    described = _together(lambda: {name: describe_file(staging / name) for name in names[world.rank :: world.num_ranks]}, final)
    files = {name: entry for part in described for name, entry in part.items()}

    def finish() -> None:
        for path in [*staging.rglob("*")]:
            if path.is_dir():
                fsync_path(path)
        seal(staging, {"kind": KIND, "step": step, "world_size": world.num_ranks, "zero_stage": engine.stage, "record": record}, files)
        staging.rename(final)
        fsync_path(root)
        _retain(root, save_total_limit)

    on_main_rank(finish)


def _together(action: Callable, final: Path) -> list:
    """Run `action` on every rank and return all results; an error on any rank becomes the same error on all."""
    result, problem = None, ""
    try:
        result = action()
    except (OSError, RuntimeError) as error:
        problem = str(error).splitlines()[0]
    outcomes = gather_objects((result, problem))
    problems = [f"rank {rank}: {problem}" for rank, (_, problem) in enumerate(outcomes) if problem]
    if problems:
        raise _unwritable(final, "; ".join(problems))
    return [result for result, _ in outcomes]


def _unwritable(final: Path, problem: str) -> KtoError:
    return KtoError(f"{final}: the checkpoint could not be written; {problem}. Earlier checkpoints are untouched.")


def _remove_scripts(staging: Path) -> None:
    # DeepSpeed drops executable copies of its conversion scripts beside every checkpoint; kto-ds export replaces them.
    for script in staging.glob("*.py"):
        script.unlink()


def _retain(root: Path, save_total_limit: int) -> None:
    for _, folder in list_checkpoints(root)[:-save_total_limit]:
        doomed = folder.with_name(f".del-{folder.name}")
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def set_aside(path: Path, mark: str = "") -> None:
    """Rename what an earlier run left, or what is damaged, to a free name of its own: nothing is deleted."""
    if path.exists():
        number = next(number for number in range(1, 10_000) if not path.with_name(f"{path.name}{mark}.{number}").exists())
        path.rename(path.with_name(f"{path.name}{mark}.{number}"))


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of every sealed checkpoint, oldest first; not yet verified."""
    found = [(int(match[1]), path) for path in root.glob("step-*") if (match := NAME.fullmatch(path.name)) and (path / MANIFEST).is_file()]
    return sorted(found)


def newest_verified(root: Path, world: World) -> Checkpoint | None:
    """Return the newest checkpoint whose files all have their sizes and digests, or None in a folder that never had any.

    A damaged one is renamed to `*.corrupt.N` and the one before it is tried. Ranks share the digesting. UserError when all are damaged.
    """
    candidates = on_main_rank(lambda: list_checkpoints(root))
    for _, folder in reversed(candidates):
        try:
            manifest = on_main_rank(lambda folder=folder: read_manifest(folder, kind=KIND, remedy="remove this folder"))
        except UserError as error:
            problems = [error.what]
        else:
            share = {name: entry for index, (name, entry) in enumerate(manifest["files"].items()) if index % world.num_ranks == world.rank}
            problems = [problem for part in gather_objects(damaged_files(folder, {"files": share})) for problem in part]
            if not problems:
                return Checkpoint(folder, manifest)
        if world.is_main:
            print(f"checkpoint {folder.name} is damaged and set aside: {'; '.join(problems)}", flush=True)
        on_main_rank(lambda folder=folder: set_aside(folder, mark=".corrupt"))
    if candidates or list(root.glob("*.corrupt.*")):
        raise UserError("no checkpoint is intact", where=str(root), remedy="set checkpoint.resume: never to start over, or restore a checkpoint")
    return None


def require_same_ranks(checkpoint: Checkpoint, *, num_ranks: int, zero_stage: int) -> None:
    """Refuse a checkpoint of another number of ranks or ZeRO stage: its files are cut otherwise."""
    saved = {"world size": checkpoint.manifest["world_size"], "ZeRO stage": checkpoint.manifest["zero_stage"]}
    now = {"world size": num_ranks, "ZeRO stage": zero_stage}
    if saved != now:
        differing = ", ".join(f"{key} {saved[key]}, now {now[key]}" for key in saved if saved[key] != now[key])
        raise UserError(f"saved with {differing}", where=str(checkpoint.folder), remedy="start with the same number of ranks and the same DeepSpeed config")


def load_checkpoint(engine: Engine, checkpoint: Checkpoint) -> None:
    """Put weights, optimizer and scheduler back as they were after the checkpoint's step."""
    loaded, client_state = engine.deepspeed.load_checkpoint(str(checkpoint.folder), tag=TAG)
    assert loaded is not None and client_state["kto_ds"]["step"] == checkpoint.step, f"{checkpoint.folder} did not load"


def read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the policy's parameters by name, put together from all ranks' files; float32 from stage 3, else in the dtype of the run."""
    if checkpoint.manifest["zero_stage"] == 3:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.folder), tag=TAG)
    path = checkpoint.folder / TAG / "mp_rank_00_model_states.pt"
    # DeepSpeed's file holds its own classes beside the tensors; its digest was verified before this.
    return torch.load(path, map_location="cpu", weights_only=False)["module"]
