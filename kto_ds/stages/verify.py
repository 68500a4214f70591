"""Every byte of the run's artefacts and checkpoints, read again and compared with what the manifests say. One process; no model, no tokenizer."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from kto_ds.artifacts import MANIFEST, READERS, damaged_files, read_manifest, state_of, unlisted_files
from kto_ds.config import RunConfig
from kto_ds.errors import UserError, excerpt
from kto_ds.report.screen import WorkBar
from kto_ds.runtime.retention import KIND, list_checkpoints
from kto_ds.runtime.unpickling import foreign_objects
from kto_ds.stages.inputs import PRECOMPUTE_FIRST, PREPARE_FIRST


class Artifact(NamedTuple):
    """A place of the run, and what is known of it before its files are read."""

    kind: str
    folder: Path
    remedy: str
    state: str
    manifest: dict  # as that of no files where it cannot be used
    problem: str  # of the manifest


def main(config: RunConfig) -> None:
    """Print one line for each artefact and checkpoint, or its problems. UserError at the end when there are any, or when there is nothing to look at."""
    places = [("dataset", config.dataset_dir, PREPARE_FIRST), ("reference", config.reference_dir, PRECOMPUTE_FIRST)]
    checkpoints = [(KIND, folder, "remove this folder; train goes on from an older one") for _, folder in list_checkpoints(config.output_dir / "checkpoints")]
    artifacts = [_open(*place) for place in [*places, *checkpoints]]
    if all(artifact.state == "missing" for artifact in artifacts):
        raise UserError("there is nothing to verify: neither an artefact nor a checkpoint", where=str(config.output_dir), remedy=PREPARE_FIRST)

    num_bytes = sum(_size(artifact.manifest) for artifact in artifacts)
    damaged, intact = [], {}
    with WorkBar("verify", total=num_bytes, unit="B") as bar:
        for artifact in artifacts:
            problems = _problems(artifact, bar.advance)
            if artifact.kind == "reference" and "dataset" in intact and artifact.state == "sealed" and not problems:
                problems = mismatches(intact["dataset"], artifact.manifest)
            if artifact.kind == KIND and not artifact.folder.exists():  # a running train keeps the newest ones only
                problems, artifact = [], artifact._replace(state="gone")
            if problems:
                damaged.append(artifact)
            elif artifact.state == "sealed":
                intact[artifact.kind] = artifact.manifest
            for line in _lines(artifact, problems):
                bar.tell(line)
    if damaged:
        count = f"{len(damaged)} of {len(artifacts)} artefacts and checkpoints {'are' if len(damaged) > 1 else 'is'} damaged:"
        lines = [f"{artifact.kind} {artifact.folder}: {artifact.remedy}" for artifact in damaged]
        raise UserError("\n  ".join([count, *lines]), where=str(config.output_dir))


def _open(kind: str, folder: Path, remedy: str) -> Artifact:
    manifest, problem, state = {"files": {}}, "", state_of(folder)
    if state == "sealed":
        try:
            manifest = read_manifest(folder, kind=kind, remedy=remedy)
        except UserError as error:
            problem = error.what
    elif os.path.lexists(folder) and not _is_empty(folder):
        state, problem = "sealed", f"there is no {MANIFEST} in it"
    return Artifact(kind, folder, remedy, state, manifest, problem)


def _is_empty(folder: Path) -> bool:
    try:
        return next(folder.iterdir(), None) is None
    except OSError:  # a file, or a folder that one may not look into
        return False


def _size(manifest: dict) -> int:
    return sum(entry["bytes"] for entry in manifest["files"].values())


def _problems(artifact: Artifact, on_bytes: Callable[[int], object]) -> list[str]:
    """Return what is wrong with an artefact, one line each; its bytes are counted as they are read."""
    if artifact.problem or artifact.state != "sealed":
        return [artifact.problem] if artifact.problem else []
    files = artifact.manifest["files"]
    problems = []
    with ThreadPoolExecutor(READERS) as readers:
        # Closing it takes back what no reader has begun with: after an interrupt nobody waits for that.
        with closing(readers.map(lambda name: damaged_files(artifact.folder, {"files": {name: files[name]}}), files)) as found:
            for name, problem in zip(files, found):
                problems += problem
                on_bytes(files[name]["bytes"])
    problems += unlisted_files(artifact.folder, artifact.manifest)
    if artifact.kind == KIND and not problems:
        problems = [line for name in files if name.endswith(".pt") for line in foreign_objects(artifact.folder / name)]
    return problems


def mismatches(dataset: dict, reference: dict) -> list[str]:
    """Return what says that a reference artefact was made for another dataset artefact: the fields of both identities that differ."""
    ours, theirs = (manifest.get("identity") for manifest in (dataset, reference))
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return ["its manifest or that of the dataset does not say what it was made from"]
    differing = [key for key in theirs if key in ours and theirs[key] != ours[key]]
    fields = [f"{key}: the dataset has {excerpt(ours[key])}, the reference {excerpt(theirs[key])}" for key in differing]
    return [f"made for another dataset: {'; '.join(fields)}"] if fields else []


def _lines(artifact: Artifact, problems: list[str]) -> list[str]:
    place = f"{artifact.kind:<10}  {artifact.folder}"
    if problems:
        return [f"{place}  {problem}" for problem in problems]
    if artifact.state == "unfinished":
        return [f"{place}  unfinished, {artifact.remedy} to go on"]
    if artifact.state == "sealed":
        count = len(artifact.manifest["files"])
        return [f"{place}  {count:,} file{'' if count == 1 else 's'}, {tqdm.format_sizeof(_size(artifact.manifest), 'B')}, intact"]
    return [f"{place}  {artifact.state}"]
