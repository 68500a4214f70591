"""Trials of one run with several values of some keys, one after the other, on one dataset and one reference artefact; then a table of them.

A trial is an ordinary run in <output_dir>/sweep/<name>: what has become of it is read from its own files, so that trials may be run elsewhere too,
and the same command goes on where it was.
"""

import json
import os
import shlex
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import ValidationError

from kto_ds.artifacts import read_json, write_atomically
from kto_ds.config import RunConfig
from kto_ds.config_data import HELD_OUT
from kto_ds.config_text import explain, known_keys, leaves, nearest_key, read_yaml, with_changes
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.errors import EXIT_PREEMPTED, KtoError, Preempted, UserError, excerpt, reading
from kto_ds.launching import launcher_arguments
from kto_ds.redaction import redact_values
from kto_ds.report.screen import duration
from kto_ds.runtime.jobs import run_job
from kto_ds.stages.inputs import PREPARE_FIRST, read_dataset_manifest, require_whole_dataset
from kto_ds.stages.objective import evaluation_metrics
from kto_ds.stages.resume import ALLOWED, FIXED, changes
from kto_ds.staging import claim_folder
from kto_ds.sweep.grid import Trial, all_trials, as_text, choose
from kto_ds.sweep.results import Metric, Result, Spent, as_csv, as_json, best_first, is_ranked, read_result, show_results

RECORD = "sweep.json"
OF_REFERENCE = frozenset({"reference.path", "reference.revision", "reference.dtype", "reference.artifact"})  # which log-probs all trials are held against


class Sweep(NamedTuple):
    config: RunConfig
    base: list[str]  # --config RUN.yaml and the options that all trials have
    trials: list[Trial]
    metric: Metric
    num_ranks: int

    @property
    def folder(self) -> Path:
        return self.config.output_dir / "sweep"


def main(
    config: RunConfig, *, base: list[str], listed: dict[str, list[str]], values: str | None, num_trials: int, metric: str | None, num_gpus: int, dry_run: bool, print_commands: bool
) -> None:
    """`listed` has the values of the command line by key, `values` names a file with more."""
    grid = {**(_read_values(Path(values)) if values else {}), **{key: [None if text == "null" else text for text in texts] for key, texts in listed.items()}}
    trials = choose(all_trials(grid), num_trials, config.seed)
    for trial in trials:
        _trial_config(config, trial)
    if num_gpus < 0:
        raise UserError(f"{num_gpus} is no number of GPUs", where="--num_gpus", remedy="give 1 or more, or leave it out")
    num_ranks = num_gpus or int(os.environ.get("NUM_RANKS", "0")) or max(torch.cuda.device_count(), 1)
    sweep = Sweep(config, base, trials, _metric(config, metric), num_ranks)
    spent = _known_spent(sweep)
    results = _results(sweep, spent)
    if print_commands:
        if config.dataset_dir.is_dir():
            _require_known_metric(sweep)
        print("\n".join(shlex.join(_typed(sweep, "train", _own_options(sweep, result.trial))) for result in results if result.state != "completed"))
        if any(not folder.is_dir() for folder in (config.dataset_dir, config.reference_dir)):
            print("note: first make the artefacts that all of them share: kto-ds prepare, kto-ds precompute-ref", file=sys.stderr)
        return
    _tell_plan(sweep, results)
    if dry_run:
        return
    claim_folder(sweep.folder)
    _require_same_base(sweep)
    if any(result.state != "completed" for result in results):
        _make_artifacts(sweep)
        _run_trials(sweep, spent)
    _finish(sweep, _write(sweep, spent))


# what there is to do


