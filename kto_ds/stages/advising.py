"""The advice on a run's settings, as plan, doctor and train print it."""

from kto_ds.advice import LabelCounts, advice
from kto_ds.artifacts import read_json
from kto_ds.config import RunConfig
from kto_ds.data.dataset import REPORT


def advice_lines(config: RunConfig) -> list[str]:
    """Return one line for each setting outside of what is recommended; labels count where the dataset artefact is there."""
    pieces = advice(
        config.loss, config.optim, global_batch_size=config.batch.global_batch_size, has_adapters=config.model.lora is not None, labels=_label_counts(config)
    )  # fmt: skip
    return [str(piece) for piece in pieces]


def _label_counts(config: RunConfig) -> LabelCounts | None:
    """Return the labels of the training split as the data report has them; None where there is none, as advice is no place to find fault with it."""
    try:
        train = read_json(config.dataset_dir / REPORT)["train"]
        return LabelCounts(int(train["desirable"]), int(train["undesirable"]))
    except (ValueError, KeyError, TypeError):
        return None
