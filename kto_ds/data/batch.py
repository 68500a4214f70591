"""One micro-batch as tensors, in one of three layouts.

Legend: T input tokens, R rows, L padded row length, S sequences (pairs), C completion tokens of all sequences, G attention segments,
TK key/value tokens of all segments. Packed layouts have one row: [R, L] = [1, T], of a length that `row_length` rounds up to.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.packing import Layout, MicroBatch

# Packed rows have one of so many lengths between T and 2T tokens: an allocator that sees a new length in every micro-batch finds no freed
# block that fits. At most 1/64 of a row is filling, half of that on average.
LENGTHS_PER_DOUBLING = 64


@dataclass(frozen=True)
class Segments:
    """Who attends to whom: query segment g sees key/value segment g causally, aligned at their ends."""

    query_offsets: Tensor  # [G + 1] int32
    key_offsets: Tensor  # [G + 1] int32
    key_index: Tensor | None  # [TK] int64, input position of every key; None where keys are the queries' own positions
    query_lengths: tuple[int, ...]  # on the host, for kernels that loop or need maxima
    key_lengths: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    input_ids: Tensor  # [R, L] int64
    position_ids: Tensor  # [R, L] int64
    attention_mask: Tensor | None  # [R, L] int64, padded layout only
    segments: Segments | None  # packed layouts only
    predictors: Tensor  # [C] int64, flat input position whose hidden state predicts a completion token
    targets: Tensor  # [C] int64
    completion_lengths: Tensor  # [S] int64, which add up to C: the tokens of a sequence lie together
    uses: Tensor  # [R, L] float32, how many of the scored pairs a token belongs to; 0 in what fills rows up, and in all of a filler
    pair_ids: np.ndarray  # [S], on the host; empty in a filler, whose forward scores one sequence and keeps none
    part: int = 0  # of a row whose tokens several ranks share: which of its parts this is

    @property
    def num_pairs(self) -> int:
        return len(self.pair_ids)

    @property
    def is_counted(self) -> bool:
        """Whether the log-probs go into sums over all ranks: those of a shared row come out on every rank that has a part of it."""
        return self.part == 0

    def pinned(self) -> "Batch":
        """Return a copy in page-locked memory, so that `to` has nothing left to do but the copy to the GPU."""
        return _with_tensors(self, Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        return _with_tensors(self, lambda tensor: to_device(tensor, device))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to the device. From memory that is not page-locked the copy would wait until a GPU has done all that was queued before it."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _with_tensors(record, change: Callable[[Tensor], Tensor]):
    changed = {}
    for field in fields(record):
        value = vars(record)[field.name]
        if isinstance(value, Tensor):
            changed[field.name] = change(value)
        elif isinstance(value, Segments):
            changed[field.name] = _with_tensors(value, change)
    return replace(record, **changed)


def make_batch(micro_batch: MicroBatch, split: TokenizedSplit, layout: Layout, *, num_parts: int = 1) -> Batch:
    """Lay a micro-batch out; an empty one becomes a filler that runs the model on two tokens and returns no log-prob.

    With several parts the length of the row, packed then, is a multiple of their number.
    """
    if micro_batch:
        rows = [(split.prompt(unit.prompt), [split.completion(pair) for pair in unit.pairs]) for unit in micro_batch]
    else:
        token = split.prompt_tokens[:1]
        rows = [(token, [token])]
    batch = _padded(rows) if layout == "padded" else _packed(rows, num_parts)
    uses = batch.uses if micro_batch else torch.zeros_like(batch.uses)
    return replace(batch, uses=uses, pair_ids=np.array([pair for unit in micro_batch for pair in unit.pairs], dtype=np.int64))


def part_of(batch: Batch, part: int, num_parts: int) -> Batch:
    """Return one of `num_parts` equal parts of a packed row, with the completion tokens that it predicts; the segments stay those of the whole row."""
    length = batch.input_ids.shape[1] // num_parts
    tokens = slice(part * length, (part + 1) * length)
    own = (batch.predictors >= tokens.start) & (batch.predictors < tokens.stop)  # [C]
    return replace(
        batch,
        input_ids=batch.input_ids[:, tokens],
        position_ids=batch.position_ids[:, tokens],
        uses=batch.uses[:, tokens],
        predictors=batch.predictors[own] - tokens.start,
        targets=batch.targets[own],
        completion_lengths=torch.stack([sequence.sum() for sequence in own.split(batch.completion_lengths.tolist())]),
        part=part,
    )


# A row is a prompt and the completions behind it.
Row = tuple[np.ndarray, list[np.ndarray]]


def _packed(rows: list[Row], num_parts: int) -> Batch:
    """One after the other; a unit's prompt stands once, before all of its completions. What fills the row up is a segment by itself, and not scored."""
    tokens, positions, predictors, lengths, uses = [], [], [], [], []
    query_lengths, key_index, key_lengths = [], [], []
    start = 0  # input position of the current unit
    for prompt, completions in rows:
        size = len(prompt)
        tokens += [prompt, *completions]
        uses += [np.full(size, len(completions)), np.ones(sum(map(len, completions)))]
        positions.append(np.arange(size))
        prompt_positions = np.arange(start, start + size)
        if len(completions) > 1:
            query_lengths.append(size)
            key_lengths.append(size)
            key_index.append(prompt_positions)
        at = start + size
        for completion in completions:
            own = np.arange(at, at + len(completion))
            positions.append(np.arange(size, size + len(completion)))
            predictors += [prompt_positions[-1:], own[:-1]]
            lengths.append(len(completion))
            # With a single completion, prompt and completion are one segment, and no key is needed twice.
            query_lengths.append(len(own) if len(completions) > 1 else size + len(own))
            key_lengths.append(size + len(own))
            key_index += [prompt_positions, own]
            at += len(completion)
        start = at
    if filling := row_length(start, num_parts) - start:
        tokens.append(np.zeros(filling, dtype=np.int64))
        uses.append(np.zeros(filling))
        positions.append(np.arange(filling))
        query_lengths.append(filling)
        key_lengths.append(filling)
        key_index.append(np.arange(start, start + filling))
    shared = sum(key_lengths) > sum(query_lengths)
    if shared and filling:  # the filling sees itself several times, so that the number of gathered keys is one of a few, too
        surplus = row_length(sum(key_lengths)) - sum(key_lengths)
        key_lengths[-1] += surplus
        key_index.append(np.full(surplus, start))
    return Batch(
        input_ids=_tensor(tokens)[None],
        position_ids=_tensor(positions)[None],
        attention_mask=None,
        segments=Segments(
            query_offsets=_offsets(query_lengths),
            key_offsets=_offsets(key_lengths),
            key_index=_tensor(key_index) if shared else None,
            query_lengths=tuple(query_lengths),
            key_lengths=tuple(key_lengths),
        ),
        predictors=_tensor(predictors),
        targets=_tensor([completion for _, completions in rows for completion in completions]),
        completion_lengths=torch.tensor(lengths),
        uses=_tensor(uses)[None].float(),
        pair_ids=np.arange(len(lengths)),
    )