def _read_values(path: Path) -> dict[str, list]:
    found: dict[str, list] = {}

    def collect(part: dict, prefix: str) -> None:
        for name, value in part.items():
            if isinstance(value, dict):
                collect(value, f"{prefix}{name}.")
            elif isinstance(value, list) and value:
                found[f"{prefix}{name}"] = value
            else:
                raise UserError(f"{prefix}{name}: expected a list of values, found {excerpt(value)}", where=str(path), remedy=f"write {prefix}{name}: [{as_text(value)}]")

    content = read_yaml(path)
    collect(content["sweep"] if isinstance(content.get("sweep"), dict) else content, "")
    if unknown := next((key for key in found if key not in set(known_keys())), None):
        raise UserError(f"{unknown}: unknown key", where=str(path), remedy=nearest_key(unknown))
    return found


def _trial_config(config: RunConfig, trial: Trial) -> RunConfig:
    """Return the config of a trial; UserError for a value that a key does not take."""
    where = f"trial {trial.name}"
    try:
        return RunConfig.model_validate(with_changes(config.model_dump(mode="json"), trial.settings, where=where))
    except ValidationError as error:
        raise explain(error, where=where, options=trial.settings) from error


def _metric(config: RunConfig, wanted: str | None) -> Metric:
    """Return what trials are compared by; UserError where no evaluation can give it."""
    splits = [*config.data.eval_splits, *([f"eval/{HELD_OUT}"] if config.data.held_out_fraction is not None else [])]
    if wanted is None and not splits:
        raise UserError("there are no evaluation rows to compare trials by", where="--metric", remedy="set data.held_out_fraction, such as 0.05, or data.eval; or give --metric train/loss")
    wanted = wanted or f"{splits[0]}/rewards/auc"
    split = max((name for name in ["train", *splits] if wanted.startswith(f"{name}/")), key=len, default=None)
    if split is None:
        raise UserError(f"{excerpt(wanted)} is no metric of a split", where="--metric", remedy=f"begin it with one of {', '.join(f'{name}/' for name in ['train', *splits])}")
    is_best = wanted == config.checkpoint.metric_for_best_model
    greater_is_better = config.checkpoint.best_is_greatest if is_best else not wanted.endswith("loss")
    return Metric(split, wanted.removeprefix(f"{split}/"), takes_best=is_best, greater_is_better=greater_is_better)


def _results(sweep: Sweep, spent: dict[str, Spent]) -> list[Result]:
    return [read_result(trial, sweep.folder / trial.name, sweep.metric, spent.get(trial.name)) for trial in sweep.trials]


def _tell_plan(sweep: Sweep, results: list[Result]) -> None:
    for result in results:
        print(f"{result.trial.name}: {result.state}")
    left = sum(result.state != "completed" for result in results)
    known = [result.spent.seconds for result in results if result.state == "completed" and result.spent]
    time_left = f", about {duration(left * sum(known) / len(known))} by those that are done" if known and left else ""
    print(f"sweep: {len(results)} trials in {sweep.folder}, {left} to run on {sweep.num_ranks} rank{'s' * (sweep.num_ranks > 1)} each{time_left}; compared by {sweep.metric}", flush=True)


def _require_same_base(sweep: Sweep) -> None:
    """Refuse to go on with a sweep whose trials so far had another config."""
    record = _read_record(sweep.folder)
    if not record:
        return
    swept = {key for trial in sweep.trials for key in trial.settings}
    found = [change for change in changes(record["base"], sweep.config.model_dump(mode="json")) if change.key in FIXED | ALLOWED | OF_REFERENCE or change.key.startswith("data.")]
    if differing := [str(change) for change in found if change.key not in swept | {"data.dataset_num_proc"}]:
        remedy = f"restore the config, choose another output_dir, or delete {sweep.folder} to begin anew"
        raise UserError("\n  ".join(["the config has changed since the trials that are there:", *differing]), where=str(sweep.folder), remedy=remedy)


def _read_record(folder: Path) -> dict:
    try:
        found = read_json(folder / RECORD)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("base"), dict) else {}


def _known_spent(sweep: Sweep) -> dict[str, Spent]:
    return {entry["trial"]: Spent(entry["seconds"], entry["exit_code"]) for entry in _read_record(sweep.folder).get("trials", []) if entry["seconds"] is not None}


