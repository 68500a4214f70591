"""Where a model that is only read lies: a whole copy on every rank, or partitioned over them. Decided in bytes, before weights are read."""

import math
from pathlib import Path
from typing import Literal, NamedTuple

from safetensors import safe_open
from transformers import PretrainedConfig

from kto_ds.model.logprobs import DEVICE_CHUNK_BYTES
from kto_ds.model.support import DTYPES, experts_of_a_token

GIB = 1 << 30
# Of the free memory; the allocator's fragments and the kernels' own buffers take the rest.
USABLE = 0.92
FOUR_BIT_BYTES = 0.516  # of a weight: 4 bits, a scale of 8 bits for 64 weights, and one of 32 for 256 scales (arXiv 2305.14314)

Kind = Literal["replica", "sharded"]


class Placement(NamedTuple):
    kind: Kind
    why: str  # for the user


def weight_bytes(folder: Path, names: list[str], dtype: str, *, vocab_size_in_4bit: int | None = None) -> int:
    """Return about what the weights of some safetensors files take in memory, once read as `dtype`. Only the files' headers are read.

    Where a vocabulary size is given, all matrices but embeddings and head are read in 4 bits.
    """
    size = 0.0
    for name in names:
        with safe_open(folder / name, framework="numpy") as file:
            for key in file.keys():
                shape = file.get_slice(key).get_shape()
                is_quantised = vocab_size_in_4bit is not None and len(shape) == 2 and vocab_size_in_4bit not in shape
                size += math.prod(shape) * (FOUR_BIT_BYTES if is_quantised else DTYPES[dtype].itemsize)
    return int(size)


def working_bytes(config: PretrainedConfig, max_tokens: int, dtype: str) -> int:
    """Return about what one no-grad forward over `max_tokens` takes besides the weights.

    The widest place of a decoder: residual, normed input, queries, keys and values with their gathered copies, and the three products of
    the MLP, of one layer at a time, where every token has a copy for each of its experts; then a chunk of float32 logits.
    """
    entries = config.get_text_config().to_dict()
    hidden = entries.get("hidden_size") or 0
    inner = entries.get("intermediate_size") or 4 * hidden
    if copies := experts_of_a_token(config.get_text_config()):
        inner = max(inner, copies * (entries.get("moe_intermediate_size") or inner))
    return max_tokens * ((8 + 2 * copies) * hidden + 3 * inner) * DTYPES[dtype].itemsize + DEVICE_CHUNK_BYTES


def choose_placement(requested: str, *, weights: int, working: int, free: int, num_ranks: int, offloads: bool) -> Placement:
    """Return the placement for `reference.placement`. All in bytes; `free` is that of the rank that has least.

    `auto` takes whole copies where they fit, since ranks that need nothing of each other are the fastest. A single rank has nobody to
    share with, unless DeepSpeed may offload parameters.
    """
    needed = weights + working
    sizes = f"{weights / GIB:.1f} GiB of weights and about {working / GIB:.1f} GiB of work, {free / GIB:.1f} GiB free"
    if requested != "auto":
        return Placement(requested, f"as configured ({sizes})")
    if needed <= USABLE * free:
        return Placement("replica", f"a copy fits on every rank ({sizes})")
    if num_ranks > 1 or offloads:
        return Placement("sharded", f"a copy does not fit on a rank ({sizes})")
    return Placement("replica", f"tight on the only rank there is ({sizes}); with more ranks it would be partitioned")
