"""Folders of runs with the files that training leaves, filled with made-up numbers by the code that fills the real ones."""

import json
from pathlib import Path

import numpy as np

from kto_ds.report.distributions import distribution_metrics
from kto_ds.report.metrics import StepResult, kto_metrics


def step_result(generator: np.random.Generator, share: float, num_examples: int = 16) -> StepResult:
    """Return what a step might find when `share` of the training is behind it: labels are told apart more and more, and longer answers lose."""
    lengths = np.exp(generator.normal(4.5, 0.9, num_examples)).astype(np.int64) + 1
    desirable = np.arange(num_examples) % 2 == 0
    logratios = (share * np.where(desirable, 6.0, -12.0) + generator.normal(0, 1 + 6 * share, num_examples) - share * np.log(lengths)).astype(np.float32)
    kl = 0.4 * share + float(generator.normal(0, 0.1))
    losses = 1 / (1 + np.exp(np.where(desirable, 1, -1) * (0.1 * logratios - 0.1 * max(kl, 0.0))))
    return StepResult(losses, 0.1 * logratios, logratios - 1.2 * lengths, desirable, logratios, lengths, kl=max(kl, 0.0), kl_raw=kl, kl_stderr=0.05)


def train_record(step: int, num_steps: int, generator: np.random.Generator) -> dict:
    result = step_result(generator, step / num_steps)
    speed = {"tokens_per_second": 4e4 + step, "seconds": 1.2, "seconds/kl": 0.3, "seconds/policy": 0.7, "seconds/update": 0.15, "seconds/host": 0.05, "peak_memory_gib": 40.5}
    return {
        "split": "train", "step": step, "epoch": step / num_steps, **kto_metrics([result]), "grad_norm": float(generator.uniform(1, 2)), **distribution_metrics([result]),
        "learning_rate": 1e-6 * step / num_steps, **speed,
    }  # fmt: skip


def records_of(num_steps: int, *, seed: int = 0, splits: tuple[str, ...] = ("eval",), eval_steps: int = 10) -> list[dict]:
    generator = np.random.default_rng(seed)
    records = []
    for step in range(1, num_steps + 1):
        records.append(train_record(step, num_steps, generator))
        if step % eval_steps == 0:
            records += [{"split": split, "step": step, "epoch": step / num_steps, **kto_metrics([step_result(generator, step / num_steps)]), "rewards/auc": 0.5 + 0.4 * step / num_steps} for split in splits]
    return records


def write_metrics(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def make_run(folder: Path, records: list[dict], *, beta: float = 0.1, **files: object) -> Path:
    """Fill a folder; `files` are what else lies in it: status, samples, data_report."""
    write_metrics(folder / "metrics.jsonl", records)
    config = f"output_dir: {folder}\nmodel: {{path: some/model}}\ndata: {{train: [{{path: rows.jsonl}}], max_length: 1024}}\nloss: {{beta: {beta}}}\noptim: {{learning_rate: 2.0e-6}}\n"
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    (folder / "status.json").write_text(json.dumps(files.get("status", {"state": "completed", "step": records[-1]["step"], "exit_code": 0, "reason": ""})), encoding="utf-8")
    if "samples" in files:
        (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in files["samples"]), encoding="utf-8")
    if "data_report" in files:
        (folder / "dataset").mkdir()
        (folder / "dataset" / "data_report.json").write_text(json.dumps(files["data_report"]), encoding="utf-8")
    return folder
