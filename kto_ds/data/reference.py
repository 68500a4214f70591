"""Reference log-probs on disk, by pair key: shards of (key, logp, num_tokens), and the join that finds no row twice and misses none."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kto_ds.errors import UserError

KEY_DTYPE = "S32"  # hex digest of a pair
# A sum of log-probs is at most 0; one of an all but certain completion may round above it.
LARGEST_LOGP = 1e-3


class ReferenceTable(NamedTuple):
    keys: np.ndarray  # [N] S32, sorted
    logps: np.ndarray  # [N] float32


def write_shard(path: Path, *, keys: np.ndarray, logps: np.ndarray, num_tokens: np.ndarray) -> None:
    """Write scored pairs [n] as one Parquet file."""
    table = pa.table({"key": pa.array(keys.astype("U32")), "logp": pa.array(logps, pa.float32()), "num_tokens": pa.array(num_tokens, pa.int32())})
    pq.write_table(table, path)


def read_shards(folder: Path, names: list[str]) -> ReferenceTable:
    """Return all shards as one sorted table; UserError on a value that cannot be a sequence log-prob."""
    tables = [pq.read_table(folder / name, columns=["key", "logp"]) for name in sorted(names)]
    table = pa.concat_tables(tables)
    keys, logps = table["key"].to_numpy().astype(KEY_DTYPE), table["logp"].to_numpy()
    bad = ~np.isfinite(logps) | (logps > LARGEST_LOGP)
    if bad.any():
        raise UserError(f"{bad.sum()} of {len(logps)} log-probs are not finite or above 0, the first: {logps[bad][0]}", where=str(folder), remedy="run kto-ds precompute-ref again")
    order = np.argsort(keys, kind="stable")
    return ReferenceTable(keys[order], logps[order])


def look_up(table: ReferenceTable, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (logps [n] float32, found [n] bool); what is not found is NaN."""
    places = np.minimum(np.searchsorted(table.keys, keys), len(table.keys) - 1)
    found = table.keys[places] == keys
    return np.where(found, table.logps[places], np.float32(np.nan)), found
