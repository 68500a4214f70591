"""The artefacts of a run, opened only when they belong to it. Shared by every stage that comes after prepare."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from kto_ds.artifacts import read_manifest, require_intact, require_match
from kto_ds.config import RunConfig
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.reference import ReferenceTable, look_up, read_shards
from kto_ds.errors import UserError
from kto_ds.runtime.collectives import on_main_rank
from kto_ds.stages.identity import dataset_identity, needed_pairs, pair_keys, reference_identity, require_same_dataset, run_tokenizer

PREPARE_FIRST = "run kto-ds prepare --config RUN.yaml"
PRECOMPUTE_FIRST = "run kto-ds precompute-ref --config RUN.yaml"


def open_dataset(config: RunConfig) -> tuple[dict[str, TokenizedSplit], dict]:
    """Return the splits by name and the manifest of the run's dataset artefact. Rank 0 checks it, all ranks map it."""
    folder = config.dataset_dir

    def check() -> dict:
        manifest = read_manifest(folder, kind="dataset", remedy=PREPARE_FIRST)
        require_same_dataset(dataset_identity(config, run_tokenizer(config)), manifest["identity"], where=str(folder), remedy=PREPARE_FIRST)
        require_intact(folder, manifest, remedy=PREPARE_FIRST)
        return manifest

    manifest = on_main_rank(check)
    return {name: TokenizedSplit.load(folder / name) for name in manifest["splits"]}, manifest


def evaluation_splits(splits: Iterable[str]) -> list[str]:
    """Return the names of the splits that are evaluated: all but the one that is trained on."""
    return [name for name in splits if name != "train"]


def open_reference(config: RunConfig, splits: dict[str, TokenizedSplit], dataset_manifest: dict) -> tuple[dict[str, np.ndarray], dict]:
    """Return each split's reference log-probs by pair id ([2E] float32, NaN where the loss needs none) and the artefact's manifest."""

    def read() -> tuple[dict[str, np.ndarray], dict]:
        # First of all: that there is none should not be said only after minutes of reading weights.
        read_manifest(config.reference_dir, kind="reference", remedy=PRECOMPUTE_FIRST)
        return read_reference(config, splits, reference_identity(config, dataset_manifest))

    return on_main_rank(read)


def read_reference(config: RunConfig, splits: dict[str, TokenizedSplit], identity: dict) -> tuple[dict[str, np.ndarray], dict]:
    """The same on one rank: UserError unless the artefact is whole, has this `identity` and every pair of the splits."""
    folder = config.reference_dir
    manifest = read_manifest(folder, kind="reference", remedy=PRECOMPUTE_FIRST)
    require_match(identity, manifest["identity"], where=str(folder), remedy=PRECOMPUTE_FIRST)
    require_intact(folder, manifest, remedy=PRECOMPUTE_FIRST)
    table = read_shards(folder, list(manifest["files"]))
    return {name: _join(table, split, config.loss.loss_type, folder) for name, split in splits.items()}, manifest


def _join(table: ReferenceTable, split: TokenizedSplit, loss_type: str, folder: Path) -> np.ndarray:
    pairs = needed_pairs(split, loss_type)
    logps, found = look_up(table, pair_keys(split, pairs))
    if not found.all():
        example = int(pairs[~found][0] % split.num_examples)
        raise UserError(f"{(~found).sum()} of {len(pairs)} pairs have no reference log-prob, the first: {split.row_name(example)}", where=str(folder), remedy=PRECOMPUTE_FIRST)
    by_pair = np.full(2 * split.num_examples, np.nan, dtype=np.float32)
    by_pair[pairs] = logps
    return by_pair