# running


def _own_options(sweep: Sweep, trial: Trial) -> dict[str, object]:
    shared = {"data.artifact": sweep.config.dataset_dir, "reference.artifact": sweep.config.reference_dir}
    return {"output_dir": sweep.folder / trial.name, **shared, "checkpoint.resume": "auto", **_resolved(sweep.config, trial)}


def _resolved(config: RunConfig, trial: Trial) -> dict[str, object]:
    """Return the settings of a trial, a mapping as the keys of the whole section that it gives: nothing is left for a command line to merge."""
    found = leaves(RunConfig, _trial_config(config, trial).model_dump(mode="json"))
    settings: dict[str, object] = {}
    for key, value in trial.settings.items():
        settings |= {name: whole for name, whole in found.items() if name == key or name.startswith(f"{key}.")} if isinstance(value, dict) else {key: value}
    return settings


def _typed(sweep: Sweep, command: str, options: dict[str, object]) -> list[str]:
    """Return what a user would type; of several ranks without the port, which is free only when it is looked for."""
    return ["kto-ds", *_arguments(sweep, command, options)] if sweep.num_ranks == 1 else ["deepspeed", "--num_gpus", str(sweep.num_ranks), "--module", "kto_ds", *_arguments(sweep, command, options)]


def _arguments(sweep: Sweep, command: str, options: dict[str, object]) -> list[str]:
    texts = {key: json.dumps(value) if isinstance(value, (list, dict)) else as_text(value) for key, value in options.items()}
    return [command, *_without(sweep.base, options.keys()), *(word for key, text in texts.items() for word in (f"--{key}", text))]


def _without(base: list[str], keys: Collection[str]) -> list[str]:
    """Return options without those of some keys, and of what is within them."""
    kept, is_kept = [], True
    for word in base:
        if word.startswith("--"):
            given = word[2:].partition("=")[0]
            is_kept = not any(given == key or given.startswith(f"{key}.") for key in keys)
        kept += [word] * is_kept
    return kept


def _run(sweep: Sweep, command: str, options: dict[str, object], *, num_ranks: int) -> int:
    """Run a command as a user would start it and return its exit code; Preempted when this process was asked to stop meanwhile."""
    alone = sweep._replace(num_ranks=num_ranks)
    print(f"\n$ {shlex.join(_typed(alone, command, options))}", flush=True)
    arguments = _arguments(sweep, command, options)
    module = ["kto_ds", *arguments] if num_ranks == 1 else ["deepspeed.launcher.runner", *launcher_arguments(arguments, num_ranks=num_ranks)]
    code, signal_name = run_job([sys.executable, "-m", *module])
    if signal_name or code == EXIT_PREEMPTED:
        raise Preempted(f"{signal_name or f'exit code {code}'}: the sweep is stopped; start the same command again to go on")
    return code


def _make_artifacts(sweep: Sweep) -> None:
    """Make the artefacts that are missing. A reference that is there already is looked at, and what does not serve is refused before any trial."""
    configs = [_trial_config(sweep.config, trial) for trial in sweep.trials]
    if not sweep.config.dataset_dir.is_dir():
        # A KL group must fit into the smallest step.
        smallest = {"batch.global_batch_size": min(config.batch.global_batch_size for config in configs)}
        _require_done(_run(sweep, "prepare", smallest, num_ranks=1), "prepare")
    _require_known_metric(sweep)
    # apo_zero_unpaired needs no mismatched pairs, and kto has all that it needs.
    scored = {"loss.loss_type": "kto" if any(config.loss.loss_type == "kto" for config in configs) else "apo_zero_unpaired"}
    _require_done(_run(sweep, "precompute-ref", scored, num_ranks=sweep.num_ranks), "precompute-ref")


