"""Which examples a run really feeds to its model, written down by every rank as it trains."""

import json
import shutil
from collections import defaultdict
from pathlib import Path


def record_fed(rank: int, *, folder: Path) -> None:
    """Let `train` of this process append {step, ids} of what this rank's backward passes are made from to a file of the folder."""
    from kto_ds.stages import train

    step_of_train = train.train_step

    def recorded(engine, work, *arguments, **named):
        ids = [int(pair) for batch in work.policy_batches for pair in batch.pair_ids]
        with (folder / f"fed-{rank}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": work.step, "ids": ids}) + "\n")
        return step_of_train(engine, work, *arguments, **named)

    train.train_step = recorded


def fed_by_step(folder: Path) -> dict[int, list[int]]:
    """Return the example ids of every step over all ranks, sorted, and empty the record."""
    fed: dict[int, list[int]] = defaultdict(list)
    for path in folder.glob("fed-*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            fed[entry["step"]] += entry["ids"]
        path.unlink()
    return {step: sorted(ids) for step, ids in sorted(fed.items())}


def go_back_to(run: Path, step: int) -> None:
    """Make a run look as if it had been killed after the save of a step."""
    for folder in (run / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
