"""The artefacts of a run, opened only when they belong to it. Shared by every stage that comes after prepare."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from kto_ds.artifacts import MANIFEST, read_manifest, require_intact, require_match
from kto_ds.config import RunConfig
from kto_ds.data.dataset import ARRAYS, FILES, TokenizedSplit
from kto_ds.data.keys import find
from kto_ds.data.reference import ReferenceRows, read_shards
from kto_ds.data.reference_work import needed_pairs
from kto_ds.errors import Unreadable, UserError, excerpt, reading
from kto_ds.runtime.collectives import on_main_rank
from kto_ds.stages.identity import dataset_identity, origin_differences, reference_identity, reference_origin, require_same_dataset, run_tokenizer

PREPARE_FIRST = "run kto-ds prepare --config RUN.yaml"
PRECOMPUTE_FIRST = "run kto-ds precompute-ref --config RUN.yaml"


def open_dataset(config: RunConfig) -> tuple[dict[str, TokenizedSplit], dict]:
    """Return the splits by name and the manifest of the run's dataset artefact. Rank 0 checks it, all ranks map it."""
    folder = config.dataset_dir

    def check() -> dict:
        manifest = read_dataset_manifest(folder)
        require_same_dataset(dataset_identity(config, run_tokenizer(config)), manifest["identity"], where=str(folder), remedy=PREPARE_FIRST)
        require_whole_dataset(folder, manifest)
        return manifest

    manifest = on_main_rank(check)
    with reading(folder):
        return {name: TokenizedSplit.load(folder / name) for name in manifest["splits"]}, manifest


def read_dataset_manifest(folder: Path) -> dict:
    """Return the manifest of a dataset artefact, with the entries that its readers rely on; UserError where there is none."""
    manifest = read_manifest(folder, kind="dataset", remedy=PREPARE_FIRST)
    _require_entries(manifest, {"identity": dict, "splits": list}, folder, PREPARE_FIRST)
    _require_entries(manifest["identity"], {"contents": dict, "tokenizer": str}, folder, PREPARE_FIRST)
    return manifest


def require_whole_dataset(folder: Path, manifest: dict) -> None:
    """Refuse a dataset artefact with a changed byte, or without what its splits are read from."""
    require_intact(folder, manifest, remedy=PREPARE_FIRST)
    _require_splits(folder, manifest)


def _require_entries(fields: dict, types: dict[str, type], folder: Path, remedy: str) -> None:
    """Refuse a manifest without these entries. Its digest says that it is as it was written, not that this program wrote it."""
    for name, expected in types.items():
        if type(fields.get(name)) is not expected:
            raise UserError(f"damaged manifest: {name}: expected a {expected.__name__}, found {excerpt(fields.get(name))}", where=str(folder / MANIFEST), remedy=remedy)


def _require_splits(folder: Path, manifest: dict) -> None:
    """Refuse a split with a file that the manifest does not list, and that no digest vouches for then, or that is not an array of such a split."""
    if "train" not in manifest["splits"]:
        raise UserError("damaged manifest: splits: there is no train", where=str(folder / MANIFEST), remedy=PREPARE_FIRST)
    for split in manifest["splits"]:
        names = [f"{split}/{array}.npy" for array in ARRAYS]
        if absent := [name for name in (*names, f"{split}/{FILES}") if name not in manifest["files"]]:
            raise UserError(f"damaged manifest: splits: {excerpt(absent[0])} is not among its files", where=str(folder / MANIFEST), remedy=PREPARE_FIRST)
        for name in names:
            try:
                with reading(folder / name):
                    array = np.load(folder / name, mmap_mode="r", allow_pickle=False)
                kind, dimensions = array.dtype.kind, array.ndim
            except Unreadable:
                raise
            except Exception as error:  # of many kinds: NumPy takes other formats for an archive, a pickle, or a header of its own
                raise UserError(f"{excerpt(name)} is not an array: {excerpt(str(error))}", where=str(folder), remedy=PREPARE_FIRST) from error
            if kind not in "biu" or dimensions != (2 if name.endswith("/pair_keys.npy") else 1):
                what = f"{excerpt(name)} is not an array of a dataset: {excerpt(str(array.dtype))} in {dimensions} dimensions"
                raise UserError(what, where=str(folder), remedy=PREPARE_FIRST)
        try:
            TokenizedSplit.load(folder / split)
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{excerpt(f'{split}/{FILES}')} is not a list of files: {excerpt(str(error))}", where=str(folder), remedy=PREPARE_FIRST) from error


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
    _require_entries(manifest, {"identity": dict, "per_token": bool}, folder, PRECOMPUTE_FIRST)
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
