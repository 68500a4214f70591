"""Saving: a checkpoint is whole or absent, and all ranks agree on which.

    checkpoints/step-00000120/manifest.json      step, ranks, ZeRO section, what the run was, size and digest of every file
                              state/             DeepSpeed's files: parameters, master weights, moments, scheduler
                              rng.safetensors    the random generators of every rank

A save goes to `.tmp-step-*`. Every rank syncs and digests what it wrote itself; then all tell one another, and only if all is well rank 0 seals the
folder and renames it. A name is never written twice. restore.py reads it, retention.py says which ones are kept.
"""

import shutil
from pathlib import Path

from safetensors.torch import save as to_safetensors

from kto_ds.artifacts import describe_file, fsync_path, read_manifest, seal, write_atomically
from kto_ds.errors import KtoError, Unreadable, UserError, unwritable
from kto_ds.runtime.checkpoint_files import in_words
from kto_ds.runtime.collectives import World, gather_objects, on_main_rank
from kto_ds.runtime.engine import Engine
from kto_ds.runtime.retention import KIND, folder_bytes, folder_name, list_checkpoints, retain
from kto_ds.runtime.rng import rng_state
from kto_ds.staging import fresh_folder

RNG_FILE = "rng.safetensors"
LATEST = "latest"
SPACE_FACTOR = 1.2  # free bytes that a save wants, to the bytes it is expected to write


def save_checkpoint(engine: Engine, root: Path, *, step: int, record: dict, save_total_limit: int, best_step: int | None, world: World) -> None:
    """Write the state after `step`. All ranks call this; `record` (JSON) goes into the manifest: what a resume compares and what it needs to know.

    UserError when there is no room for it, KtoError when it cannot be written, each the same on all ranks; earlier checkpoints are untouched then.
    """
    final, staging = root / folder_name(step), root / f".tmp-{folder_name(step)}"
    on_main_rank(lambda: _make_room(root, staging, engine))
    written, problem = engine.save(staging)
    states = gather_objects(rng_state(world.device))
    described = {}
    if not problem:
        try:
            if world.is_main:
                written.append(_write_rng(staging / RNG_FILE, states))
            described = {path.relative_to(staging).as_posix(): describe_file(path) for path in written}
        except OSError as error:
            problem = f"{error.filename or staging}: {in_words(error)}"
    outcomes = gather_objects((described, problem))
    if problems := [f"rank {rank}: {problem}" for rank, (_, problem) in enumerate(outcomes) if problem]:
        raise on_main_rank(lambda: _given_up(final, staging, "; ".join(problems)))
    files = {name: entry for part, _ in outcomes for name, entry in part.items()}
    manifest = {"kind": KIND, "step": step, "world_size": world.num_ranks, "zero": engine.zero_section, **record}

    def finish() -> None:
        try:
            _put_in_place(staging, final, manifest, files)
        except OSError as error:
            raise _given_up(final, staging, f"rank 0: {error.filename or staging}: {in_words(error)}") from error
        _tidy(root, final, save_total_limit, best_step)

    on_main_rank(finish)


def correct_record(folder: Path, record: dict) -> None:
    """Replace entries of the record in the manifest of a saved checkpoint; its files stay as they are."""
    manifest = {key: value for key, value in read_manifest(folder, kind=KIND, remedy="").items() if key != "format"}
    files = manifest.pop("files")
    seal(folder, {**manifest, **record}, files)


def _make_room(root: Path, staging: Path, engine: Engine) -> None:
    """Make an empty staging folder; UserError when the disk has too little space for what is to go there."""
    try:
        fresh_folder(staging)
        free = shutil.disk_usage(root).free
    except OSError as error:
        raise unwritable(error, root) from error
    sizes = [size for _, folder in reversed(list_checkpoints(root)) if (size := folder_bytes(folder))]
    needed = int(SPACE_FACTOR * (sizes[0] if sizes else engine.state_bytes))
    if free < needed:
        shutil.rmtree(staging, ignore_errors=True)
        remedy = "free the space, then start the same command again: the run goes on from its newest checkpoint"
        raise UserError(f"too little space for a checkpoint: {needed:,} bytes needed, {free:,} free", where=str(root), remedy=remedy)


def _write_rng(path: Path, states: list[dict]) -> Path:
    path.write_bytes(to_safetensors({f"rank{rank}/{name}": tensor for rank, state in enumerate(states) for name, tensor in state.items()}))
    return path


def _put_in_place(staging: Path, final: Path, manifest: dict, files: dict[str, dict]) -> None:
    for path in sorted(staging.rglob("*")):
        name = path.relative_to(staging).as_posix()
        if path.is_dir():
            fsync_path(path)
        elif name not in files:  # what DeepSpeed copies itself, such as states that are offloaded to NVMe
            files[name] = describe_file(path)
    seal(staging, manifest, files)
    staging.rename(final)
    fsync_path(final.parent)


def _given_up(final: Path, staging: Path, problem: str) -> KtoError:
    """Return the error of a save that failed, once the space it took is free again."""
    free = shutil.disk_usage(final.parent).free
    shutil.rmtree(staging, ignore_errors=True)
    return KtoError(f"{final}: the checkpoint could not be written; {problem}; {free:,} bytes were free. Earlier checkpoints are untouched.")


def _tidy(root: Path, final: Path, save_total_limit: int, best_step: int | None) -> None:
    """Name the newest checkpoint for people to see, and delete those that need not be kept. The checkpoint is saved whatever happens here."""
    try:
        write_atomically(root / LATEST, final.name + "\n")
        retain(root, save_total_limit=save_total_limit, best_step=best_step)
    except (OSError, Unreadable) as error:
        print(f"notice: {final.name} is saved, but {root} could not be tidied: {in_words(error)}", flush=True)
