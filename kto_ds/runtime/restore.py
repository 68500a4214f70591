"""Reading checkpoints: verified before they are used, on all ranks alike, and put back on any number of ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from kto_ds.artifacts import FORMAT, MANIFEST, damaged_files, own_digest, read_json, read_manifest, unlisted_files
from kto_ds.errors import UserError, reading
from kto_ds.runtime.checkpoint import RNG_FILE
from kto_ds.runtime.collectives import World, on_all_ranks, on_main_rank
from kto_ds.runtime.engine import STATE, Engine
from kto_ds.runtime.retention import KIND, NAME, folder_bytes, set_aside, step_folders
from kto_ds.runtime.rng import derive_rng, restore_rng
from kto_ds.runtime.unpickling import REMEDY, foreign_objects, weights_only
from kto_ds.runtime.world_size import converted

OTHER_VERSION = "go on with the version of kto_ds that wrote it, choose another output_dir, or set checkpoint.resume: never"
# What the manifest of a checkpoint has besides what every manifest has.
FIELDS = {"step": int, "world_size": int, "zero": dict, "config": dict, "identity": dict, "plan": str, "progress": dict}


class Checkpoint(NamedTuple):
    folder: Path
    manifest: dict

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @property
    def zero_stage(self) -> int:
        return int(self.manifest["zero"].get("stage", 0))


def newest_verified(root: Path, world: World, *, sets_aside: bool) -> Checkpoint | None:
    """Return the newest checkpoint whose files all have their sizes and digests, or None in a folder that never had any.

    Where one is damaged the one before it is tried; `sets_aside`, for who holds the lock of the run, renames it to `*.corrupt.N`. Ranks share the digesting.
    UserError when all are damaged; Unreadable, and nothing is renamed, when a file cannot be read that may be whole.
    """
    candidates = on_main_rank(lambda: step_folders(root))
    for _, folder in reversed(candidates):
        checkpoint, problems = _verify(folder, world)
        if not problems:
            return checkpoint
        if world.is_main:
            print(f"checkpoint {folder.name} is damaged and {'set aside' if sets_aside else 'passed over'}: {'; '.join(problems)}", flush=True)
        if sets_aside:
            on_main_rank(lambda folder=folder: set_aside(folder, mark=".corrupt"))
    if candidates or on_main_rank(lambda: list(root.glob("*.corrupt.*"))):
        raise UserError("no checkpoint is intact", where=str(root), remedy="set checkpoint.resume: never to start over, or restore a checkpoint")
    return None


def verified(folder: Path, world: World) -> Checkpoint:
    """Return this very checkpoint; UserError when it is damaged."""
    checkpoint, problems = _verify(folder, world)
    if problems:
        raise UserError(f"the checkpoint is damaged: {'; '.join(problems[:3])}", where=str(folder), remedy="name another one, such as latest")
    return checkpoint


def _verify(folder: Path, world: World) -> tuple[Checkpoint, list[str]]:
    """Return a checkpoint and what is damaged about it, the same on all ranks.

    UserError when another version of kto_ds wrote it, or when it holds what only somebody else can have put there.
    """
    try:
        manifest = on_main_rank(lambda: read_manifest(folder, kind=KIND, remedy=OTHER_VERSION))
    except UserError as error:
        if on_main_rank(lambda: _is_of_another_version(folder)):
            raise
        return Checkpoint(folder, {}), [error.what]
    if wrong := [name for name, kind in FIELDS.items() if not isinstance(manifest.get(name), kind)]:
        raise UserError(f"its manifest lacks {', '.join(wrong)}: another version of kto_ds wrote it", where=str(folder), remedy=OTHER_VERSION)
    if manifest["step"] != int(NAME.fullmatch(folder.name)[1]):
        return Checkpoint(folder, {}), [f"it is the checkpoint of step {manifest['step']}, under another name"]
    share = {name: entry for index, (name, entry) in enumerate(manifest["files"].items()) if index % world.num_ranks == world.rank}
    problems = _gathered(lambda: damaged_files(folder, {"files": share}) + (unlisted_files(folder, manifest) if world.is_main else []))
    if not problems and (foreign := _gathered(lambda: [line for name in share if name.endswith(".pt") for line in foreign_objects(folder / name)])):
        raise UserError(f"this checkpoint holds more than tensors and plain values: {'; '.join(foreign[:3])}", where=str(folder), remedy=REMEDY)
    return Checkpoint(folder, manifest), problems


def _is_of_another_version(folder: Path) -> bool:
    """Tell whether the manifest of a folder is undamaged, and one that this version cannot read: what lies there is not broken, and not to be touched."""
    try:
        manifest = read_json(folder / MANIFEST)
        return isinstance(manifest, dict) and manifest.get("format") != FORMAT and manifest.get("digest") == own_digest(manifest)
    except (ValueError, RecursionError):
        return False


def _gathered(look: Callable[[], list[str]]) -> list[str]:
    return [line for part in on_all_ranks(look) for line in part]


def load_checkpoint(engine: Engine, checkpoint: Checkpoint, *, seed: int, world: World) -> None:
    """Put weights, optimizer, scheduler and random generators back as they were after the checkpoint's step. All ranks call this.

    Where ranks or the ZeRO section of the DeepSpeed config are not those that saved, the state is converted first. The hyper-parameters are those
    of the engine, not those that were saved.
    """
    same_ranks = checkpoint.manifest["world_size"] == world.num_ranks
    if engine.stage == 0 or same_ranks and checkpoint.manifest["zero"] == engine.zero_section:
        with reading(checkpoint.folder):
            engine.load(checkpoint.folder, is_universal=False)
    else:
        with converted(checkpoint.folder, state_bytes=folder_bytes(checkpoint.folder), ranks=(checkpoint.manifest["world_size"], world.num_ranks)) as folder, reading(checkpoint.folder):
            engine.load(folder, is_universal=True)
    if same_ranks:
        own = f"rank{world.rank}/"
        with reading(checkpoint.folder / RNG_FILE):
            states = load_file(checkpoint.folder / RNG_FILE)
        restore_rng({name.removeprefix(own): state for name, state in states.items() if name.startswith(own)}, world.device)
    else:
        derive_rng(seed, checkpoint.step, world.rank, world.device)


class LazyWeight(Protocol):
    """A weight that is read once it is asked for: a tensor that is mapped from a file, or DeepSpeed's stand-in for one that lies in the files of all ranks."""

    shape: torch.Size

    def contiguous(self) -> Tensor: ...


def read_weights(checkpoint: Checkpoint) -> dict[str, LazyWeight]:
    """Return the policy's parameters by name; float32 from stage 3, where a parameter is put together of all ranks' parts, else in the dtype of the run."""
    with weights_only(mapped=True), reading(checkpoint.folder):
        if checkpoint.zero_stage == 3:
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.folder), tag=STATE, lazy_mode=True)
        return torch.load(checkpoint.folder / STATE / "mp_rank_00_model_states.pt")["module"]
