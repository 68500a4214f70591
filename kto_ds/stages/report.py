"""How a run stands, from its files alone, also while it goes on."""

import os
import time
from pathlib import Path

from kto_ds.artifacts import MANIFEST
from kto_ds.config import RunConfig
from kto_ds.errors import UserError
from kto_ds.report.distribution_plots import plot_distributions
from kto_ds.report.metrics_file import METRICS_FILE, Record, read_records
from kto_ds.report.plots import plot_metrics
from kto_ds.report.wandb_process import WandbProcess, wandb_order
from kto_ds.stages.numerics import NUMERICS_FILE
from kto_ds.stages.run_page import PAGE_FILE, read_object, read_runs, write_page

UPLOAD_SECONDS = 600


def main(config: RunConfig, wandb_sync: bool = False) -> None:
    run = config.output_dir
    if not (run / "status.json").is_file():
        raise UserError("there is no run here", where=f"output_dir {run}", remedy="start it with kto-ds train --config RUN.yaml, or name its folder with --output_dir")
    records = read_records(run / METRICS_FILE) if (run / METRICS_FILE).is_file() else []
    print("\n".join([f"run {run}", *_status_lines(run), *_metric_lines(records), *_checkpoint_lines(run), *_rank_lines(run, now=time.time())]))
    if records:
        plot_metrics(run / METRICS_FILE, run / "metrics.png")
        read = read_runs([run])
        drawn = [run / "metrics.png", *([run / "distributions.png"] if plot_distributions(read[0], run / "distributions.png") else []), run / PAGE_FILE]
        write_page(read, run / PAGE_FILE)
        print(f"drawn anew: {', '.join(map(str, drawn))}", flush=True)
    if wandb_sync:
        _upload(config, records)


def _status_lines(run: Path) -> list[str]:
    status = read_object(run / "status.json")
    ended = f", exit code {status['exit_code']}" if status.get("exit_code") is not None else ""
    lines = [f"status: {status.get('state', 'unknown')} at step {status.get('step', 'unknown')}{ended}"]
    return [*lines, *(f"  {line}" for line in str(status.get("reason") or "").splitlines())]


def _metric_lines(records: list[Record]) -> list[str]:
    """Return the last record of each split, and what was skipped in all."""
    last = {record["split"]: record for record in records}
    lines = [line for split, record in last.items() for line in (f"{split}, step {record['step']}:", *(f"  {name:<22} {_shown(value)}" for name, value in _metrics(record)))]
    skipped = sum(int(record.get("skipped_steps", 0)) for record in records)
    return [*(lines or ["no metrics yet"]), f"skipped steps: {skipped}" + (f", see {NUMERICS_FILE}" if skipped else "")]


def _metrics(record: Record) -> list[tuple[str, float]]:
    return [(name, value) for name, value in record.items() if name not in ("split", "step") and not isinstance(value, list)]


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _checkpoint_lines(run: Path) -> list[str]:
    """Say of every folder in checkpoints/ what it is. A manifest is read, the files are not: kto-ds verify reads them."""
    folders = sorted(path for path in (run / "checkpoints").glob("*") if path.is_dir())
    return [f"checkpoint {path.name}: {_checkpoint_state(path)}" for path in folders] or ["no checkpoints yet"]


def _checkpoint_state(folder: Path) -> str:
    if ".corrupt." in folder.name:
        return "damaged, set aside"
    if not folder.name.startswith("step-"):
        return "not finished"
    manifest = read_object(folder / MANIFEST)
    files = manifest.get("files")
    if not isinstance(files, dict):
        return "without a whole manifest"
    wrong = [name for name, entry in files.items() if not (folder / name).is_file() or (folder / name).stat().st_size != entry["bytes"]]
    size = sum(entry["bytes"] for entry in files.values())
    return f"damaged: {', '.join(wrong)}" if wrong else f"sealed, {len(files)} files, {size:,} bytes; contents not read"


def _rank_lines(run: Path, *, now: float) -> list[str]:
    """Return when each rank was last heard of."""
    beats = sorted((read_object(path) for path in (run / "ranks").glob("*.json")), key=lambda beat: beat.get("rank", -1))
    return [
        f"rank {beat.get('rank')} on {beat.get('host')} (pid {beat.get('pid')}): {beat.get('phase')}, step {beat.get('step')}, {now - beat.get('beat', now):.0f} s ago" for beat in beats
    ]


def _upload(config: RunConfig, records: list[Record]) -> None:
    """Put all of metrics.jsonl into the wandb run that training began, or into a new one; UserError where wandb does not take it."""
    if not records:
        raise UserError("there are no metrics to upload", where=str(config.output_dir / METRICS_FILE))
    mode = "offline" if os.environ.get("WANDB_MODE") == "offline" else "online"
    told: list[str] = []
    order = wandb_order(
        config.report.wandb, mode, output_dir=config.output_dir.resolve(), run_config=config.model_dump(mode="json"),
        sources={"dataset": config.dataset_dir, "reference": config.reference_dir}, finish_seconds=UPLOAD_SECONDS, goes_offline=False,
    )  # fmt: skip
    arrived = WandbProcess(order, tell=told.append).close(UPLOAD_SECONDS)
    if not arrived:
        raise UserError("wandb has not taken the records: " + "; ".join(told), where="--wandb-sync", remedy="mend what it says and give the command again: what has arrived is not sent twice")
    print("\n".join(told), flush=True)
