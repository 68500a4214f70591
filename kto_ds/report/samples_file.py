"""samples.jsonl: what the policy answered to prompts of the evaluation splits, one JSON object a line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from kto_ds.artifacts import write_atomically
from kto_ds.report.metrics_file import whole_records

SAMPLES_FILE = "samples.jsonl"
EVALUATION_SAMPLES_FILE = "evaluation_samples.jsonl"  # of kto-ds evaluate


class Sample(TypedDict):
    split: str
    step: int | None  # None in the file of kto-ds evaluate
    row: str  # the file and line of the first row with this prompt
    prompt: str
    completion: str
    before: str | None  # what it said at step 0; None where it was not asked then
    num_tokens: int  # of the completion
    stopped: str  # by what the completion ended: eos or length
    label: bool
    dataset_completion: str  # of the row
    dataset_reward: float | None  # of the row's completion; None where it is no number


def read_samples(path: Path) -> list[Sample]:
    """Return the samples of a file; none where there is no such file."""
    return whole_records(path.read_bytes())[0] if path.is_file() else []


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write all samples of a run: a file of them is as it was, or as it is now."""
    write_atomically(path, "".join(json.dumps(sample, ensure_ascii=False, allow_nan=False) + "\n" for sample in samples))


def drop_after(path: Path, step: int) -> None:
    """Keep the samples up to `step`, for a run that resumes from there."""
    samples = read_samples(path)
    kept = [sample for sample in samples if sample["step"] <= step]
    if len(kept) < len(samples):
        write_samples(path, kept)
