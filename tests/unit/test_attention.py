"""Packed attention against softmax(QK)V under a dense mask in float64."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from kto_ds.data.batch import Segments
from kto_ds.errors import UserError
from kto_ds.model.attention import (
    KERNELS, NAME, choose_backend, flash_attention_2_kernel, packed_attention, register_attention, sdpa_kernel, torch_varlen_kernel,
)  # fmt: skip

HEAD_SIZE = 6


def random_segments(seed: int, *, shared: bool) -> tuple[Segments, Tensor, Tensor]:
    """Return (segments, owner [T, T] bool, distance [T, T]): whether key j is in the sequence of query i, and how far back it stands."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    query_lengths, key_lengths, key_index, sequences = [], [], [], []  # sequences: (positions of its keys, positions of its queries)
    at = 0
    for _ in range(draw(1, 5)):
        prompt = list(range(at, at + draw(1, 8)))
        at += len(prompt)
        num_completions = draw(2, 5) if shared and draw(0, 3) else 1
        if num_completions == 1:
            whole = prompt + list(range(at, at + draw(1, 9)))
            parts = [(whole, whole)]
            at = whole[-1] + 1
        else:
            parts = [(prompt, prompt)]
            for _ in range(num_completions):
                own = list(range(at, at + draw(1, 9)))
                parts.append((prompt + own, own))
                at += len(own)
        for keys, queries in parts:
            query_lengths.append(len(queries))
            key_lengths.append(len(keys))
            key_index += keys
            sequences.append((keys, queries))
    visible, distance = torch.zeros(at, at, dtype=torch.bool), torch.zeros(at, at, dtype=torch.int64)
    for keys, queries in sequences:
        for query in queries:
            for key in keys:
                visible[query, key] = True
                distance[query, key] = keys.index(query) - keys.index(key)
    offsets = [torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32) for lengths in (query_lengths, key_lengths)]
    identical = key_index == list(range(at))
    segments = Segments(offsets[0], offsets[1], None if identical else torch.tensor(key_index), tuple(query_lengths), tuple(key_lengths))
    return segments, visible, distance


def dense_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """[1, H, T, D] with [1, Hkv, T, D] under mask [T, T] -> [1, T, H, D]."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~mask, -torch.inf)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_every_token_sees_its_own_sequence_up_to_itself(seed, shared, window, num_kv_heads):
    segments, owner, distance = random_segments(seed, shared=shared)
    num_tokens = len(owner)
    mask = owner & (distance >= 0) & (distance < (window or num_tokens))
    torch.manual_seed(seed)
    query, key, value = (torch.randn(1, heads, num_tokens, HEAD_SIZE, dtype=torch.float64, requires_grad=True) for heads in (4, num_kv_heads, num_kv_heads))
    scale = [0.3, HEAD_SIZE**-0.5][seed % 2]

    found, weights = packed_attention(sdpa_kernel, None, query, key, value, None, segments=segments, scaling=scale if seed % 2 == 0 else None, sliding_window=window)
    expected = dense_attention(query, key, value, mask, scale)
    assert weights is None and found.shape == (1, num_tokens, 4, HEAD_SIZE)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(found)
    for ours, oracle in zip(torch.autograd.grad(found, (query, key, value), upstream), torch.autograd.grad(expected, (query, key, value), upstream)):
        torch.testing.assert_close(ours, oracle, rtol=1e-9, atol=1e-9)


def test_the_random_segments_are_of_both_kinds():
    kinds = {random_segments(seed, shared=True)[0].key_index is None for seed in range(5)}
    assert False in kinds and random_segments(0, shared=False)[0].key_index is None


def one_segment(num_tokens: int) -> Segments:
    offsets = torch.tensor([0, num_tokens], dtype=torch.int32)
    return Segments(offsets, offsets, None, (num_tokens,), (num_tokens,))


def qkv(num_tokens: int, rows: int = 1) -> list[Tensor]:
    return [torch.randn(rows, 2, num_tokens, HEAD_SIZE) for _ in range(3)]


def test_soft_capped_scores_are_refused_and_not_ignored():
    with pytest.raises(UserError, match="Odd needs soft-capped attention") as caught:
        packed_attention(sdpa_kernel, type("Odd", (), {})(), *qkv(3), None, segments=one_segment(3), softcap=50.0)
    assert caught.value.where == "model.layout" and "padded" in caught.value.remedy
    packed_attention(sdpa_kernel, None, *qkv(3), None, segments=one_segment(3), softcap=None)


@pytest.mark.parametrize("kernel", [torch_varlen_kernel, flash_attention_2_kernel])
def test_sinks_are_refused_by_kernels_that_would_ignore_them(kernel):
    with pytest.raises(UserError, match="Odd has attention sinks, which only the sdpa kernel serves") as caught:
        packed_attention(kernel, type("Odd", (), {})(), *qkv(3), None, segments=one_segment(3), s_aux=torch.zeros(2))
    assert caught.value.where == "model.attention" and "sdpa" in caught.value.remedy


def test_a_model_that_drops_the_segments_is_refused():
    with pytest.raises(UserError, match="SimpleNamespace does not hand keyword arguments down") as caught:
        packed_attention(sdpa_kernel, SimpleNamespace(), *qkv(3), None)
    assert caught.value.where == "model.layout"


def test_a_mask_or_a_second_row_is_a_broken_invariant():
    with pytest.raises(AssertionError, match="no attention mask"):
        packed_attention(sdpa_kernel, None, *qkv(3), torch.ones(1, 1, 3, 3), segments=one_segment(3))
    with pytest.raises(AssertionError, match="has one row"):
        packed_attention(sdpa_kernel, None, *qkv(3, rows=2), None, segments=one_segment(3))


def test_transformers_knows_the_registered_attention():
    assert register_attention("sdpa") == NAME and "flash" not in NAME
    assert AttentionInterface()[NAME].args == (sdpa_kernel,)


def test_the_backend_is_the_best_that_can_run():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_backend("auto", device=cpu, dtype=torch.bfloat16) == "sdpa"
    assert choose_backend("auto", device=cuda, dtype=torch.float32) == "sdpa"
    assert choose_backend("auto", device=cuda, dtype=torch.bfloat16) in ("flash_attention_2", "torch_varlen")
    for backend in KERNELS:
        if backend != "sdpa":
            with pytest.raises(UserError, match=f"{backend} cannot run here on cpu in torch.float32; usable: sdpa") as caught:
                choose_backend(backend, device=cpu, dtype=torch.float32)
            assert caught.value.where == "model.attention"
