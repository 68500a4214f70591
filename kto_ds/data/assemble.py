"""From tokenized rows to a TokenizedSplit: truncation, distinct prompts, KL groups. Decided here once, for matched and mismatched pairs alike."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.kl_groups import assign_kl_groups
from kto_ds.errors import UserError


class Assembled(NamedTuple):
    split: TokenizedSplit
    report: dict  # counts and lengths, for data_report.json


def assemble_split(
    prompt_ids: Sequence[Sequence[int]],  # one a row
    completion_ids: Sequence[Sequence[int]],
    *,
    desirable: Sequence[bool],
    row_names: Sequence[str],
    max_length: int,
    kl_group_size: int,
    max_group_examples: int,
    shuffle: bool,
    seed: int,
    where: str = "data.train",
) -> Assembled:
    """Drop rows whose prompt leaves no room, cut completions at `max_length` (keep_start), and pair every completion with another prompt.

    A completion is cut for each of its two pairs apart, since their prompts differ in length; its tokens are kept as far as either needs them.
    """
    kept = [row for row, prompt in enumerate(prompt_ids) if len(prompt) < max_length]
    if not kept:
        raise UserError(f"every prompt has {max_length} tokens or more, so that no completion fits", where="data.max_length", remedy="raise data.max_length")
    prompt_of, prompts = _distinct([np.asarray(prompt_ids[row], dtype=np.int32) for row in kept])
    desirable_kept = np.asarray([desirable[row] for row in kept], dtype=bool)
    kl_group_of, mismatched_prompt_of = assign_kl_groups(
        prompt_of, desirable_kept, kl_group_size=kl_group_size, max_examples=max_group_examples, shuffle=shuffle, seed=seed, where=where
    )
    lengths = np.array([len(completion_ids[row]) for row in kept])
    room = max_length - np.array([len(prompt) for prompt in prompts])  # [P]
    matched, mismatched = np.minimum(lengths, room[prompt_of]), np.minimum(lengths, room[mismatched_prompt_of])
    completions = [np.asarray(completion_ids[row][:needed], dtype=np.int32) for row, needed in zip(kept, np.maximum(matched, mismatched))]
    split = TokenizedSplit(
        prompt_tokens=np.concatenate(prompts),
        prompt_offsets=_offsets(prompts),
        completion_tokens=np.concatenate(completions),
        completion_offsets=_offsets(completions),
        prompt_of=prompt_of,
        mismatched_prompt_of=mismatched_prompt_of,
        matched_lengths=matched,
        mismatched_lengths=mismatched,
        desirable=desirable_kept,
        kl_group_of=kl_group_of,
        row_names=np.array([row_names[row] for row in kept]),
    )
    return Assembled(split, _report(split, num_rows=len(prompt_ids), num_truncated=int((matched < lengths).sum())))


def _distinct(prompts: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return (index of each row's prompt [E], the distinct prompts in order of appearance)."""
    index_of: dict[bytes, int] = {}
    distinct = []
    prompt_of = np.empty(len(prompts), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        key = prompt.tobytes()
        if key not in index_of:
            index_of[key] = len(distinct)
            distinct.append(prompt)
        prompt_of[row] = index_of[key]
    return prompt_of, distinct


def _offsets(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)


def _report(split: TokenizedSplit, *, num_rows: int, num_truncated: int) -> dict:
    lengths = split.prompt_lengths[split.prompt_of] + split.matched_lengths
    return {
        "rows": num_rows,
        "examples": split.num_examples,
        "dropped_prompt_fills_max_length": num_rows - split.num_examples,
        "truncated_completions": num_truncated,
        "desirable": int(split.desirable.sum()),
        "undesirable": int((~split.desirable).sum()),
        "distinct_prompts": len(split.prompt_lengths),
        "kl_groups": int(split.kl_group_of.max()) + 1,
        "tokens": int(lengths.sum()),
        "longest_tokens": split.longest_pair_tokens,
        "mean_prompt_tokens": round(float(split.prompt_lengths[split.prompt_of].mean()), 1),
        "mean_completion_tokens": round(float(split.matched_lengths.mean()), 1),
    }
