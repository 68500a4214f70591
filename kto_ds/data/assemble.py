"""From segments to a TokenizedSplit: which rows, how often, distinct prompts, KL groups. Decided here once, on index arrays only.

The tokens stay on disk until the very end, when they are copied segment by segment into the arrays that training maps.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kto_ds.data.dataset import FILES
from kto_ds.data.keys import distinct, ids_key, pair_keys
from kto_ds.data.kl_groups import assign_kl_groups
from kto_ds.data.segments import Segment, load_arrays
from kto_ds.errors import UserError

INDEX = tuple(name for name in Segment._fields if name not in ("prompt_tokens", "completion_tokens"))


class Rows(NamedTuple):
    """All tokenized rows of some sources, [N] each, in the order they were read. Lengths are those after the limits."""

    prompt_lengths: np.ndarray  # int32
    completion_lengths: np.ndarray  # int32
    full_prompt_lengths: np.ndarray  # int32
    full_completion_lengths: np.ndarray  # int32
    prompt_keys: np.ndarray  # [N, 2] uint64
    completion_keys: np.ndarray  # [N, 2] uint64
    desirable: np.ndarray  # bool
    row_of: np.ndarray  # int64
    boundary_merged: np.ndarray  # bool
    has_special_text: np.ndarray  # bool
    has_control_characters: np.ndarray  # bool
    file_of: np.ndarray  # int32
    segment_of: np.ndarray  # int32
    place_of: np.ndarray  # int32, place of the row in its segment

    def select(self, chosen: np.ndarray) -> "Rows":
        return Rows(*(column[chosen] for column in self))


class Grouping(NamedTuple):
    """How examples are grouped for the reference point, and what bounds a sequence."""

    max_length: int
    kl_group_size: int
    max_group_examples: int
    shuffle: bool
    seed: int


def read_index(segments: list[tuple[int, Path]]) -> Rows:
    """Return the index arrays of the (file, segment) list; the tokens are left where they are."""
    parts = [load_arrays(path, INDEX) for _, path in segments]
    sizes = [len(part["row_of"]) for part in parts]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in INDEX}
    return Rows(
        **columns,
        file_of=np.repeat(np.array([file for file, _ in segments], dtype=np.int32), sizes),
        segment_of=np.repeat(np.arange(len(segments), dtype=np.int32), sizes),
        place_of=np.concatenate([np.arange(size, dtype=np.int32) for size in sizes]),
    )


def hold_out(rows: Rows, fraction: float, seed: int) -> np.ndarray:
    """Return which rows are held out, [N] bool: about `fraction` of the prompts, at least two, with all their rows.

    Rated turns of one conversation have several prompts, each of which holds the ones before it: they stay together too.
    """
    prompt_of, first = distinct(rows.prompt_keys)
    family_of = _joined(prompt_of, rows.file_of, rows.row_of)  # [P]
    families, sizes = np.unique(family_of, return_counts=True)  # a family is named by its first prompt
    wanted = max(2, round(fraction * len(first)))
    order = _by_hash(rows.prompt_keys[first[families]], seed)
    taken = np.cumsum(sizes[order])
    count = int(np.searchsorted(taken, wanted)) + 1
    if count > len(families) or len(first) - taken[count - 1] < 2:
        what = f"{len(first)} distinct prompts cannot be divided into {wanted} held out and two or more to train on"
        raise UserError(what, where="data.held_out_fraction", remedy="lower it, or give rows with more prompts")
    return np.isin(family_of, families[order[:count]])[prompt_of]


def _joined(prompt_of: np.ndarray, file_of: np.ndarray, row_of: np.ndarray) -> np.ndarray:
    """Return the smallest prompt that each prompt is connected to through rows with several prompts, [P]."""
    _, row = np.unique(np.stack([file_of, row_of]), axis=1, return_inverse=True)
    family_of = np.arange(prompt_of.max() + 1)
    while True:
        smallest = np.full(row.max() + 1, len(family_of))
        np.minimum.at(smallest, row, family_of[prompt_of])
        joined = family_of.copy()
        np.minimum.at(joined, prompt_of, smallest[row])
        if (joined == family_of).all():
            return family_of
        family_of = joined


def repeat_by_weight(rows: Rows, source_of: np.ndarray, weights: list[float], seed: int) -> np.ndarray:
    """Return the rows of one epoch, as indices: weight 2 takes every row of a source twice, 0.5 all rows of half its prompts."""
    times = np.array(weights)[source_of]
    passes = [np.flatnonzero(times >= number) for number in range(1, int(max(weights)) + 1)]
    partial = np.zeros(len(source_of), dtype=bool)
    for source, weight in enumerate(weights):
        members = np.flatnonzero(source_of == source)
        prompt_of, first = distinct(rows.prompt_keys[members])
        partial[members] = _lowest(rows.prompt_keys[members][first], round(weight % 1 * len(first)), seed)[prompt_of]
    return np.concatenate([*passes, np.flatnonzero(partial)])


def _lowest(keys: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Choose `count` of the keys, [D] bool."""
    chosen = np.zeros(len(keys), dtype=bool)
    chosen[_by_hash(keys, seed)[:count]] = True
    return chosen


