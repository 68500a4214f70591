"""The numbers of a run as TensorBoard reads them; metrics.jsonl is the record, this a view that may fail."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from kto_ds.errors import UserError
from kto_ds.report.metric_names import panel_names
from kto_ds.report.metrics_file import Record

FOLDER = "tensorboard"


def require_tensorboard() -> None:
    if find_spec("tensorboard") is None:
        remedy = "pip install 'kto-ds[tensorboard]', or leave this key out: metrics.jsonl and kto-ds report are there without it"
        raise UserError("the package tensorboard is not installed", where="report.tensorboard", remedy=remedy)


class TensorBoard:
    """Scalars on the axis of the optimizer steps. After a resume, TensorBoard shows no step twice."""

    def __init__(self, folder: Path, *, done_steps: int, known: list[Record], tell: Callable[[str], None]):
        """`known`: the records of the steps that are done, for a folder that has none of them."""
        self._tell, self._writer = tell, None
        has_events = any(folder.glob("events.*"))
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(folder, purge_step=done_steps + 1)
        except (OSError, ImportError) as error:
            self._give_up(error)
        for record in [] if has_events else known:
            self.log(record)

    def log(self, record: Record) -> None:
        if self._writer is None:
            return
        try:
            for name, value in panel_names(record).items():
                self._writer.add_scalar(name, value, record["step"])
            self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        if self._writer is None:
            return
        try:
            self._writer.close()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._writer = None
        self._tell(f"warning: TensorBoard is off from here on; metrics.jsonl goes on: {error}")
