"""Completions of prompts, a token at a time, through the same forward as all log-probs.

Legend: B sequences, N tokens generated for each of them so far, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kto_ds.data.continuation import continuation_batch
from kto_ds.data.packing import Layout
from kto_ds.model.attention import Memory


class Completion(NamedTuple):
    tokens: list[int]  # the one that ended it among them
    stopped: str  # by an "eos", or by its "length"


@torch.no_grad()
def generate(
    forward: Callable[..., Tensor],  # that of Policy
    prompts: Sequence[np.ndarray],
    *,
    draws: np.ndarray,  # [B, tokens that a completion may have], uniform in [0, 1): what is random in them
    temperature: float,
    top_p: float,
    stop_ids: Sequence[int],
    layout: Layout,
    device: torch.device,
    is_over: Callable[[bool], bool],
) -> list[Completion]:
    """Return a completion of each prompt. No random generator is touched, nor any module's mode.

    `is_over` is told ahead of every forward whether all sequences have come to their end, and says whether to leave it at that. A partitioned model is run
    equally often on every rank, also one without prompts: all ranks give the same answer then, and the same number of columns in `draws`.
    """
    memory, own = Memory(), prompts or [np.zeros(1, dtype=np.int64)]
    tokens = np.zeros((len(own), 0), dtype=np.int64)  # [B, N]
    ended = np.full(len(own), not prompts)
    while tokens.shape[1] < draws.shape[1] and not is_over(bool(ended.all())):
        logits = forward(continuation_batch(own, tokens, layout).to(device), memory=memory)
        column = draws[:, tokens.shape[1]] if prompts else np.zeros(1)
        newest = choose_tokens(logits, torch.from_numpy(column).to(device), temperature=temperature, top_p=top_p).cpu().numpy()
        tokens = np.column_stack([tokens, newest])
        ended |= np.isin(newest, stop_ids)
    return [_until_stop(row.tolist(), stop_ids) for row in tokens[: len(prompts)]]


def choose_tokens(logits: Tensor, draws: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """Return the next token of each sequence, [B]: the likeliest at temperature 0, else where `draws` [B] fall in the distribution of logits [B, V]."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities, order = (logits.double() / temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    likelier = probabilities.cumsum(dim=-1) - probabilities  # together, than each token
    kept = likelier < top_p
    totals = (probabilities * kept).cumsum(dim=-1)
    places = torch.searchsorted(totals, draws[:, None] * totals[:, -1:], right=True)
    last = kept.sum(dim=-1, keepdim=True) - 1  # below 0 where the logits are no numbers
    return order.gather(1, places.minimum(last).clamp(min=0)).squeeze(1)


def _until_stop(tokens: list[int], stop_ids: Sequence[int]) -> Completion:
    end = next((number for number, token in enumerate(tokens, start=1) if token in stop_ids), None)
    return Completion(tokens[:end], "length" if end is None else "eos")
