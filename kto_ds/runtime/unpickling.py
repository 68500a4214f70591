"""DeepSpeed's .pt files, read without running what they say: tensors, plain values and the few classes below, nothing else.

DeepSpeed itself unpickles whatever it finds. A digest does not help: who writes a file can write its digest.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from kto_ds.errors import Unreadable, UserError, excerpt, reading
from kto_ds.runtime.watch import beat

# All that a state of ours holds besides tensors and plain values, for every ZeRO stage. None of them does anything when it is made.
ALLOWED_CLASSES = [ZeroStageEnum, LossScaler, fragment_address]
REMEDY = "do not use this checkpoint, and find out who wrote it"


@contextlib.contextmanager
def weights_only(*, mapped: bool = False) -> Iterator[None]:
    """Let no torch.load of the block, DeepSpeed's own included, make anything but tensors, plain values and ALLOWED_CLASSES. UserError names the file.

    `mapped` tensors are read from their file page by page as they are used.
    """
    load, forced = torch.load, {"weights_only": True, **({"mmap": True} if mapped else {})}

    def load_weights_only(file, map_location=None, **named):
        beat()  # files are many where the number of ranks changes
        try:
            return load(file, map_location=map_location or "cpu", **{**named, **forced})
        except OSError:
            raise
        except Exception as error:
            # The first of torch's many lines tells how to switch the check off; another one names what is not allowed.
            lines = str(error).splitlines() or [type(error).__name__]
            reason = next((line.strip() for line in lines if "GLOBAL" in line or "WeightsUnpickler" in line), lines[0])
            raise UserError(f"cannot be read as tensors and plain values: {excerpt(reason)}", where=str(file), remedy=REMEDY) from error

    torch.load = load_weights_only
    try:
        with torch.serialization.safe_globals(ALLOWED_CLASSES):
            yield
    finally:
        torch.load = load


def foreign_objects(path: Path) -> list[str]:
    """Return one line for everything that unpickling a .pt file would make or call, and that no checkpoint of ours holds. Runs nothing and reads no tensor."""
    try:
        with reading(path), torch.serialization.safe_globals(ALLOWED_CLASSES):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Unreadable:
        raise
    except Exception as error:  # whatever a file that is none leads to
        return [f"{excerpt(path.name)} cannot be read: {excerpt(str(error))}"]
    return [f"{excerpt(path.name)} would run {excerpt(name)}" for name in sorted(names)]
