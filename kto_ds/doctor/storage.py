"""The run's folder: that it can be written to as a run writes, is the same for all ranks, and has the space."""

import os
import secrets
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kto_ds.doctor.findings import Finding, in_ranges, in_words, worst

PROBE_BYTES = 1 << 24
SLOW_MIB_PER_SECOND = 20


class Probe(NamedTuple):
    """What became of a file that was written, synced, renamed and read again; plain values, as ranks tell one another."""

    problem: str
    seconds: float


def probe_writing(folder: Path, rank: int) -> Probe:
    """Write below a folder as a checkpoint is written. Nothing of it stays."""
    name = f".doctor-probe-{rank}-{secrets.token_hex(4)}"
    staging, final = folder / f"{name}.tmp", folder / name
    content, began = os.urandom(1 << 16) * (PROBE_BYTES >> 16), time.monotonic()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(staging, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        staging.rename(final)
        seconds = time.monotonic() - began
        problem = "" if final.read_bytes() == content else "a file does not read as it was written"
    except OSError as error:
        return Probe(error.strerror or str(error), 0.0)
    finally:
        for path in (staging, final):
            try:
                path.unlink(missing_ok=True)
            except OSError:  # that it cannot be written to is told above
                pass
    return Probe(problem, seconds)


def check_writing(folder: Path, probes: Sequence[Probe], hosts: Sequence[str]) -> Finding:
    findings = []
    for rank, probe in enumerate(probes):
        if probe.problem:
            what = f"rank {rank} (host {hosts[rank]}) cannot write to {folder}: {probe.problem}"
            findings.append(Finding("output_dir", what, "wrong", "choose an output_dir that every rank may write to and that has space, or see to its rights, mount or quota"))
    rates = [PROBE_BYTES / (1 << 20) / probe.seconds for probe in probes if not probe.problem]
    if rates and min(rates) < SLOW_MIB_PER_SECOND:
        what = f"writing to {folder} is slow, {min(rates):.0f} MiB/s on the slowest rank"
        findings.append(Finding("output_dir", what, "warn", "choose a faster file system: ranks wait for every save"))
    return worst("output_dir", findings, otherwise=f"{folder}: written, synced, renamed and read on all ranks, {min(rates, default=0):.0f} MiB/s on the slowest")


def place_mark(folder: Path, token: str) -> None:
    """Leave what every rank must find if the folder is the same for all of them."""
    (folder / f".doctor-mark-{token}").write_text(token)


def remove_mark(folder: Path, token: str) -> None:
    (folder / f".doctor-mark-{token}").unlink(missing_ok=True)


def sees_mark(folder: Path, token: str) -> bool:
    """Whether rank 0's mark is here; a network file system may need a moment."""
    for _ in range(20):
        os.listdir(folder)  # which makes NFS ask its server
        if (folder / f".doctor-mark-{token}").is_file():
            return True
        time.sleep(0.1)
    return False


def check_sharing(folder: Path, seen: Sequence[bool], folders: Sequence[str], hosts: Sequence[str]) -> Finding:
    """`seen`: which ranks find rank 0's mark in their `folders`, the absolute paths."""
    blind = [rank for rank, sees in enumerate(seen) if not sees]
    if not blind:
        return Finding("one folder", "all ranks see one output_dir" if len(seen) > 1 else "one rank")
    rank = blind[0]
    what = f"{folders[rank]} of {in_ranges(blind)} (host {hosts[rank]}) is another folder than {folders[0]} of rank 0: a checkpoint would be in parts on several machines"
    return Finding("one folder", what, "wrong", "set output_dir to a folder on a file system that all hosts share, by its absolute path")


def is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, or the folder itself where it is not there yet; nothing is written."""
    existing = existing_place(folder)
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def existing_place(folder: Path) -> Path:
    """Return the folder, or what there is on the way to it."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def check_space(folder: Path, *, checkpoint_bytes: int, export_bytes: int, kept: int, present_bytes: int) -> Finding:
    """Compare the free space with what the run may keep: `kept` checkpoints, one more while it is written, and an export. `present_bytes`: of them that lie there."""
    existing = existing_place(folder)
    free, one, all_of_them = shutil.disk_usage(existing).free, checkpoint_bytes, (kept + 1) * checkpoint_bytes + export_bytes
    sizes = f"{in_words(free)} free; {in_words(one)} a checkpoint, {in_words(all_of_them)} for {kept} of them, one more while it is written, and an export"
    if free + present_bytes < one:
        return Finding("disk", sizes, "wrong", f"free space below {existing}, or choose another output_dir: not even one checkpoint fits")
    if free + present_bytes < all_of_them:
        return Finding("disk", sizes, "warn", "free space, lower checkpoint.save_total_limit, or save so seldom that there are fewer")
    return Finding("disk", sizes)
