"""From safetensors files into a model without memory, one parameter after the other, each rank its parts: no rank ever holds a whole model, nor waits for another.

Most parameters are one tensor of the files. Where transformers lays a model out differently from its files (experts stacked, projections fused),
its own conversions say what becomes what.
"""

import copy
import mmap
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from kto_ds.errors import UserError
from kto_ds.model.weight_files import WeightFiles

Range = tuple[int, int]  # from, to: elements of a flattened tensor


class Source(NamedTuple):
    """Tensors of the files that together become one parameter, or several."""

    keys: dict[str, list[str]]  # by the pattern of the conversion that they match; without a conversion one key, by itself
    conversion: WeightConverter | None
    shapes: dict[str, torch.Size]  # of what they become, by its name in the model


class Named(NamedTuple):
    """A parameter or buffer with its names in the model, several where it is tied."""

    tensor: Tensor
    names: list[str]


class Partitioning(NamedTuple):
    """How parameters lie on the ranks."""

    dtype: torch.dtype
    device: torch.device
    kept: Callable[[int], list[Range]]  # what this rank keeps of a parameter of so many elements
    partition: Callable[[nn.Parameter], object]  # keeps that of a whole parameter, and lets go of the rest


def plan_sources(lm: PreTrainedModel, files: WeightFiles) -> list[Source]:
    """Return what becomes which entries of the state dict of `lm`, a model on the meta device; tensors that it has no use for are left out.

    Names and conversions are those of transformers, in the order it applies them. What a conversion cannot do raises here, ahead of any reading.
    """
    transforms, wanted = get_model_conversion_mapping(lm), lm.state_dict()
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    converter_of = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    found: dict[str, Source] = {}
    for key in sorted(files.tensors, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, lm.base_model_prefix, wanted)
        if target not in wanted and key in wanted:
            target, pattern = key, None
        if target in wanted:
            source = found.setdefault(target, Source({}, None if pattern is None else converter_of[pattern], {}))
            source.keys.setdefault(pattern or key, []).append(key)
    planned = []
    for target, source in found.items():
        made = _converted(lm, target, source, lambda key: torch.empty(files.tensors[key].shape, device="meta"))
        planned.append(source._replace(shapes={name: value.shape for name, value in made.items()}))
    return planned


