"""The names that wandb and TensorBoard show a record's numbers under: the word ahead of the first slash is a section of panels there."""

from kto_ds.report.metrics_file import Record

# Of the training split: how fast it goes, what it takes, how many examples there were.
SPEED = ("tokens_per_second", "seconds", "tflops", "mfu", "hfu")
MEMORY = ("peak_memory_gib",)
SECTIONS = ("train", "speed", "memory", "count")


def panel_names(record: Record) -> dict[str, float | int]:
    """Return the numbers of a record by the names of their panels; what is no number has none."""
    numbers = {name: value for name, value in record.items() if name != "step" and isinstance(value, (int, float))}
    return {_panel_name(record["split"], name): value for name, value in numbers.items()}


def axis_of(split: str) -> str:
    """Return the name of the steps that all panels of a split have as their axis."""
    return f"{split}/step"


def _panel_name(split: str, name: str) -> str:
    if split == "train":
        head = name.split("/")[0]
        section = "speed" if head in SPEED else "memory" if head in MEMORY else head
        if section in SECTIONS:
            return name if section == head else f"{section}/{name}"
    return f"{split}/{name}"
