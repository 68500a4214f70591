"""How far a run is."""

from typing import NamedTuple


class Best(NamedTuple):
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
    wandb_run_id: str | None = None

    def to_json(self) -> dict:
        return {**self._asdict(), "recent_losses": list(self.recent_losses), "best": self.best and self.best._asdict()}

    @classmethod
    def from_json(cls, found: dict) -> "Progress":
        return cls(**{**found, "recent_losses": tuple(found["recent_losses"]), "best": found["best"] and Best(**found["best"])})