def _require_known_metric(sweep: Sweep) -> None:
    """Refuse a metric that the evaluations of a trial will not give, as only the rows tell, before it costs anything."""
    name, folder = sweep.metric.split, sweep.config.dataset_dir
    if name == "train":
        return
    manifest = read_dataset_manifest(folder)
    require_whole_dataset(folder, manifest)
    if name not in manifest["splits"]:
        raise UserError(f"has no split {name}, which {sweep.metric} is of", where=str(folder), remedy=PREPARE_FIRST)
    with reading(folder):
        split = TokenizedSplit.load(folder / name)
    for loss in {config.loss.loss_type: config.loss for config in (_trial_config(sweep.config, trial) for trial in sweep.trials)}.values():
        known = evaluation_metrics(split, loss)
        if sweep.metric.name not in known:
            why = f", as its {split.num_examples:,} rows have one label" if sweep.metric.name == "rewards/auc" else ""
            remedy = f"give --metric one of {', '.join(f'{name}/{metric}' for metric in known)}"
            raise UserError(f"with loss_type {loss.loss_type} no evaluation gives {excerpt(str(sweep.metric))}{why}", where="--metric", remedy=remedy)


def _require_done(code: int, command: str) -> None:
    if code:
        error = KtoError(f"no trial was begun, as {command} ended with exit code {code}")
        error.exit_code = code
        raise error


def _run_trials(sweep: Sweep, spent: dict[str, Spent]) -> None:
    """Run what is not completed. A trial that fails is left for the table, and the next one begins."""
    for number, trial in enumerate(sweep.trials, start=1):
        if read_result(trial, sweep.folder / trial.name, sweep.metric, None).state == "completed":
            continue
        print(f"\nsweep: trial {number} of {len(sweep.trials)}: {trial.name}", flush=True)
        began, before, code = time.monotonic(), spent[trial.name].seconds if trial.name in spent else 0.0, EXIT_PREEMPTED
        try:
            code = _run(sweep, "train", _own_options(sweep, trial), num_ranks=sweep.num_ranks)
        finally:
            spent[trial.name] = Spent(before + time.monotonic() - began, code)
            _write(sweep, spent)
        if code:
            print(f"sweep: {trial.name} ended with exit code {code}; the sweep goes on", flush=True)


def _write(sweep: Sweep, spent: dict[str, Spent]) -> list[Result]:
    """Write sweep.json and sweep.csv, and return the results, best first."""
    results = best_first(_results(sweep, spent), sweep.metric)
    # The config of the first start counts: trials of then are compared with those of now.
    base = _read_record(sweep.folder).get("base") or redact_values(sweep.config.model_dump(mode="json"))
    record = {"metric": str(sweep.metric), "base": base, "trials": [as_json(result) for result in results]}
    write_atomically(sweep.folder / RECORD, json.dumps(record, indent=1))
    write_atomically(sweep.folder / "sweep.csv", as_csv(results, sweep.metric))
    return results


def _finish(sweep: Sweep, results: list[Result]) -> None:
    """Print the table and what to do with it; KtoError when a trial has not come to its end."""
    print()
    show_results(results, sweep.metric)
    ranked = [result for result in results if is_ranked(result)]
    print(f"\ntable: {sweep.folder / RECORD}, {sweep.folder / 'sweep.csv'}")
    if ranked:
        best = ranked[0]
        print(f"the best: kto-ds export --config {shlex.quote(str(best.folder / 'config.yaml'))}{' --checkpoint best' if sweep.metric.takes_best else ''}")
        print(f"to compare: kto-ds report {shlex.join(str(result.folder) for result in ranked)}", flush=True)
    if unfinished := [result for result in results if not is_ranked(result)]:
        what = f"{len(unfinished)} of {len(results)} trials have no {sweep.metric}"
        raise KtoError("\n  ".join([what, *(f"{result.trial.name}: {result.state}{f', {result.reason}' if result.reason else ''}" for result in unfinished)]))
