"""Prompts and what was generated behind them: who gets which, and the batch that the next tokens come from.

Legend: B sequences, N tokens generated for each of them so far, T tokens of all prompts, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch

from kto_ds.data.batch import Batch, Segments
from kto_ds.data.packing import Layout


def share_prompts(lengths: Sequence[int], *, max_tokens: int, num_ranks: int) -> list[list[list[int]]]:
    """Return every rank's rounds, each the indices of the sequences that it generates at a time; all ranks get the same number of rounds, empty ones included.

    `lengths` are those that the sequences may get. The longest come first, and as many together as `max_tokens` hold, padded, or else one.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    shares: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    for number, index in enumerate(order):
        share = shares[number % num_ranks]
        if share and (len(share[-1]) + 1) * lengths[share[-1][0]] <= max_tokens:
            share[-1].append(index)
        else:
            share.append([index])
    num_rounds = max(map(len, shares))
    return [share + [[]] * (num_rounds - len(share)) for share in shares]


def continuation_batch(prompts: Sequence[np.ndarray], tokens: np.ndarray, layout: Layout) -> Batch:
    """Return the batch of B prompts with `tokens` [B, N] behind them, whose predictors, B of them, are the last positions of the sequences.

    Packed layouts take the prompts first and then only the newest tokens: the others are in the memory of the attention layers. The padded layout takes
    whole sequences each time, as its models may keep any state of them.
    """
    if layout == "padded":
        return _whole([np.concatenate(parts) for parts in zip(prompts, tokens)])
    return _newest(prompts, tokens) if tokens.shape[1] else _first(prompts)


def _whole(sequences: list[np.ndarray]) -> Batch:
    longest = max(map(len, sequences))
    input_ids = np.zeros((len(sequences), longest), dtype=np.int64)
    attention_mask = np.zeros_like(input_ids)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = sequence
        attention_mask[row, : len(sequence)] = 1
    ends = longest * np.arange(len(sequences)) + [len(sequence) - 1 for sequence in sequences]
    return _batch(input_ids, np.tile(np.arange(longest), (len(sequences), 1)), ends, attention_mask=torch.from_numpy(attention_mask))


def _first(prompts: Sequence[np.ndarray]) -> Batch:
    lengths = [len(prompt) for prompt in prompts]
    positions = np.concatenate([np.arange(length) for length in lengths])
    segments = _segments(lengths, lengths, key_index=None)
    return _batch(np.concatenate(prompts)[None], positions[None], np.cumsum(lengths) - 1, segments=segments)


def _newest(prompts: Sequence[np.ndarray], tokens: np.ndarray) -> Batch:
    (num_sequences, num_tokens), prompt_lengths = tokens.shape, [len(prompt) for prompt in prompts]
    starts = np.cumsum([0, *prompt_lengths])
    came = starts[-1] + num_sequences * np.arange(num_tokens)  # where the tokens of the first sequence are remembered
    key_index = np.concatenate([part for row in range(num_sequences) for part in (np.arange(starts[row], starts[row + 1]), came + row)])
    lengths = [length + num_tokens for length in prompt_lengths]
    segments = _segments([1] * num_sequences, lengths, key_index=torch.from_numpy(key_index))
    return _batch(tokens[:, -1][None], np.array(lengths)[None] - 1, np.arange(num_sequences), segments=segments)


def _segments(query_lengths: list[int], key_lengths: list[int], *, key_index: torch.Tensor | None) -> Segments:
    offsets = [torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32) for lengths in (query_lengths, key_lengths)]
    return Segments(*offsets, key_index, tuple(query_lengths), tuple(key_lengths))


def _batch(input_ids: np.ndarray, positions: np.ndarray, ends: np.ndarray, *, attention_mask: torch.Tensor | None = None, segments: Segments | None = None) -> Batch:
    """Return a batch in which nothing is scored: [R, L], [R, L], [B]."""
    return Batch(
        input_ids=torch.from_numpy(input_ids.astype(np.int64)), position_ids=torch.from_numpy(positions), attention_mask=attention_mask, segments=segments,
        predictors=torch.from_numpy(ends), targets=torch.zeros(len(ends), dtype=torch.int64), completion_lengths=torch.ones(len(ends), dtype=torch.int64),
        uses=torch.zeros(input_ids.shape), pair_ids=np.arange(len(ends)),
    )  # fmt: skip
