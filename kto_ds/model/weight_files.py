"""Tensors where they lie in safetensors files, read range by range: who keeps a part of a tensor reads that part and no more."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.modeling_utils import str_to_torch_dtype

CHUNK_BYTES = 16 << 20  # of one read, which lies in memory beside what is filled


class FileTensor(NamedTuple):
    path: Path
    offset: int  # bytes from the start of the file
    dtype: torch.dtype
    shape: torch.Size

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class WeightFiles(NamedTuple):
    """The tensors of some safetensors files by name; `on_read` is told the bytes of every read."""

    tensors: dict[str, FileTensor]
    buffer: Tensor  # [CHUNK_BYTES] uint8, for all reads: fresh memory for each would leave holes between what is kept
    on_read: Callable[[int], object] = lambda num_bytes: None

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def copy(self, key: str, start: int, end: int, into: Tensor) -> None:
        """Put the elements from `start` to `end` of a flattened tensor into `into` [end - start], in the dtype and on the device of `into`."""
        path, offset, dtype, _ = self.tensors[key]
        step = CHUNK_BYTES // dtype.itemsize
        with open(path, "rb", buffering=0) as file:
            for first in range(start, end, step):
                chunk = self.buffer[: min(step, end - first) * dtype.itemsize].view(dtype)
                _read_into(file.fileno(), chunk, offset + first * dtype.itemsize)
                into[first - start : first - start + len(chunk)].copy_(chunk)
                self.on_read(chunk.nbytes)

    def whole(self, key: str, dtype: torch.dtype) -> Tensor:
        shape = self.tensors[key].shape
        flat = torch.empty(shape.numel(), dtype=dtype)
        self.copy(key, 0, len(flat), flat)
        return flat.view(shape)

    def are_equal(self, one: str, other: str) -> bool:
        """Tell whether two tensors hold the same numbers."""
        tensor, step = self.tensors[one], CHUNK_BYTES // 8
        if tensor.shape != self.tensors[other].shape:
            return False
        for start in range(0, tensor.shape.numel(), step):
            end = min(start + step, tensor.shape.numel())
            parts = [torch.empty(end - start, dtype=tensor.dtype) for _ in range(2)]
            for key, part in zip((one, other), parts):
                self.copy(key, start, end, part)
            if not torch.equal(*parts):
                return False
        return True


def open_weights(folder: Path, names: Iterable[str]) -> WeightFiles:
    """Read the headers of some files; SafetensorError where a header and its file do not agree, KeyError for a dtype that torch has not."""
    return WeightFiles({key: tensor for name in names for key, tensor in _file_tensors(folder / name)}, torch.empty(CHUNK_BYTES, dtype=torch.uint8))


def _file_tensors(path: Path) -> Iterator[tuple[str, FileTensor]]:
    with safe_open(path, framework="pt"):  # which checks the header
        pass
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
    for key, entry in header.items():
        if key != "__metadata__":
            yield key, FileTensor(path, 8 + header_bytes + entry["data_offsets"][0], str_to_torch_dtype[entry["dtype"]], torch.Size(entry["shape"]))


def _read_into(descriptor: int, chunk: Tensor, offset: int) -> None:
    """Fill a tensor with the bytes of a file from `offset` on."""
    left = memoryview(chunk.view(torch.uint8).numpy())
    while left:
        num_bytes = os.preadv(descriptor, [left], offset)
        if num_bytes == 0:
            raise OSError("a weight file has become shorter while it was read")
        left, offset = left[num_bytes:], offset + num_bytes