def _by_hash(keys: np.ndarray, seed: int) -> np.ndarray:
    """Return the keys' indices in the order of a seeded hash of each, [D]: keys that are added later leave the others' order as it is."""
    mixed = keys[:, 0] + np.uint64((seed * 0x9E3779B97F4A7C15 + 1) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # the finalizer of splitmix64 (Steele et al. 2014)
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return np.argsort(mixed ^ (mixed >> np.uint64(31)), kind="stable")


class SplitIndex(NamedTuple):
    """A TokenizedSplit without its tokens; `rows` are those of the examples, [E]."""

    rows: Rows
    arrays: dict[str, np.ndarray]  # the fields of TokenizedSplit, tokens and keys apart
    prompt_rows: np.ndarray  # [P], the example whose row holds each prompt
    stored_lengths: np.ndarray  # [E], completion tokens that either pair needs

    @property
    def longest_tokens(self) -> int:
        prompt_lengths = np.diff(self.arrays["prompt_offsets"])
        parts = (("prompt_of", "matched_lengths"), ("mismatched_prompt_of", "mismatched_lengths"))
        return max(int((prompt_lengths[self.arrays[prompt]] + self.arrays[length]).max()) for prompt, length in parts)


def index_split(rows: Rows, grouping: Grouping, *, where: str) -> SplitIndex:
    """Pair every completion with another prompt and cut it where the pair passes max_length.

    A completion is cut for each of its two pairs apart, since their prompts differ in length; its tokens are kept as far as either needs them.
    """
    if not len(rows.row_of):
        raise UserError("no row is left to use", where=where, remedy="give a source of usable rows")
    prompt_of, prompt_rows = distinct(rows.prompt_keys)
    kl_group_of, mismatched_prompt_of = assign_kl_groups(
        prompt_of, rows.desirable, kl_group_size=grouping.kl_group_size, max_examples=grouping.max_group_examples,
        shuffle=grouping.shuffle, seed=grouping.seed, where=where,
    )  # fmt: skip
    lengths = rows.completion_lengths.astype(np.int64)
    prompt_lengths = rows.prompt_lengths[prompt_rows].astype(np.int64)  # [P]
    room = grouping.max_length - prompt_lengths
    matched, mismatched = np.minimum(lengths, room[prompt_of]), np.minimum(lengths, room[mismatched_prompt_of])
    stored = np.maximum(matched, mismatched)
    arrays = {
        "prompt_offsets": _offsets(prompt_lengths),
        "completion_offsets": _offsets(stored),
        "prompt_of": prompt_of,
        "mismatched_prompt_of": mismatched_prompt_of,
        "matched_lengths": matched,
        "mismatched_lengths": mismatched,
        "desirable": rows.desirable,
        "kl_group_of": kl_group_of,
        "file_of": rows.file_of,
        "row_of": rows.row_of,
    }
    return SplitIndex(rows, arrays, prompt_rows, stored)


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def save_split(split: SplitIndex, segments: list[tuple[int, Path]], files: list[str], folder: Path) -> None:
    """Write the folder that TokenizedSplit.load maps; `files` are the places that the rows' file numbers stand for."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in split.arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    (folder / FILES).write_text(json.dumps(files), encoding="utf-8")
    examples = np.arange(len(split.stored_lengths))
    prompt_lengths = split.rows.prompt_lengths[split.prompt_rows]
    for part, chosen, lengths in (("prompt", split.prompt_rows, prompt_lengths), ("completion", examples, split.stored_lengths)):
        rows = split.rows.select(chosen)
        with open(folder / f"{part}_tokens.npy", "wb") as stream:
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.int32)), "fortran_order": False, "shape": (int(lengths.sum()),)}
            np.lib.format.write_array_header_1_0(stream, header)
            for tokens in _gather(part, rows, lengths, segments):
                stream.write(tokens.data)
    completion_tokens = np.load(folder / "completion_tokens.npy", mmap_mode="r", allow_pickle=False)
    np.save(folder / "pair_keys.npy", keys_of_pairs(split, completion_tokens), allow_pickle=False)


def keys_of_pairs(split: SplitIndex, completion_tokens: np.ndarray) -> np.ndarray:
    """Return the key of every pair, [2E, 2]. The rows have those of whole completions; only one that was cut for a pair is digested again."""
    halves = []
    for prompts, lengths in (("prompt_of", "matched_lengths"), ("mismatched_prompt_of", "mismatched_lengths")):
        prompt_keys = split.rows.prompt_keys[split.prompt_rows[split.arrays[prompts]]]
        completion_keys = split.rows.completion_keys.copy()
        for example in np.flatnonzero(split.arrays[lengths] < split.rows.completion_lengths).tolist():
            start = split.arrays["completion_offsets"][example]
            completion_keys[example] = ids_key(completion_tokens[start : start + split.arrays[lengths][example]])
        halves.append(pair_keys(prompt_keys, completion_keys))
    return np.concatenate(halves)


def _gather(part: str, rows: Rows, lengths: np.ndarray, segments: list[tuple[int, Path]]) -> Iterator[np.ndarray]:
    """Yield the first `lengths` tokens of each row's prompt or completion, in order; one segment is in memory at a time."""
    stretches = np.flatnonzero(np.diff(rows.segment_of, prepend=-1, append=-1))
    for start, end in itertools.pairwise(stretches):
        _, path = segments[rows.segment_of[start]]
        tokens, stored_lengths = load_arrays(path, (f"{part}_tokens", f"{part}_lengths")).values()
        begins = _offsets(stored_lengths)[rows.place_of[start:end]]
        ends = np.cumsum(lengths[start:end])
        yield tokens[np.repeat(begins - ends + lengths[start:end], lengths[start:end]) + np.arange(ends[-1])]
