"""`kto-ds train` in a process of its own, its loop measured from within."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.process import Meter, Spent, memory_bytes
from benchmarks.small_model import SEED

# Of a parameter with Adam: float32 weight or master weight, gradient, two moments. What a run holds beyond that counts as working memory.
STATE_BYTES = 16


class Trained(NamedTuple):
    """A training loop of kto_ds, or of what it is compared with."""

    spent: Spent  # from its beginning to the log line of its last step
    idle_bytes: int  # resident after the imports
    num_weights: int
    losses: list[float]  # of every step
    grad_norms: list[float]
    rows: list[bytes]  # in the order of training: ids of prompt and completion as int32
    completion_tokens: int
    phases: dict[str, float]  # wall seconds of its parts, kto_ds only

    @property
    def policy_tokens(self) -> int:
        return sum(len(ids) // 4 for ids in self.rows)

    @property
    def working_bytes(self) -> int:
        """The most that was resident, less what is before the model and the least that training it takes."""
        return self.spent.peak_bytes - self.idle_bytes - STATE_BYTES * self.num_weights


def base_config(work: Path, *, max_length: int, global_batch_size: int, **data) -> dict:
    """Return a config for the model, the rows and the artefacts that lie in `work`, all else at its defaults but for a constant learning rate."""
    return {
        "seed": SEED,
        "model": {"path": str(work / "model"), "dtype": "float32"},
        "data": {"train": [{"path": str(work / "rows.json")}], "max_length": max_length, "artifact": str(work / "dataset"), "dataset_num_proc": 1, **data},
        "reference": {"artifact": str(work / "reference")},
        "batch": {"global_batch_size": global_batch_size},
        "optim": {"lr_scheduler_type": "constant", "warmup_ratio": 0.0},
    }


def make_artifacts(config: dict) -> None:
    from kto_ds.config import RunConfig
    from kto_ds.stages import precompute_ref, prepare

    run = RunConfig.model_validate(config)
    prepare.main(run)
    precompute_ref.main(run)


def train_ours(config: dict) -> Trained:
    """Train; every rank of a run calls this. The loop ends with the log line of its last step: what comes then is a checkpoint."""
    from safetensors import safe_open

    from kto_ds.config import RunConfig
    from kto_ds.report.metrics_file import METRICS_FILE, read_records
    from kto_ds.report.sinks import Sinks
    from kto_ds.runtime import collectives
    from kto_ds.stages import train
    from kto_ds.stages.inputs import open_dataset

    torch.set_num_threads(1)
    run, meter, idle_bytes, laps = RunConfig.model_validate(config), Meter(), memory_bytes("VmRSS"), []
    loop, log = train._loop, Sinks.log

    def metered_loop(*arguments):
        meter.start()
        return loop(*arguments)

    def metered_log(sinks, record):
        log(sinks, record)
        laps.append(meter.read())

    train._loop, Sinks.log = metered_loop, metered_log
    train.main(run)
    records = read_records(run.output_dir / METRICS_FILE)
    assert len(laps) == len(records), "one log line a step, and none besides"
    split = open_dataset(run)[0]["train"]
    collectives.stop()
    with safe_open(Path(run.model.path) / "model.safetensors", framework="pt") as weights:
        num_weights = sum(weights.get_tensor(name).numel() for name in weights.keys())
    order = np.argsort(split.row_of, kind="stable")
    rows = [np.concatenate([split.prompt(split.prompt_of[example]), split.completion(example)]).astype(np.int32).tobytes() for example in order]
    phases = {name: sum(record[f"seconds/{name}"] for record in records) for name in ("kl", "policy", "update", "host")}
    return Trained(
        laps[-1], idle_bytes, num_weights, [record["loss"] for record in records], [record["grad_norm"] for record in records], rows,
        int(split.matched_lengths.sum()), phases,
    )  # fmt: skip
