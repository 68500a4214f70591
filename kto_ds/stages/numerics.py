"""What becomes of a step whose values cannot be used: the run stops, or goes on without that step's update.

All ranks see the same values, so all come to the same decision, before the weights are touched.
"""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from kto_ds.config import TrainConfig
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.errors import NumericsError
from kto_ds.redaction import redact
from kto_ds.report.distributions import distribution_metrics
from kto_ds.report.metrics import StepResult, kto_metrics
from kto_ds.stages.progress import Progress

NUMERICS_FILE = "numerics.jsonl"
SPIKE_WINDOW = 128  # applied steps that the spike guard looks back on
SPIKE_LEAST = 16  # of them, before it says anything


class Problem(NamedTuple):
    """Why a step cannot be used, found before its update; the same on all ranks."""

    what: Literal["log-prob", "loss", "gradient", "spike"]
    message: str
    bad: tuple[int, ...] = ()  # example ids at fault, where that is known


class StepOutcome(NamedTuple):
    """What one step came to, the same on all ranks: a result, or the problem for which its update was left out."""

    loss: float  # mean over the step's examples; NaN where that is the problem
    grad_norm: float  # before clipping; NaN with a problem
    result: StepResult | None
    problem: Problem | None
    is_stopping: bool  # whether any rank wants the run to stop after this step


def loss_limit(recent: Sequence[float], sigmas: float | None) -> float:
    """Return the loss above which a step is a spike, from the losses of the last applied steps; infinity while nothing is one."""
    if sigmas is None or len(recent) < SPIKE_LEAST:
        return math.inf
    return float(np.mean(recent) + sigmas * np.std(recent))


def loss_problem(loss: float, limit: float) -> Problem | None:
    if not math.isfinite(loss):
        return Problem("loss", f"the loss is {loss}, though every log-prob is finite")
    if loss > limit:
        return Problem("spike", f"the loss is {loss:.6g}, above {limit:.6g}, what train.loss_spike_sigmas allows after the steps before")
    return None


def after_step(progress: Progress, outcome: StepOutcome, *, step: int, num_examples: int) -> Progress:
    """Return the progress behind a step of so many examples."""
    progress = progress._replace(step=step, examples=progress.examples + num_examples)
    if outcome.problem is not None:
        return progress._replace(skipped=progress.skipped + 1, skipped_in_a_row=progress.skipped_in_a_row + 1)
    return progress._replace(skipped_in_a_row=0, recent_losses=(*progress.recent_losses, outcome.loss)[-SPIKE_WINDOW:])


def reason_to_stop(problem: Problem, progress: Progress, config: TrainConfig) -> str:
    """Return why the run ends at this step, or an empty text where it goes on without the update. `progress` is the one behind the step."""
    if config.on_nonfinite == "stop":
        return f"step {progress.step}: {problem.message}"
    if progress.skipped_in_a_row > config.max_skipped_steps:
        return f"step {progress.step}: {problem.message}; {progress.skipped_in_a_row} steps in a row, train.max_skipped_steps allows {config.max_skipped_steps}"
    return ""


def settle(problem: Problem, progress: Progress, config: TrainConfig, *, examples: np.ndarray, split: TokenizedSplit, record_in: Path | None) -> None:
    """Note a step of `examples` [E] that cannot be used, and raise NumericsError on all ranks if the run is to stop; `record_in` is None but on rank 0."""
    stop = reason_to_stop(problem, progress, config)
    if record_in is not None:
        entry = {
            **{"time": round(time.time(), 1), "step": progress.step, "what": problem.what, "action": "stop" if stop else "skip", "message": problem.message},
            **{"examples": examples.tolist(), "rows": _names(split, examples), "bad_rows": _names(split, problem.bad)},
        }
        with (record_in / NUMERICS_FILE).open("a", encoding="utf-8") as file:
            file.write(redact(json.dumps(entry, allow_nan=False)) + "\n")
        if not stop:
            print(f"step {progress.step}: its update is left out: {problem.message}; all its rows are in {record_in / NUMERICS_FILE}", flush=True)
    if stop:
        raise NumericsError(f"{stop}; all rows of the step are in {NUMERICS_FILE}, the weights are those of step {progress.step - progress.skipped_in_a_row}")


def _names(split: TokenizedSplit, examples: Sequence[int] | np.ndarray) -> list[str]:
    return [split.row_name(int(example)) for example in examples]


def window_metrics(window: Sequence[StepOutcome]) -> dict[str, float | list]:
    """Return the means and distributions over the steps of a log window whose update was applied, and how many were left out, if any."""
    applied = [outcome for outcome in window if outcome.problem is None]
    metrics: dict[str, float | list] = {}
    if results := [outcome.result for outcome in applied]:
        metrics = {**kto_metrics(results), "grad_norm": applied[-1].grad_norm, **distribution_metrics(results)}
    if len(applied) < len(window):
        metrics["skipped_steps"] = len(window) - len(applied)
    return metrics
