"""The numbers of a run as TensorBoard reads them; metrics.jsonl is the record, this a view that may fail."""

from collections.abc import Callable, Sequence
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
    """Scalars on the axis of the optimizer steps. Every start writes them all anew, so that TensorBoard shows no step twice, and none is missing."""

    def __init__(self, folder: Path, *, known: Sequence[Record], tell: Callable[[str], None]):
        """`known`: the records of the steps that are done."""
        self._tell, self._writer = tell, None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(folder, purge_step=0)  # from here on TensorBoard hides what earlier starts have written
        except (OSError, ImportError) as error:
            self._give_up(error)
        self._write(known)

    def log(self, record: Record) -> None:
        self._write([record])

    def _write(self, records: Sequence[Record]) -> None:
        if self._writer is None:
            return
        try:
            for record in records:
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
