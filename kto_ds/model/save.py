"""A model to a Hugging Face folder, in the files that transformers' save_pretrained writes, a decoder layer at a time.

The model itself has no memory: its weights are asked for layer by layer and let go of once they are in a file. What is held is one file of at most
MAX_SHARD_SIZE and one layer.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

MAX_SHARD_SIZE = "5GB"
ReadWeights = Callable[[list[str]], dict[str, Tensor]]  # parameters and buffers by name, whole and in the dtype they are saved in


class FileLayout(NamedTuple):
    """Which tensors go into which file, and what of the model they are made of."""

    files: dict[str, list[str]]
    index: dict | None  # None of a single file
    layers: list[list[str]]  # the names of the model, in groups that are read together
    layer_of: dict[str, int]  # by tensor of the files
    num_bytes: int


def plan_files(lm: PreTrainedModel, max_shard_size: str | int = MAX_SHARD_SIZE) -> FileLayout:
    """Return the layout of the files of a model on the meta device: of what is tied one name, experts and the like as published models have them."""
    state = {name: tensor for name, tensor in lm.state_dict().items() if name not in (lm._keys_to_ignore_on_save or ())}
    state = remove_tied_weights_from_state_dict(state, lm)
    # Views of one storage would be counted as often as that storage is large.
    saved = {name: torch.empty(value.shape, dtype=value.dtype, device="meta") for name, value in revert_weight_conversion(lm, state).items()}
    layers: dict[str, list[str]] = {}
    for name in state:
        layers.setdefault(_layer_name(name), []).append(name)
    layer_of = {key: number for number, names in enumerate(layers.values()) for key in revert_weight_conversion(lm, {name: state[name] for name in names})}
    assert layer_of.keys() == saved.keys(), "a tensor of the files is made of several layers"
    split = split_torch_state_dict_into_shards(saved, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size)
    index = {"metadata": {"total_parameters": lm.num_parameters(), **split.metadata}, "weight_map": split.tensor_to_filename} if split.is_sharded else None
    return FileLayout(split.filename_to_tensors, index, list(layers.values()), layer_of, sum(value.nbytes for value in saved.values()))


def _layer_name(name: str) -> str:
    """Return the part of a name that says which layer it belongs to: up to its first number, or all of it."""
    numbered = re.match(r".*?\.\d+(?=\.)", name)
    return numbered[0] if numbered else name


def write_model(lm: PreTrainedModel, folder: Path, read: ReadWeights, *, layout: FileLayout, on_written: Callable[[int], object]) -> None:
    """Write config, generation config and weights of a model on the meta device; `on_written` is told the bytes of every file. OSError when a file cannot be written."""
    lm.config.dtype, lm.config.architectures = str(lm.dtype).removeprefix("torch."), [type(lm).__name__]
    if lm.is_remote_code():
        custom_object_save(lm, folder, config=lm.config)
    lm.config.save_pretrained(folder)
    lm.generation_config.save_pretrained(folder)
    waiting: dict[str, Tensor] = {}  # of a layer that goes on in the next file
    for file, keys in layout.files.items():
        shard = {}
        for key in keys:
            if key not in waiting:
                waiting.update(revert_weight_conversion(lm, read(layout.layers[layout.layer_of[key]])))
            value = waiting.pop(key)
            # A view would keep what it is a part of.
            shard[key] = value.contiguous() if value.untyped_storage().nbytes() == value.nbytes else value.clone(memory_format=torch.contiguous_format)
        _save(shard, folder / file)
        on_written(sum(value.nbytes for value in shard.values()))
    if layout.index is not None:
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(layout.index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # which has the number of what the system said in its text only
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise
