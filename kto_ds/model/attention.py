"""Attention over packed sequences, as one function that transformers calls in every layer.

Legend: H query heads, Hkv key/value heads, T input tokens, TK key tokens, D head size, G segments.
Query segment g sees key segment g, causally and aligned at their ends: plain variable-length attention with different query and key
lengths. Shared prompts work because the key segment of a completion is its prompt and itself, gathered by index.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from kto_ds.data.batch import Segments
from kto_ds.errors import UserError

# No "flash" in it: transformers takes such names for its own kernels. No mask is registered for it, so models pass None.
NAME = "kto_varlen"
# (attend, query, key, value) -> output, where ranks share a row: runtime/sequence_parallel.py.
Exchange = Callable[[Callable[..., Tensor], Tensor, Tensor, Tensor], Tensor]


class Memory:
    """Keys and values of every attention layer, in the order in which their tokens came: what generation goes on from."""

    def __init__(self):
        self._of_layer: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def extended(self, layer: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of all tokens so far, [1, Hkv, T of all, D], where these are of the newest ones."""
        past = self._of_layer.get(layer)
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        self._of_layer[layer] = key, value
        return key, value


def packed_attention(
    kernel: Callable[..., Tensor], module, query: Tensor, key: Tensor, value: Tensor, attention_mask, *, exchange: Exchange | None = None, **options
) -> tuple[Tensor, None]:
    """Attention of one layer on a packed row: query [1, H, T, D], key and value [1, Hkv, T, D] -> ([1, T, H, D], None).

    Where ranks share the row, T are the tokens of this rank's part, and `exchange` brings the heads of all tokens together.
    `options` are what the model hands down: `segments` and `memory` (from Policy.forward), `scaling`, `sliding_window`, `s_aux` (attention sinks, which the
    sdpa kernel serves), and soft-capped scores, which are refused. With a memory, keys are those of all tokens so far, and no row is shared.
    Dropout is off in every model that load_policy returns.
    """
    segments: Segments | None = options.get("segments")
    if segments is None:
        raise UserError(f"{type(module).__name__} does not hand keyword arguments down to its attention", where="model.layout", remedy="set model.layout: padded")
    if options.get("softcap") is not None:
        raise UserError(f"{type(module).__name__} needs soft-capped attention, which the packed layouts do not have", where="model.layout", remedy="set model.layout: padded")
    sinks = options.get("s_aux")
    if sinks is not None and kernel is not sdpa_kernel:
        raise UserError(f"{type(module).__name__} has attention sinks, which only the sdpa kernel serves", where="model.attention", remedy="set model.attention: sdpa")
    assert attention_mask is None, "a packed row has no attention mask"
    assert query.shape[0] == 1, f"a packed batch has one row, found {tuple(query.shape)}"
    own = {} if sinks is None else {"sinks": sinks}
    attend = partial(_attend, kernel, segments, scale=options.get("scaling"), window=options.get("sliding_window"), **own)
    memory: Memory | None = options.get("memory")
    if memory is not None:
        return attend(query, *memory.extended(module, key, value)), None
    return (exchange(attend, query, key, value) if exchange else attend(query, key, value)), None


def _attend(kernel: Callable[..., Tensor], segments: Segments, query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
    if segments.key_index is not None:
        key, value = key.index_select(2, segments.key_index), value.index_select(2, segments.key_index)
    return kernel(query[0], key[0], value[0], segments, **options).unsqueeze(0)


def sdpa_kernel(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, scale: float | None, window: int | None, sinks: Tensor | None = None
) -> Tensor:
    """One scaled_dot_product_attention call per segment, on any device: query [H, T, D], key and value [Hkv, TK, D] -> [T, H, D].

    `sinks` [H] are scores that every query of a head has beside those of its keys: they take probability, and give no value.
    """
    if sinks is not None:
        return _sdpa_with_sinks(query, key, value, segments, sinks, scale=scale or query.shape[-1] ** -0.5, window=window)
    outputs = []
    for q, k, v in _by_segment(query, key, value, segments):
        square = q.shape[1] == k.shape[1] and not (window and window < k.shape[1])
        mask = None if square else _causal_mask(q.shape[1], k.shape[1], window, q.device)
        outputs.append(F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, is_causal=square, scale=scale, enable_gqa=query.shape[0] != key.shape[0])[0])
    return torch.cat(outputs, dim=1).transpose(0, 1)


