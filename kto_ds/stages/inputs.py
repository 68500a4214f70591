"""The artefacts of a run, opened only when they belong to it. Shared by every stage that comes after prepare."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from kto_ds.artifacts import read_manifest, require_intact, require_match
from kto_ds.config import RunConfig
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.keys import find
from kto_ds.data.reference import ReferenceRows, read_shards
from kto_ds.data.reference_work import needed_pairs
from kto_ds.errors import UserError
from kto_ds.runtime.collectives import on_main_rank
from kto_ds.stages.identity import dataset_identity, origin_differences, reference_identity, reference_origin, require_same_dataset, run_tokenizer

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
        return read_reference(config, splits, reference_identity(config, dataset_manifest), reference_origin(config, dataset_manifest))

    return on_main_rank(read)


def read_reference(config: RunConfig, splits: dict[str, TokenizedSplit], identity: dict, origin: dict) -> tuple[dict[str, np.ndarray], dict]:
    """The same on one rank: UserError unless the artefact is whole, has this `identity` and every pair of the splits."""
    folder = config.reference_dir
    manifest = read_manifest(folder, kind="reference", remedy=PRECOMPUTE_FIRST)
    differences = origin_differences(origin, manifest.get("origin"))
    is_other_model = manifest["identity"].get("reference model") != identity["reference model"]
    named = [line for line in differences if is_other_model and line.startswith("model.")]
    require_match(identity, manifest["identity"], where=str(folder), remedy=PRECOMPUTE_FIRST, besides=named)
    require_intact(folder, manifest, remedy=PRECOMPUTE_FIRST)
    rows = read_shards(folder / name for name in manifest["files"])
    return {name: _join(rows, split, config.loss.loss_type, folder, differences) for name, split in splits.items()}, manifest


def _join(rows: ReferenceRows, split: TokenizedSplit, loss_type: str, folder: Path, differences: list[str]) -> np.ndarray:
    pairs = needed_pairs(split, loss_type)
    places = find(rows.keys, split.pair_keys[: len(pairs)])
    absent = places < 0
    if absent.any():
        example = int(pairs[absent][0] % split.num_examples)
        what = f"{absent.sum():,} of {len(pairs):,} pairs have no reference log-prob, the first: {split.row_name(example)}"
        raise UserError("\n  ".join([what, *differences]), where=str(folder), remedy=PRECOMPUTE_FIRST)
    wrong = rows.num_tokens[places] != split.pair_lengths[pairs]
    if wrong.any():
        example = int(pairs[wrong][0] % split.num_examples)
        raise UserError(f"a reference log-prob is of another length than its completion: {split.row_name(example)}", where=str(folder), remedy=PRECOMPUTE_FIRST)
    by_pair = np.full(2 * split.num_examples, np.nan, dtype=np.float32)
    by_pair[pairs] = rows.logps[places]
    return by_pair
