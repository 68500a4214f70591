"""A checkpoint of N ranks for M ranks, by DeepSpeed's universal format: every parameter and its moments whole, in files of their own.

DeepSpeed's way back has two faults that Engine.load mends: all parameter groups get the hyper-parameters of the first, and under ZeRO-3 all
parameters share one Adam step counter, which then counts once for each of them.
"""

import contextlib
import io
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from kto_ds.errors import UserError
from kto_ds.runtime.collectives import barrier, on_main_rank
from kto_ds.runtime.engine import STATE
from kto_ds.runtime.unpickling import weights_only
from kto_ds.runtime.watch import beat

# Fragments of all ranks lie beside the merged parameters until these are complete.
SPACE_FACTOR = 2.4
LOOK_SECONDS = 2.0


@contextlib.contextmanager
def converted(folder: Path, *, state_bytes: int, ranks: tuple[int, int]) -> Iterator[Path]:
    """Yield a folder with the state of the checkpoint `folder` in universal form, made by rank 0 and gone after the block. All ranks call this.

    After an error in the block it stays, for `retention.sweep`: other ranks may be reading.
    """
    universal = folder.with_name(f".universal-{folder.name}")
    on_main_rank(lambda: _convert(folder, universal, state_bytes, ranks))
    yield universal
    barrier()  # all have read what is theirs
    on_main_rank(lambda: shutil.rmtree(universal, ignore_errors=True))


def _convert(folder: Path, universal: Path, state_bytes: int, ranks: tuple[int, int]) -> None:
    from deepspeed.checkpoint import ds_to_universal

    began, staging = time.monotonic(), folder.with_name(f".tmp-universal-{folder.name}")
    free, needed = shutil.disk_usage(folder.parent).free, int(SPACE_FACTOR * state_bytes)
    if free < needed:
        raise UserError(f"too little space to convert {folder.name} for other ranks: {needed:,} bytes needed, {free:,} free", where=str(folder.parent), remedy="free the space")
    for path in (staging, universal):
        shutil.rmtree(path, ignore_errors=True)
    options = SimpleNamespace(
        input_folder=str(folder / STATE), output_folder=str(staging / STATE), keep_temp_folder=False, strict=True, inject_missing_state=True,
        # One worker is this process: processes of their own would unpickle as they like.
        num_extract_workers=1, num_merge_workers=1,
    )  # fmt: skip
    try:
        # DeepSpeed narrates, with a progress bar for every stage.
        with _files_are_progress(staging), weights_only(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ds_to_universal.main(options)
        staging.rename(universal)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    change = f"of {ranks[0]} ranks for {ranks[1]}" if ranks[0] != ranks[1] else "for another ZeRO section"
    print(f"converted {folder.name} {change} in {time.monotonic() - began:.1f} s", flush=True)


@contextlib.contextmanager
def _files_are_progress(folder: Path) -> Iterator[None]:
    """Say that the work goes on whenever the files below a folder have become more or fewer: DeepSpeed, at work for hours, does not say so."""
    is_over = threading.Event()

    def look() -> None:
        seen = 0
        while not is_over.wait(LOOK_SECONDS):
            found = sum(len(names) for _, _, names in os.walk(folder))
            if found != seen:
                seen = found
                beat()

    looking = threading.Thread(target=look, name="files-are-progress", daemon=True)
    looking.start()
    try:
        yield
    finally:
        is_over.set()
        looking.join()
