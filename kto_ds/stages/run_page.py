"""report.html: a page of one run, or of several beside each other, from metrics.jsonl and whatever else their folders hold."""

import time
from pathlib import Path

from pydantic import ValidationError

from kto_ds.artifacts import read_json, write_atomically
from kto_ds.config import RunConfig
from kto_ds.config_text import read_yaml
from kto_ds.data.dataset import REPORT
from kto_ds.errors import Unreadable, UserError, reading, unwritable
from kto_ds.redaction import redact, redact_values
from kto_ds.report.distribution_plots import plot_distributions
from kto_ds.report.metrics_file import METRICS_FILE, read_records
from kto_ds.report.page import page
from kto_ds.report.plots import plot_metrics
from kto_ds.report.run_files import RunFiles, by_split, distinct_names, flat
from kto_ds.report.samples_file import SAMPLES_FILE

PAGE_FILE = "report.html"
NAME_A_RUN = "name the output_dir of a run, or a metrics.jsonl"


def main(paths: list[Path], out: Path | None, png: Path | None) -> None:
    """Write the page of runs that are named by their folders or their metrics files, to `out` or into the first folder, and pictures of each into `png`."""
    for path in paths:
        if not path.exists():
            raise UserError("there is no such folder or file", where=str(path), remedy=NAME_A_RUN)
    if out is not None and out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"expected a name that ends in .html, found {out.name!r}", where="--out", remedy=f"give a file such as {out.with_suffix('.html')}")
    read = list(zip(paths, read_runs(paths)))
    begun = [(path, run) for path, run in read if run.records]
    if not begun:
        raise UserError("there is no whole line of metrics", where=str(paths[0]), remedy=f"{NAME_A_RUN}; a run that has just begun has its first line after its first step")
    for path in [path for path, run in read if not run.records]:
        print(f"notice: {path} has no metrics yet, left out", flush=True)
    target = out or _folder_of(begun[0][0]) / PAGE_FILE
    write_page([run for _, run in begun], target)
    print(f"report: {target}", flush=True)
    if png is not None:
        _draw(begun, png)


def read_runs(paths: list[Path]) -> list[RunFiles]:
    """Read runs, under names that tell them apart."""
    return [read_run(path, name) for path, name in zip(paths, distinct_names([_parts(path) for path in paths]))]


def write_page(runs: list[RunFiles], target: Path) -> None:
    try:
        write_atomically(target, page(runs, made=_moment(time.time())))
    except OSError as error:
        raise unwritable(error, target.parent) from error


def _draw(runs: list[tuple[Path, RunFiles]], folder: Path) -> None:
    """Draw the pictures that a run has in its folder, of each run under its name."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, run in runs:
            stem = run.name.replace("/", "-")
            plot_metrics(path if path.is_file() else path / METRICS_FILE, folder / f"{stem}.png")
            plot_distributions(run, folder / f"{stem}-distributions.png")
    except OSError as error:
        raise unwritable(error, folder) from error
    print(f"pictures: {folder}", flush=True)


def read_run(path: Path, name: str) -> RunFiles:
    """Read what there is of a run; a part that is absent, damaged or of another program is empty. Texts come without secrets."""
    folder, metrics_file = _folder_of(path), path if path.is_file() else path / METRICS_FILE
    with reading(metrics_file):
        records, updated = (read_records(metrics_file), _moment(metrics_file.stat().st_mtime)) if metrics_file.exists() else ([], "")
    known = metrics_file.name == METRICS_FILE  # else the files beside it may belong to another run
    config = _read_config(folder / "config.yaml") if known else {}
    artifact = Path(str(flat(config).get("data.artifact") or folder / "dataset"))
    return RunFiles(
        name=redact(name),
        records={redact(split): found for split, found in by_split(records).items()},
        updated=updated,
        status=redact_values(read_object(folder / "status.json")) if known else {},
        config=redact_values(flat(config)),
        defaults=_defaults(config),
        data_report=redact_values(read_object(artifact / REPORT)) if known else {},
        samples=tuple(redact_values(_read_samples(folder / SAMPLES_FILE))) if known else (),
    )


def read_object(path: Path) -> dict:
    """Return the JSON object in a file; an empty one where there is none, as a file may go or change while a run goes on."""
    try:
        found = read_json(path)
    except (ValueError, Unreadable):
        return {}
    return found if isinstance(found, dict) else {}


def _read_config(path: Path) -> dict:
    try:
        return read_yaml(path)
    except UserError:
        return {}


def _read_samples(path: Path) -> list[dict]:
    try:
        return [sample for sample in read_records(path) if isinstance(sample, dict)]
    except OSError:  # mostly because nothing was sampled
        return []


def _defaults(config: dict) -> dict[str, object]:
    """Return the defaults of the keys of a run that have one, by dotted key; none of a config of another version."""
    try:
        required = {"output_dir": config["output_dir"], "model": {"path": config["model"]["path"]}, "data": {"train": config["data"]["train"]}}
        dumped = flat(RunConfig.model_validate(required).model_dump(mode="json"))
    except (KeyError, TypeError, ValidationError):
        return {}
    return {key: value for key, value in dumped.items() if key not in ("output_dir", "model.path", "data.train")}


def _folder_of(path: Path) -> Path:
    return path.parent if path.is_file() else path


def _parts(path: Path) -> tuple[str, ...]:
    """Return the parts of a path that name its run: the folder's, and the file's where it is not the folder's metrics.jsonl."""
    whole = path.resolve()
    return (whole.parent if whole.is_file() and whole.name == METRICS_FILE else whole).parts


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(seconds))