def _converted(lm: PreTrainedModel, target: str, source: Source, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    if source.conversion is None:
        return {target: read(next(iter(source.keys)))}  # of several tensors that get one name, transformers takes the first
    conversion = copy.deepcopy(source.conversion)
    for pattern, keys in source.keys.items():
        for key in keys:
            conversion.add_tensor(target, key, pattern, read(key))
    made = conversion.convert(target, model=lm, config=lm.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def names_by_tensor(lm: PreTrainedModel) -> list[Named]:
    """Return the parameters and buffers that files have, in the order of the model."""
    named: dict[int, Named] = {}
    for name, tensor in lm.state_dict(keep_vars=True).items():
        named.setdefault(id(tensor), Named(tensor, [])).names.append(name)
    return list(named.values())


def missing_weights(lm: PreTrainedModel, sources: list[Source]) -> list[str]:
    """Return what of the model no source has, or has in another shape."""
    shapes = {name: shape for source in sources for name, shape in source.shapes.items()}
    missing, wrong = [], []
    for tensor, names in names_by_tensor(lm):
        found = [name for name in names if name in shapes]
        missing += names[:1] if not found else []
        wrong += [str((name, tuple(shapes[name]), tuple(tensor.shape))) for name in found if shapes[name] != tensor.shape]
    return sorted(missing) + sorted(wrong)


def read_partitioned(lm: PreTrainedModel, sources: list[Source], files: WeightFiles, partitioning: Partitioning) -> None:
    """Give every parameter its memory, this rank's part of its weights, and partition it, in the order of the model; buffers are read whole.

    A tied parameter that the files have twice must be the same both times.
    """
    source_of = {name: source for source in sources for name in source.shapes}
    tensors = names_by_tensor(lm)
    entry_of = {name: entry for entry in tensors for name in entry.names}
    done: set[int] = set()
    for entry in tensors:
        if id(entry.tensor) not in done:  # else it came with another one of its source
            source = source_of[_the_one_name([name for name in entry.names if name in source_of], source_of, files)]
            made = {name: entry_of[name] for name in source.shapes}
            _read_source(lm, source, made, files, partitioning)
            done |= {id(other.tensor) for other in made.values()}


def _read_source(lm: PreTrainedModel, source: Source, made: dict[str, Named], files: WeightFiles, partitioning: Partitioning) -> None:
    flats, ranges = {}, {}
    for name, (tensor, _) in made.items():
        is_parameter = isinstance(tensor, nn.Parameter)
        flats[name] = _unwritten(tensor.numel(), partitioning.dtype if is_parameter else tensor.dtype, partitioning.device)
        ranges[name] = partitioning.kept(tensor.numel()) if is_parameter else [(0, tensor.numel())]
    fill(lm, source, files, flats, ranges)
    for name, entry in made.items():
        _put(lm, entry, flats.pop(name), partitioning)


def _unwritten(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor [numel]. On the host only those of its pages that are written to take memory, and all go back to the system with it, which malloc does not promise."""
    if device.type != "cpu" or numel == 0:
        return torch.empty(numel, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=dtype)


def _the_one_name(names: list[str], source_of: dict[str, Source], files: WeightFiles) -> str:
    """Return a name under which the files have a tensor."""
    first, *others = names
    keys = [next(iter(source_of[name].keys)) for name in names if source_of[name].conversion is None]
    for other in keys[1:]:
        if not files.are_equal(keys[0], other):
            what = f"{keys[0]} and {other} are one parameter by the model's config, and differ in its files"
            raise UserError(what, where="model.path", remedy="set tie_word_embeddings: false in its config.json")
    return first


def _put(lm: PreTrainedModel, entry: Named, flat: Tensor, partitioning: Partitioning) -> None:
    """Put a tensor with memory in the place of one without, under all its names."""
    tensor, names = entry
    value = flat.view(tensor.shape)
    if isinstance(tensor, nn.Parameter):
        value = nn.Parameter(value, requires_grad=tensor.requires_grad)
    value._is_hf_initialized = True  # for transformers, which would draw it anew
    for name in names:
        module, _, attribute = name.rpartition(".")
        setattr(lm.get_submodule(module), attribute, value)
    if isinstance(value, nn.Parameter):
        partitioning.partition(value)


def fill(lm: PreTrainedModel, source: Source, files: WeightFiles, flats: dict[str, Tensor], ranges: dict[str, list[Range]]) -> None:
    """Put ranges of what a source becomes into `flats`, by name, each a whole tensor flattened; what lies outside the ranges stays as it is.

    Where the tensors of the files follow one another in the parameter, only the ranges are read; else all tensors of the source.
    """
    pieces = _in_order(source)
    if pieces is None:
        dtype = next(iter(flats.values())).dtype
        made = _converted(lm, next(iter(source.shapes)), source, lambda key: files.whole(key, dtype))
        for name, flat in flats.items():
            for start, end in ranges[name]:
                flat[start:end].copy_(made[name].reshape(-1)[start:end])
        return
    [(name, flat)] = flats.items()
    for start, end in ranges[name]:
        begin = 0
        for key in pieces:
            size = files.tensors[key].shape.numel()
            first, last = max(start, begin), min(end, begin + size)
            if first < last:
                files.copy(key, first - begin, last - begin, flat[first:last])
            begin += size


def _in_order(source: Source) -> list[str] | None:
    """Return the tensors whose elements, one tensor after the other, are those of the parameter; None where they are mixed."""
    if source.conversion is None:
        return list(source.keys)[:1]
    by_pattern = [source.keys[pattern] for pattern in source.conversion.source_patterns if pattern in source.keys]
    kinds = [(type(operation), vars(operation).get("dim")) for operation in source.conversion.operations]
    if kinds == [(MergeModulelist, 0)] and len(by_pattern) == 1:  # experts [I, D] -> [E, I, D]
        return by_pattern[0]
    if kinds == [(MergeModulelist, 0), (Concatenate, 1)] and len(set(map(len, by_pattern))) == 1:  # gates and ups of E experts, [I, D] -> [E, 2 I, D]
        return [key for keys in zip(*by_pattern) for key in keys]
    if kinds == [(Concatenate, 0)]:
        return [key for keys in by_pattern for key in keys]
    return None
