"""Tokenized rows of one block, on disk between tokenization and assembly. A killed prepare continues with the segments that are there."""

import json
import os
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from kto_ds.data.tokenization import RowTokens


class Limits(NamedTuple):
    """What is cut or dropped before rows are paired. Tokens; None is no limit of its own."""

    max_length: int
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    truncation_mode: str = "keep_start"


class Segment(NamedTuple):
    """N rows after the limits. Keys are xxh3-128 digests of the ids, as two uint64."""

    prompt_tokens: np.ndarray  # [all prompt tokens] int32
    completion_tokens: np.ndarray  # [all completion tokens] int32
    prompt_lengths: np.ndarray  # [N] int32
    completion_lengths: np.ndarray  # [N] int32
    full_prompt_lengths: np.ndarray  # [N] int32, before anything was cut
    full_completion_lengths: np.ndarray  # [N] int32
    prompt_keys: np.ndarray  # [N, 2] uint64
    completion_keys: np.ndarray  # [N, 2] uint64
    desirable: np.ndarray  # [N] bool
    row_of: np.ndarray  # [N] int64, number of the row in its file
    boundary_merged: np.ndarray  # [N] bool
    has_special_text: np.ndarray  # [N] bool
    has_control_characters: np.ndarray  # [N] bool


class Row(NamedTuple):
    """One tokenized row on its way into a segment."""

    tokens: RowTokens
    number: int
    desirable: bool
    has_control_characters: bool


def fit(tokens: RowTokens, limits: Limits) -> tuple[np.ndarray, np.ndarray] | str:
    """Return (prompt ids, completion ids) within the limits, or why the row cannot be fitted.

    A long prompt keeps its first tokens with keep_start and its last ones with keep_end; a completion loses its end in both.
    With drop and error nothing is cut.
    """
    prompt, completion = tokens.prompt_ids, tokens.completion_ids
    longest_prompt, longest_completion = limits.max_prompt_length or len(prompt), limits.max_completion_length or len(completion)
    if limits.truncation_mode in ("drop", "error"):
        if len(prompt) > longest_prompt:
            return f"the prompt has {len(prompt)} tokens, data.max_prompt_length is {longest_prompt}"
        if len(completion) > longest_completion:
            return f"the completion has {len(completion)} tokens, data.max_completion_length is {longest_completion}"
        if len(prompt) + len(completion) > limits.max_length:
            return f"prompt and completion have {len(prompt) + len(completion)} tokens, data.max_length is {limits.max_length}"
        return prompt, completion
    if len(prompt) > longest_prompt:
        prompt = prompt[-longest_prompt:] if limits.truncation_mode == "keep_end" else prompt[:longest_prompt]
    if len(prompt) >= limits.max_length:
        return f"the prompt has {len(prompt)} tokens and leaves no room for a completion, data.max_length is {limits.max_length}"
    # How much of the completion fits also depends on the other prompt that it is paired with; no prompt is shorter than one token.
    return prompt, completion[: min(longest_completion, limits.max_length - 1)]


def make_segment(rows: list[Row], limits: Limits) -> tuple[Segment, list[tuple[int, str]]]:
    """Return the segment of the rows that fit, and (number, reason) of those that do not."""
    fitted = [(row, fit(row.tokens, limits)) for row in rows]
    kept = [(row, found) for row, found in fitted if not isinstance(found, str)]
    prompts, completions = [prompt for _, (prompt, _) in kept], [completion for _, (_, completion) in kept]
    segment = Segment(
        prompt_tokens=np.concatenate([np.empty(0, np.int32), *prompts]),
        completion_tokens=np.concatenate([np.empty(0, np.int32), *completions]),
        prompt_lengths=_ints(map(len, prompts)),
        completion_lengths=_ints(map(len, completions)),
        full_prompt_lengths=_ints(len(row.tokens.prompt_ids) for row, _ in kept),
        full_completion_lengths=_ints(len(row.tokens.completion_ids) for row, _ in kept),
        prompt_keys=_keys(prompts),
        completion_keys=_keys(completions),
        desirable=np.array([row.desirable for row, _ in kept], dtype=bool),
        row_of=np.array([row.number for row, _ in kept], dtype=np.int64),
        boundary_merged=np.array([row.tokens.boundary_merged for row, _ in kept], dtype=bool),
        has_special_text=np.array([row.tokens.has_special_text for row, _ in kept], dtype=bool),
        has_control_characters=np.array([row.has_control_characters for row, _ in kept], dtype=bool),
    )
    return segment, [(row.number, found) for row, found in fitted if isinstance(found, str)]


def _ints(values) -> np.ndarray:
    return np.fromiter(values, dtype=np.int32)


def _keys(sequences: list[np.ndarray]) -> np.ndarray:
    digests = b"".join(xxhash.xxh3_128_digest(sequence.tobytes()) for sequence in sequences)
    return np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2)


def save_segment(path: Path, segment: Segment, notes: dict) -> None:
    """Write a segment with what there is to say about its block; a reader sees a whole file or none."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "wb") as stream:
        np.savez(stream, notes=np.array(json.dumps(notes)), **segment._asdict())
    temporary.replace(path)


def is_whole(path: Path) -> bool:
    """Tell whether a segment is there and every byte of it is what was written."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def load_notes(path: Path) -> dict:
    with np.load(path, allow_pickle=False) as arrays:
        return json.loads(str(arrays["notes"]))


def load_arrays(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Return some arrays of a segment; the zip archive checks their CRC as they are read."""
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in names}
