"""What a run was made from and what came of it, as wandb artifacts: a place and a digest each. No byte of data or weights is uploaded."""

import json
from pathlib import Path
from typing import NamedTuple

import wandb

from kto_ds.artifacts import MANIFEST, digest_of
from kto_ds.redaction import redact

SCHEME = "kto-ds"  # of an address that wandb only notes
NAME_DIGITS = 12  # of a digest


class Piece(NamedTuple):
    kind: str  # dataset, reference, checkpoint or export
    folder: Path
    digest: str
    facts: dict[str, str | int]


def sealed_piece(kind: str, folder: Path) -> Piece | None:
    """Return an artefact or checkpoint by its manifest; None where there is no whole one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        facts = {"files": len(manifest["files"]), "bytes": sum(entry["bytes"] for entry in manifest["files"].values())}
        return Piece(kind, folder, manifest["digest"], {**facts, **({"step": manifest["step"]} if "step" in manifest else {})})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def export_piece(folder: Path) -> Piece | None:
    """Return an export, which has no manifest: its digest is of its files' names and sizes."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*")) if path.is_file()}
    return Piece("export", folder, digest_of(json.dumps(sizes)), {"files": len(sizes), "bytes": sum(sizes.values())}) if sizes else None


def newest_checkpoint(checkpoints: Path) -> Piece | None:
    pieces = [piece for folder in checkpoints.glob("step-*") if ".corrupt." not in folder.name and (piece := sealed_piece("checkpoint", folder))]
    return max(pieces, key=lambda piece: piece.facts.get("step", 0), default=None)


def use(run: wandb.Run, piece: Piece) -> None:
    """Note that the run was made from this."""
    artifact = _artifact(piece, f"{piece.kind}-{piece.digest[:NAME_DIGITS]}")  # other runs that use it too share the name
    if run.offline:
        # use_artifact wants an answer from the server; this is the record it makes.
        run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
    else:
        run.use_artifact(artifact)


def log(run: wandb.Run, piece: Piece) -> None:
    """Note that this came of the run."""
    step = [f"step-{piece.facts['step']}"] if "step" in piece.facts else []
    run.log_artifact(_artifact(piece, f"{piece.kind}-{run.id}"), aliases=["latest", *step])


def _artifact(piece: Piece, name: str) -> wandb.Artifact:
    folder = redact(str(piece.folder.resolve()))
    artifact = wandb.Artifact(name, type="model" if piece.kind in ("checkpoint", "export") else piece.kind, metadata={"folder": folder, "digest": piece.digest, **piece.facts})
    # Of a file:// address wandb would read every byte. The name makes another content another version.
    artifact.add_reference(f"{SCHEME}://{folder}", name=piece.digest)
    return artifact
