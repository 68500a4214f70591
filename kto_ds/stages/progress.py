"""How far a run is, besides weights and optimizer. No ranks and no files in it; a checkpoint keeps it in its manifest."""

from typing import NamedTuple

from kto_ds.config import CheckpointConfig


class Best(NamedTuple):
    metric: str  # as checkpoint.metric_for_best_model
    is_greatest: bool  # or the smallest
    value: float
    step: int


class Progress(NamedTuple):
    """How far a run is, besides weights and optimizer; a checkpoint remembers it (in its manifest, as JSON)."""

    step: int = 0  # optimizer steps done, skipped ones included
    examples: int = 0  # examples consumed: the global sample position
    skipped: int = 0  # steps whose update was left out
    skipped_in_a_row: int = 0
    recent_losses: tuple[float, ...] = ()  # window of the spike guard, oldest first
    best: Best | None = None  # of checkpoint.metric_for_best_model

    def to_json(self) -> dict:
        best = self.best and self.best._asdict()
        return {**self._asdict(), "recent_losses": list(self.recent_losses), "best": best}

    @classmethod
    def from_json(cls, fields: dict) -> "Progress":
        """Return what to_json wrote; a field that a newer version has added gets its default."""
        best = fields.get("best") and Best(**fields["best"])
        return cls(**{**fields, "recent_losses": tuple(fields.get("recent_losses", ())), "best": best})


def with_evaluation(progress: Progress, checkpoint: CheckpointConfig, split: str, metrics: dict[str, float]) -> Progress:
    """Return the progress after an evaluation of `split` at its step: with a new best, where this is the metric asked for and it is better than ever."""
    wanted = checkpoint.metric_for_best_model
    if wanted not in [f"{split}/{name}" for name in metrics]:
        return progress
    found = Best(wanted, checkpoint.best_is_greatest, metrics[wanted.removeprefix(f"{split}/")], progress.step)
    best = progress.best
    if best is not None and best[:2] == found[:2]:  # else of another metric, before the config was changed
        if not (found.value > best.value if found.is_greatest else found.value < best.value):
            return progress
    return progress._replace(best=found)
