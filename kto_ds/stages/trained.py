"""What training has made, for the commands that come after it: a checkpoint by its name, with its weights, or an exported model."""

import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kto_ds.config import LossConfig, ModelConfig, RunConfig
from kto_ds.errors import UserError, excerpt
from kto_ds.model.lora import Adapter, find_adapter
from kto_ds.runtime.collectives import World
from kto_ds.runtime.restore import Checkpoint, LazyWeight, newest_verified, read_weights, verified
from kto_ds.runtime.retention import folder_name, list_checkpoints
from kto_ds.stages.progress import Progress
from kto_ds.stages.resume import FIXED, changes

TRAIN_FIRST = "run kto-ds train --config RUN.yaml"
POLICY_PREFIX = "lm."  # where Policy keeps the language model


def choose_checkpoint(root: Path, name: str, world: World) -> Checkpoint:
    """Return the verified checkpoint of this name: latest, best (of checkpoint.metric_for_best_model, when it was last looked at) or step-N."""
    named = re.fullmatch(r"step-(\d+)", name)
    if name not in ("latest", "best") and not named:
        raise UserError(f"no such checkpoint: {excerpt(name)}", where="--checkpoint", remedy="give latest, best, or one of step-N")
    if named:
        step = int(named[1])
    else:
        newest = newest_verified(root, world, sets_aside=False)
        if newest is None:
            raise UserError("there is no checkpoint", where=str(root), remedy=TRAIN_FIRST)
        if name == "latest":
            return newest
        best = Progress.from_json(newest.manifest["progress"]).best
        if best is None:
            raise UserError("this run has not looked for a best checkpoint", where="--checkpoint", remedy="train with checkpoint.metric_for_best_model, or leave this option out")
        step = best.step
    folder = root / folder_name(step)
    if not folder.is_dir():
        known = ", ".join(f"step-{step}" for step, _ in list_checkpoints(root)) or "none"
        raise UserError(f"there is no checkpoint of step {step}; there are: {known}", where=str(root), remedy="choose one of these, or leave this option out")
    return verified(folder, world)


def require_same_config(config: RunConfig, loss: LossConfig, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint of another model, seed, loss or batch. What may change in the middle of a run is read from the checkpoint itself."""
    found = changes(checkpoint.manifest["config"], config.model_copy(update={"loss": loss}).model_dump(mode="json"))
    if differing := [str(change) for change in found if change.key in FIXED]:
        remedy = "use the config the run was trained with: it lies in config.yaml beside the checkpoints"
        raise UserError("\n  ".join(["trained with another config:", *differing]), where=str(checkpoint.folder), remedy=remedy)


def trained_weights(checkpoint: Checkpoint, *, log: TextIO) -> dict[str, LazyWeight]:
    """Return what a checkpoint holds of the language model, by its names: all of it, or its adapters. DeepSpeed narrates, to `log`."""
    with redirect_stdout(log), redirect_stderr(log):
        return {name.removeprefix(POLICY_PREFIX): weight for name, weight in read_weights(checkpoint).items()}


def whole(name: str, weight: LazyWeight, dtype: torch.dtype) -> Tensor:
    """Read one weight; UserError when it is not finite."""
    tensor = weight.contiguous()
    tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if not torch.isfinite(tensor).all():
        raise UserError(f"{name} is not finite", where="checkpoints")
    return tensor


@torch.no_grad()
def put_weights(lm: PreTrainedModel, weights: dict[str, LazyWeight], dtype: torch.dtype) -> None:
    """Give a model, or the adapters on it, the weights that training has made of it."""
    if not {"cpu", "disk"}.isdisjoint(map(str, vars(lm).get("hf_device_map", {}).values())) and lm.device.type != "cpu":
        raise UserError("the model does not fit on the GPUs, and a checkpoint is not read into host memory", where="--checkpoint", remedy="export it, and use the export")
    own = lm.state_dict()
    trained = {name: parameter for name, parameter in lm.named_parameters() if parameter.requires_grad}
    if odd := sorted(name for name in weights if name not in own or own[name].shape != weights[name].shape):
        raise UserError(f"the checkpoint has a parameter that the model has not, or in another shape: {odd[0]}", where="model.path")
    there = {own[name].data_ptr() for name in weights}  # a tied one has two names
    if missing := sorted(name for name, parameter in trained.items() if parameter.data_ptr() not in there):
        raise UserError(f"the checkpoint lacks {len(missing)} parameters, the first: {missing[0]}", where="model.path")
    for name, weight in weights.items():
        own[name].copy_(whole(name, weight, dtype))


def exported_model(config: RunConfig, *, remedy: str) -> tuple[str, ModelConfig, Adapter | None]:
    """Return what eval.path or else the export is: its path, the model that is read for it, and an adapter on that model if the path is one's."""
    path = config.eval.path or str(config.export_dir)
    if config.eval.path is None and not config.export_dir.is_dir():
        raise UserError(f"there is no model at {path}", where="eval.path", remedy=remedy)
    if adapter := find_adapter(path):
        return path, config.model.model_copy(update={"path": adapter.base, "revision": adapter.revision, "lora": None}), adapter
    return path, config.model.model_copy(update={"path": path, "revision": None, "lora": None, "load_in_4bit": False}), None