def row_length(tokens: int, num_parts: int = 1) -> int:
    """Return the length, `tokens` or a little more, of a packed row that holds so many tokens; it has few leading bits, and zeros behind them.

    It is a multiple of `num_parts`.
    """
    step = math.lcm(num_parts, 1 << max(0, tokens.bit_length() - LENGTHS_PER_DOUBLING.bit_length()))
    return -(-tokens // step) * step


def _padded(rows: list[Row]) -> Batch:
    """One sequence a row, padded at its end; what follows a token cannot change it, so any causal model is served."""
    sequences = [(prompt, completion) for prompt, completions in rows for completion in completions]
    longest = max(len(prompt) + len(completion) for prompt, completion in sequences)
    input_ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    predictors = []
    for row, (prompt, completion) in enumerate(sequences):
        size = len(prompt) + len(completion)
        input_ids[row, :size] = _tensor([prompt, completion])
        attention_mask[row, :size] = 1
        predictors.append(np.arange(len(prompt) - 1, size - 1) + row * longest)
    return Batch(
        input_ids=input_ids,
        position_ids=torch.arange(longest).repeat(len(sequences), 1),  # not expanded: page-locked memory takes no overlapping rows
        attention_mask=attention_mask,
        segments=None,
        predictors=_tensor(predictors),
        targets=_tensor([completion for _, completion in sequences]),
        completion_lengths=torch.tensor([len(completion) for _, completion in sequences]),
        uses=attention_mask.float(),
        pair_ids=np.arange(len(sequences)),
    )


def _tensor(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def _offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
