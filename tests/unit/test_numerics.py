"""What becomes of a step that cannot be used: the spike guard and the policy, as arithmetic."""

import json
import math

import numpy as np
import pytest

from kto_ds.config import TrainConfig
from kto_ds.report.metrics import StepResult
from kto_ds.stages.numerics import SPIKE_LEAST, SPIKE_WINDOW, Problem, StepOutcome, after_step, loss_limit, loss_problem, reason_to_stop, window_metrics
from kto_ds.stages.progress import Progress


def applied(loss: float) -> StepOutcome:
    arrays = dict(losses=np.array([loss]), rewards=np.zeros(1), logps=np.zeros(1), desirable=np.array([True]), logratios=np.zeros(1), lengths=np.ones(1))
    result = StepResult(**arrays, kl=0.0, kl_raw=0.0, kl_stderr=math.nan)
    return StepOutcome(loss, 1.0, result, None, is_stopping=False)


def left_out() -> StepOutcome:
    return StepOutcome(math.nan, math.nan, None, Problem("loss", "the loss is nan"), is_stopping=False)


def after(outcomes: list[StepOutcome], progress: Progress = Progress()) -> Progress:
    for outcome in outcomes:
        progress = after_step(progress, outcome, step=progress.step + 1, num_examples=8)
    return progress


def test_without_sigmas_or_with_too_few_losses_nothing_is_a_spike():
    assert loss_limit([0.5] * 200, None) == math.inf
    assert loss_limit([0.5] * (SPIKE_LEAST - 1), 3.0) == math.inf
    assert loss_limit([0.5] * SPIKE_LEAST, 3.0) == pytest.approx(0.5)


def test_the_limit_is_so_many_deviations_above_the_mean():
    losses = [0.4, 0.6] * 10
    assert loss_limit(losses, 2.0) == pytest.approx(0.5 + 2 * 0.1)
    assert loss_problem(0.69, loss_limit(losses, 2.0)) is None
    assert loss_problem(0.71, loss_limit(losses, 2.0)).what == "spike"


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_a_problem_whatever_the_limit(loss):
    assert loss_problem(loss, math.inf).what == "loss"


def test_the_window_holds_applied_steps_only_and_the_newest():
    progress = after([applied(number) for number in range(200)] + [left_out()])
    assert progress.recent_losses == tuple(range(200 - SPIKE_WINDOW, 200))
    assert (progress.step, progress.examples, progress.skipped, progress.skipped_in_a_row) == (201, 1608, 1, 1)


def test_a_resumed_run_has_the_same_limit():
    """The window goes through the JSON of a checkpoint without a change of any bit."""
    progress = after([applied(math.sin(number) / 3 + 0.7) for number in range(40)])
    again = Progress.from_json(json.loads(json.dumps(progress.to_json())))
    assert again == progress and loss_limit(again.recent_losses, 4.0) == loss_limit(progress.recent_losses, 4.0)


def test_skips_are_counted_in_a_row():
    config = TrainConfig(on_nonfinite="skip", max_skipped_steps=2)
    problem = left_out().problem
    progress = after([left_out(), left_out(), applied(0.5), left_out(), left_out()])
    assert (progress.skipped, progress.skipped_in_a_row) == (4, 2) and reason_to_stop(problem, progress, config) == ""
    assert "3 steps in a row, train.max_skipped_steps allows 2" in reason_to_stop(problem, after([left_out()], progress), config)
    assert reason_to_stop(problem, after([left_out()]), TrainConfig()) == "step 1: the loss is nan"


def test_means_are_over_applied_steps_and_never_nan():
    metrics = window_metrics([applied(0.25), left_out(), applied(0.75)])
    assert metrics["loss"] == 0.5 and metrics["skipped_steps"] == 1 and all(math.isfinite(value) for value in metrics.values() if not isinstance(value, list))
    assert window_metrics([left_out(), left_out()]) == {"skipped_steps": 2}
    assert "skipped_steps" not in window_metrics([applied(0.5)])
