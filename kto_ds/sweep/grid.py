"""Which trials a sweep has: every combination of the values of some config keys, or a seeded choice of them. Keys that would need another dataset or reference are refused."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from kto_ds.errors import UserError, excerpt

MAX_TRIALS = 1000
SAME_REFERENCE = "all trials share one dataset and one reference artefact"
# Keys, or sections with a dot at their end, that trials cannot differ in -> why.
REFUSED = {
    "data.": f"{SAME_REFERENCE}, which hold other tokens and pairs then",
    "reference.": f"{SAME_REFERENCE}, which would be another one",
    "seed": f"{SAME_REFERENCE}: another seed makes other mismatched pairs, which the reference has not scored",
    "model.path": f"{SAME_REFERENCE}, which is of one model",
    "model.revision": f"{SAME_REFERENCE}, which is of one model",
    "model.dtype": f"{SAME_REFERENCE}, which is scored in one dtype",
    "model.load_in_4bit": f"{SAME_REFERENCE}, which is of the 4-bit model or of the whole one",
    "model.trust_remote_code": "it changes nothing that is learned",
    "output_dir": "every trial has a folder of its own already",
    "checkpoint.resume": "a trial goes on where it was stopped, or the sweep would begin anew each time",
    "checkpoint.metric_for_best_model": "trials are compared by one metric",
    "checkpoint.greater_is_better": "trials are compared by one metric",
    "report.wandb.name": "the name of a trial is that of its folder",
}


class Trial(NamedTuple):
    name: str  # of its folder
    settings: dict[str, object]  # by dotted key


def all_trials(grid: Mapping[str, Sequence[object]]) -> list[Trial]:
    """Return every combination of values, the last key varying fastest. UserError for a key that cannot be swept and for one value given twice."""
    if not grid:
        raise UserError("no key has several values", where="sweep", remedy="give some, such as --loss.beta 0.05,0.1,0.3, or a file with --values")
    for key, values in grid.items():
        # A section as a whole holds its refused keys too.
        if why := next((why for refused, why in REFUSED.items() if key == refused or refused.endswith(".") and key.startswith(refused) or refused.startswith(f"{key}.")), None):
            raise UserError(f"it cannot be swept: {why}", where=key, remedy="give it one value, and sweep another time for another one")
        texts = [as_text(value) for value in values]
        if twice := next((text for text in texts if texts.count(text) > 1), None):
            raise UserError(f"{excerpt(twice)} is listed twice", where=key, remedy="list every value once")
    count = int(np.prod([len(values) for values in grid.values()]))
    if count > MAX_TRIALS:
        raise UserError(f"{count:,} trials are more than {MAX_TRIALS:,}", where="sweep", remedy="give fewer values")
    leaves = [key.rpartition(".")[2] for key in grid]
    labels = [leaf if leaves.count(leaf) == 1 else key for key, leaf in zip(grid, leaves)]
    trials = []
    for values in itertools.product(*grid.values()):
        name = "_".join(f"{label}-{as_text(value)}" for label, value in zip(labels, values))
        trials.append(Trial(re.sub(r"[^\w.+-]+", "-", name)[:200], dict(zip(grid, values))))
    if len({trial.name for trial in trials}) < len(trials):
        raise UserError("values differ only in what a folder's name cannot hold", where="sweep", remedy="give them in several sweeps")
    return trials


def choose(trials: list[Trial], num_trials: int, seed: int) -> list[Trial]:
    """Return a seeded choice of so many trials, in their order; 0: all."""
    if num_trials < 0:
        raise UserError(f"{num_trials} is no number of trials", where="--num_trials", remedy="give 1 or more, or leave it out")
    if num_trials in (0, len(trials)) or num_trials > len(trials):
        return trials
    chosen = np.random.default_rng(seed).choice(len(trials), num_trials, replace=False)
    return [trials[index] for index in sorted(chosen.tolist())]


def as_text(value: object) -> str:
    """Return a value as a command line takes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
