"""Names of token sequences by content: digests of their ids, and the join of two lists of them. Legend: N, M keys; D distinct keys.

A key is an xxh3-128 digest as two uint64. That of a pair is made of the digests of its prompt and of its completion, so it changes with
any token, and with nothing else: not with the row's place, its split, or the batch it lies in.
"""

import numpy as np
import xxhash


def ids_key(ids: np.ndarray) -> np.ndarray:
    """Return the key of some token ids, [2] uint64."""
    return np.frombuffer(xxhash.xxh3_128_digest(np.ascontiguousarray(ids, dtype=np.int32).tobytes()), dtype=np.uint64)


def pair_keys(prompt_keys: np.ndarray, completion_keys: np.ndarray) -> np.ndarray:
    """Return the keys of pairs, [N, 2], from those of their prompts [N, 2] and completions [N, 2]."""
    both = np.ascontiguousarray(np.concatenate([prompt_keys, completion_keys], axis=1)).tobytes()
    size = 4 * np.dtype(np.uint64).itemsize
    digests = b"".join(xxhash.xxh3_128_digest(both[start : start + size]) for start in range(0, len(both), size))
    return np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2)


def distinct(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (index of each key among the distinct ones [N], place of the first of each distinct key [D]), in order of appearance."""
    order = np.lexsort((np.arange(len(keys)), keys[:, 1], keys[:, 0]))
    ordered = keys[order]
    starts = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(axis=1)])[: len(keys)]
    first = order[starts]  # lexsort's last resort is the row number, so that is the first row of each key
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    of = np.empty(len(keys), dtype=np.int64)
    of[order] = rank[np.cumsum(starts) - 1]
    return of, np.sort(first)


def find(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the place in `keys` [N, 2] of each of `wanted` [M, 2], the first one where it is there twice, -1 where it is not: [M] int64."""
    of, first = distinct(np.concatenate([keys, wanted]))
    places = first[of[len(keys) :]]
    return np.where(places < len(keys), places, -1)