def _sdpa_with_sinks(query: Tensor, key: Tensor, value: Tensor, segments: Segments, sinks: Tensor, *, scale: float, window: int | None) -> Tensor:
    # The sink of a segment is one more key, of zeros like its value, but for a place that heads get more: there it has a one, other keys have
    # a zero, and queries the sink of their head. Eight places, seven of them zeros, as kernels want multiples of 8.
    own_sink = F.pad((sinks / scale).to(query.dtype)[:, None, None], (0, 7))  # [H, 1, 8]
    query = torch.cat([query, own_sink.expand(-1, query.shape[1], -1)], dim=-1)
    key, value = F.pad(key, (0, 8)), F.pad(value, (0, 8))
    sink_key, sink_value = torch.zeros_like(key[:, :1]), torch.zeros_like(value[:, :1])
    sink_key[..., -8] = 1
    outputs = []
    for q, k, v in _by_segment(query, key, value, segments):
        mask = F.pad(_causal_mask(q.shape[1], k.shape[1], window, q.device), (0, 1), value=True)
        k, v = torch.cat([k, sink_key], dim=1), torch.cat([v, sink_value], dim=1)
        outputs.append(F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scale, enable_gqa=query.shape[0] != key.shape[0])[0])
    return torch.cat(outputs, dim=1).transpose(0, 1)[..., :-8]


def _by_segment(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    return zip(query.split(segments.query_lengths, dim=1), key.split(segments.key_lengths, dim=1), value.split(segments.key_lengths, dim=1))


def _causal_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """Bool [num_queries, num_keys], true where a query may look; the last query stands on the last key."""
    query_at = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key_at = torch.arange(num_keys, device=device)[None]
    mask = key_at <= query_at
    return mask & (key_at > query_at - window) if window else mask


def flash_attention_2_kernel(query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, scale: float | None, window: int | None) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1),
        cu_seqlens_q=segments.query_offsets, cu_seqlens_k=segments.key_offsets,
        max_seqlen_q=max(segments.query_lengths), max_seqlen_k=max(segments.key_lengths),
        softmax_scale=scale, causal=True, window_size=_flash_window(window),
    )  # fmt: skip


def torch_varlen_kernel(query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, scale: float | None, window: int | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    accepted = inspect.signature(varlen_attn).parameters
    options = {"scale": scale} if "scale" in accepted else {}
    if "window_size" in accepted:  # torch 2.11 and later
        options["window_size"] = _flash_window(window)
    elif window is None:
        options["is_causal"] = True
    else:
        raise UserError("varlen_attn of this torch has no sliding window", where="model.attention", remedy="use torch 2.11 or later, or model.attention: sdpa")
    if "enable_gqa" in accepted:  # torch 2.12 and later
        options["enable_gqa"] = query.shape[0] != key.shape[0]
    if scale is not None and "scale" not in accepted:
        query = query * (scale * query.shape[-1] ** 0.5)
    return varlen_attn(
        query.transpose(0, 1).contiguous(), key.transpose(0, 1).contiguous(), value.transpose(0, 1).contiguous(),
        segments.query_offsets, segments.key_offsets, max(segments.query_lengths), max(segments.key_lengths), **options,
    )  # fmt: skip


def _flash_window(window: int | None) -> tuple[int, int]:
    # Flash kernels count the keys to the left of the query; transformers counts the query in.
    return (window - 1 if window else -1, 0)


KERNELS = {"flash_attention_2": flash_attention_2_kernel, "torch_varlen": torch_varlen_kernel, "sdpa": sdpa_kernel}


def register_attention(backend: str, exchange: Exchange | None = None) -> str:
    """Tell transformers about packed attention with this kernel and return the name to load a model with."""
    AttentionInterface.register(NAME, partial(packed_attention, KERNELS[backend], exchange=exchange))
    return NAME


def choose_backend(requested: str, *, device: torch.device, dtype: torch.dtype, has_sinks: bool = False) -> str:
    """Return the kernel for `model.attention`, the best one available for `auto`; UserError where the requested one cannot run."""
    fits = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and not has_sinks
    available = {
        "sdpa": True,
        "torch_varlen": fits and find_spec("torch.nn.attention.varlen") is not None,
        # Other packages share the name flash_attn; this module is that of flash-attn 2.
        "flash_attention_2": fits and find_spec("flash_attn") is not None and find_spec("flash_attn.flash_attn_interface") is not None,
    }
    if requested == "auto":
        return next(name for name in ("flash_attention_2", "torch_varlen", "sdpa") if available[name])
    if not available[requested]:
        usable = ", ".join(name for name, usable in available.items() if usable)
        for_what = f"on {device.type} in {dtype}" + (" for a model with attention sinks" if has_sinks else "")
        raise UserError(f"{requested} cannot run here {for_what}; usable: {usable}", where="model.attention", remedy="set model.attention: auto")
    return requested
