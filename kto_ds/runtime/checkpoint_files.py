"""What DeepSpeed writes a checkpoint with, so that a full disk on one rank leaves no other rank waiting in a barrier of DeepSpeed's own."""

from pathlib import Path

from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.zero.config import ZeroStageEnum


class CheckpointFiles(TorchCheckpointEngine):
    """Writes like DeepSpeed's engine, but an error is remembered instead of raised."""

    def __init__(self):
        super().__init__()
        self.zipfile_serialization = True
        self.begin()

    def begin(self) -> None:
        """Forget the save before this one."""
        self.written: list[Path] = []  # by this rank
        self.problem = ""  # the first one

    def makedirs(self, path, exist_ok=False) -> None:
        try:
            super().makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self._remember(path, error)

    def save(self, state_dict, path: str) -> None:
        if self.problem:
            return
        try:
            super().save(_plain(state_dict), path)
            self.written.append(Path(path))
        except (OSError, RuntimeError) as error:
            self._remember(path, error)

    def _remember(self, path: str, error: Exception) -> None:
        self.problem = self.problem or f"{path}: {in_words(error)}"


def _plain(tree: object) -> object:
    """Return nested dicts and lists with ZeRO's stage as the number it is: Python before 3.11.4 pickles it as a call, which no safe reader makes."""
    if type(tree) is dict:
        return {key: _plain(value) for key, value in tree.items()}
    if type(tree) is list:
        return [_plain(value) for value in tree]
    return int(tree) if isinstance(tree, ZeroStageEnum) else tree


def in_words(error: Exception) -> str:
    """Return what went wrong while writing, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
    # torch.save says nothing of a full disk, only that fewer bytes have arrived than it wrote.
    return f"the file could not be written to its end ({first_line})" if "inline_container" in first_line else first_line
