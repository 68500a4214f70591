"""Reference log-probs on disk: shards of (key, log-prob, length), each committed by one rename, and the join that takes no row for another.

Legend: N rows, T tokens of all their completions. A shard is a safetensors file: nothing in it can run code or grow when it is read. Its
name ends with the digest of its bytes, so whoever meets it in an unfinished folder knows whether it is what was written; and it holds the
digest of the plan it is a part of, since a rank that outlived its run may still write there.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load, save

from kto_ds.artifacts import canonical_json, digest_of, file_digest, write_atomically
from kto_ds.data.keys import distinct
from kto_ds.errors import UserError, reading

# A sum of log-probs is below 0. One of an all but certain completion may round to 0 or above it, and is stored as the largest number below,
# so that a 0 on disk is never a value: it is a row that nobody scored.
LARGEST_LOGP = -np.finfo(np.float32).tiny
ROUNDING = 1e-3  # nats above 0 that are still rounding
REMEDY = "run kto-ds precompute-ref again"
KEPT = "kept"  # in place of a plan: rows that were taken over
NAME = re.compile(r"(kept|scored)-(?P<number>\d{6})\.((?P<plan>[0-9a-f]{32})\.)?(?P<digest>[0-9a-f]{32})\.safetensors")
MAX_SHARD_BYTES = 1 << 28
MAX_ROWS, MAX_TOKENS = 1 << 20, 1 << 24  # of a shard of rows that were taken over, so that it stays below MAX_SHARD_BYTES


class ReferenceRows(NamedTuple):
    keys: np.ndarray  # [N, 2] uint64, of pairs, see keys.py
    logps: np.ndarray  # [N] float32, of the whole completion, in nats
    num_tokens: np.ndarray  # [N] int32, tokens of the completion
    token_logps: np.ndarray | None = None  # [T] float32, those of each row's tokens one after the other; None unless reference.per_token

    def select(self, chosen: np.ndarray) -> "ReferenceRows":
        """Return the rows at some places, or where a mask [N] is true."""
        token_logps = self.token_logps
        if token_logps is not None:
            places = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
            ends = np.cumsum(self.num_tokens)
            parts = [token_logps[ends[place] - self.num_tokens[place] : ends[place]] for place in places.tolist()]
            token_logps = np.concatenate([token_logps[:0], *parts])
        return ReferenceRows(self.keys[chosen], self.logps[chosen], self.num_tokens[chosen], token_logps)

    def without_tokens(self) -> "ReferenceRows":
        return self._replace(token_logps=None)


def no_rows(per_token: bool) -> ReferenceRows:
    return ReferenceRows(np.empty((0, 2), np.uint64), np.empty(0, np.float32), np.empty(0, np.int32), np.empty(0, np.float32) if per_token else None)


def join_rows(parts: Iterable[ReferenceRows], per_token: bool) -> ReferenceRows:
    """Return the rows of all parts; their tokens are left out unless `per_token`, in which case all parts must have them."""
    parts = [no_rows(per_token), *parts]
    token_logps = np.concatenate([part.token_logps for part in parts]) if per_token else None
    return ReferenceRows(*(np.concatenate([part[column] for part in parts]) for column in range(3)), token_logps)


def split_rows(rows: ReferenceRows) -> Iterator[ReferenceRows]:
    """Yield the rows in parts that fit a shard each."""
    tokens = np.cumsum(rows.num_tokens, dtype=np.int64)
    start = 0
    while start < len(rows.keys):
        before = tokens[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(tokens, before + MAX_TOKENS, side="right")))
        end = min(end, start + MAX_ROWS, len(rows.keys))
        yield rows.select(np.arange(start, end))
        start = end


def plan_of(state: object) -> str:
    """Return the plan that belongs to the state (a JSON value) of an unfinished folder: equal states cut equal work into equal shards."""
    return digest_of(canonical_json(state))


def write_shard(folder: Path, plan: str, number: int, rows: ReferenceRows) -> Path:
    """Commit rows as one shard: a reader finds the whole of it on disk, or nothing. `plan` is a digest, or KEPT."""
    content = save({name: np.ascontiguousarray(value) for name, value in rows._asdict().items() if value is not None})
    prefix = f"kept-{number:06d}" if plan == KEPT else f"scored-{number:06d}.{plan}"
    path = folder / f"{prefix}.{xxhash.xxh3_128(content).hexdigest()}.safetensors"
    write_atomically(path, content)
    return path


def committed_shards(folder: Path, plan: str) -> dict[int, Path]:
    """Return {number: path} of the shards of a plan, or of those that were KEPT, in an unfinished folder, whose bytes are what was written."""
    shards = {}
    with reading(folder):
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
    for path in paths:
        name = NAME.fullmatch(path.name)
        with reading(path):
            if name and plan == (name["plan"] or KEPT) and not path.is_symlink() and path.is_file() and path.stat().st_size <= MAX_SHARD_BYTES:
                if file_digest(path) == name["digest"]:
                    shards[int(name["number"])] = path
    return shards


def read_shard(path: Path) -> ReferenceRows:
    """Return the rows of a shard; UserError unless it is one, and every log-prob in it can be one."""
    with reading(path):
        if path.stat().st_size > MAX_SHARD_BYTES:
            raise _unusable(path, f"it has {path.stat().st_size:,} bytes, no shard has more than {MAX_SHARD_BYTES:,}")
        content = path.read_bytes()
    try:
        arrays = load(content)
        rows = ReferenceRows(arrays.pop("keys"), arrays.pop("logps"), arrays.pop("num_tokens"), arrays.pop("token_logps", None))
    except (SafetensorError, KeyError, ValueError) as error:
        raise _unusable(path, f"it is not a shard of reference log-probs ({error})") from error
    size = rows.logps.size
    shapes = [(rows.keys, (size, 2), np.uint64), (rows.logps, (size,), np.float32), (rows.num_tokens, (size,), np.int32)]
    if rows.token_logps is not None:
        shapes.append((rows.token_logps, (int(rows.num_tokens.sum(dtype=np.int64)),), np.float32))
    if arrays or any(array.shape != shape or array.dtype != dtype for array, shape, dtype in shapes) or (rows.num_tokens < 1).any():
        raise _unusable(path, "its columns do not fit together")
    bad = ~((rows.logps <= LARGEST_LOGP) & np.isfinite(rows.logps))
    if bad.any():
        what = f"{bad.sum()} of {size} log-probs are not finite, 0 or above 0 (0 is a row that was never scored), the first: {rows.logps[bad][0]}"
        raise _unusable(path, what)
    if rows.token_logps is not None and not np.isfinite(rows.token_logps).all():
        raise _unusable(path, "log-probs of single tokens are not finite")
    return rows


def read_shards(paths: Iterable[Path], per_token: bool = False) -> ReferenceRows:
    """Return the rows of some shards; UserError where a key is there twice or `per_token` asks for what a shard does not have."""
    parts = []
    for path in paths:
        rows = read_shard(path)
        if per_token and rows.token_logps is None:
            raise _unusable(path, "it has no log-probs of single tokens", "set reference.per_token: true and run kto-ds precompute-ref again")
        parts.append(rows if per_token else rows.without_tokens())
    rows = join_rows(parts, per_token)
    _, first = distinct(rows.keys)
    if len(first) != len(rows.keys):
        raise UserError(f"{len(rows.keys) - len(first)} reference log-probs are there twice", where=str(path.parent), remedy=REMEDY)
    return rows



def _unusable(path: Path, what: str, remedy: str = REMEDY) -> UserError:
    return UserError(what, where=str(path), remedy=remedy)


def is_part(name: str) -> bool:
    """Tell whether an entry of this name belongs to a reference artefact, besides its manifest."""
    return name.startswith(("kept-", "scored-")) and name.endswith(".safetensors")
