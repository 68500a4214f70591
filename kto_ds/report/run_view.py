"""What a training run says at its start and at its end: named records in, labelled rows out. Nothing is read or measured here."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kto_ds.report.console import shown
from kto_ds.report.metrics_file import METRICS_FILE, Record
from kto_ds.report.screen import counted, duration

GIB = 1024**3
LAST_SHOWN = (("loss", "loss", ".4f"), ("margin", "rewards/margins", ".3g"), ("z", "kl", ".3g"), ("AUC", "rewards/auc", ".3f"))

Row = tuple[str, str]


class Estimate(NamedTuple):
    """Memory of one rank at the highest moment of a step, by the formula of kto-ds plan."""

    num_bytes: int
    available_bytes: int


class Opening(NamedTuple):
    """What will run."""

    model: str
    dtype: str
    num_parameters: int
    num_trainable: int
    num_examples: int
    global_batch_size: int
    num_epochs: float  # of the whole run
    done_steps: int
    num_steps: int
    num_ranks: int
    ranks_of_a_row: int  # that share the tokens of each
    zero_stage: int
    deepspeed_config: str
    way: str  # layout and kernels
    micro_batch_tokens: int
    scoring_tokens: int
    checkpointing: str
    estimate: Estimate | None  # none where the device is the host, which lends memory that is never touched
    output_dir: Path
    log_folder: Path
    weights: str = ""  # of the labels, where they are automatic
    aux_loss: str = ""  # of a mixture of experts


def opening_title(opening: Opening) -> str:
    if opening.done_steps >= opening.num_steps:
        return f"kto-ds train: nothing left to do of {counted(opening.num_steps, 'step')}"
    return f"kto-ds train: {'resuming' if opening.done_steps else 'starting'} at step {opening.done_steps + 1} of {opening.num_steps}"


def opening_rows(opening: Opening) -> list[Row]:
    trainable = "" if opening.num_trainable == opening.num_parameters else f", {opening.num_trainable:,} of them trained"
    shared = f", each shared by {opening.ranks_of_a_row} ranks that take so many" if opening.ranks_of_a_row > 1 else ""
    memory = ""
    if opening.estimate:
        memory = f"about {opening.estimate.num_bytes / GIB:.1f} of {opening.estimate.available_bytes / GIB:.1f} GiB a rank at the highest moment of a step"
    rows = [
        ("model", opening.model),
        ("", f"{opening.num_parameters:,} parameters{trainable}, {opening.dtype}"),
        ("data", f"{counted(opening.num_examples, 'example')}, {opening.global_batch_size} a step; {counted(opening.num_steps, 'step')} {'is' if opening.num_steps == 1 else 'are'} {counted(opening.num_epochs, 'epoch')}"),
        ("ranks", f"{opening.num_ranks}, ZeRO {opening.zero_stage} ({opening.deepspeed_config})"),
        ("batches", f"micro-batches of {opening.micro_batch_tokens:,} tokens, {opening.scoring_tokens:,} without gradients{shared}"),
        ("compute", f"{opening.way}; {opening.checkpointing}"),
        ("memory", memory),
        ("weights", opening.weights),
        ("experts", opening.aux_loss),
        ("files", f"{opening.output_dir}; what libraries say: {opening.log_folder}"),
    ]
    return [row for row in rows if row[1]]


class Closing(NamedTuple):
    """What a run came to."""

    num_steps: int
    seconds: float  # since this start, evaluation and saving included
    records: Sequence[Record]  # of the whole run
    best_step: int | None  # of the checkpoint that is kept as the best
    speed: Sequence[Row]  # empty where no step was taken
    output_dir: Path


def closing_title(closing: Closing) -> str:
    return f"done: {counted(closing.num_steps, 'step')}, {duration(closing.seconds)} since this start"


def closing_rows(closing: Closing) -> list[Row]:
    by_split: dict[str, list[Record]] = {}
    for record in closing.records:
        by_split.setdefault(record["split"], []).append(record)
    best = "" if closing.best_step is None else f" (best: step {closing.best_step})"
    return [
        *((split, _came_to(records, is_evaluation=split != "train")) for split, records in by_split.items()),
        *closing.speed,
        ("files", f"checkpoints/{best}, {METRICS_FILE}, metrics.png and logs/ in {closing.output_dir}"),
        ("next", "kto-ds export --config RUN.yaml"),
    ]


def _came_to(records: Sequence[Record], *, is_evaluation: bool) -> str:
    """Return the last values of a split, and of an evaluation where its loss was lowest."""
    last = next((record for record in reversed(records) if "loss" in record), records[-1])
    text = ", ".join(shown(last, LAST_SHOWN)) + f" at step {last['step']}"
    evaluated = [record for record in records if "loss" in record]
    if not is_evaluation or len(evaluated) < 2:
        return text
    lowest = min(evaluated, key=lambda record: record["loss"])
    return f"{text}; lowest loss {lowest['loss']:.4f} at step {lowest['step']}"
