"""kto_ds from Python: what the commands do, as functions of a config, for a notebook or a program of your own.

The process that calls these is one rank; `launch` starts a command on several. What a command would end with an error for is raised: KtoError, and of
your own mistakes UserError, with `what`, `where` and `remedy`.
"""

import gc
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from kto_ds import cli
from kto_ds.config import RunConfig
from kto_ds.config_text import explain, read_yaml, with_changes, write_yaml
from kto_ds.errors import EXIT_PREEMPTED, KtoError, Preempted, UserError
from kto_ds.launching import launcher_arguments
from kto_ds.report.metrics_file import METRICS_FILE, Record, read_records
from kto_ds.runtime.jobs import run_job
from kto_ds.staging import release_folders


def make_config(**sections: object) -> RunConfig:
    """Return a config of sections and their keys, such as `output_dir="runs/mine", model={"path": ...}`; docs/config.md lists all. UserError names the wrong key."""
    return _validated(sections, where="config")


def read_config(path: str | Path, changes: Mapping[str, object] | None = None) -> RunConfig:
    """Return the config in a YAML file with some keys changed, as `change` does: what `--config path --loss.beta 0.3` gives."""
    values = read_yaml(Path(path))
    return _validated(with_changes(values, changes or {}, where="changes"), where=f"{path} and changes" if changes else str(path))


def change(config: RunConfig, changes: Mapping[str, object]) -> RunConfig:
    """Return the config with some keys changed, such as `{"loss.beta": 0.3}`. Of a section, `{"loss": {"beta": 0.3}}`, what is not named stays as it is."""
    return _validated(with_changes(config.model_dump(mode="json"), changes, where="changes"), where="changes")


def _validated(values: dict, *, where: str) -> RunConfig:
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise explain(error, where=where) from error


def plan(config: RunConfig, *, gpu: str = "H100", num_gpus: int = 8) -> dict:
    """Return what the run takes of `num_gpus` GPUs of a kind: what `kto-ds plan --json` prints."""
    cli.load_stage("plan")
    from kto_ds.stages.plan import make_plan  # once it is known what torch runs on

    return make_plan(config, gpu, (num_gpus,))


def prepare(config: RunConfig) -> Path:
    """Make the dataset artefact and return its folder."""
    _run("prepare", config)
    return config.dataset_dir


def precompute_ref(config: RunConfig) -> Path:
    """Score all pairs with the reference model, as far as they are not scored yet, and return the folder of the reference artefact."""
    _run("precompute-ref", config)
    return config.reference_dir


def train(config: RunConfig, *, accept_changes: bool = False, max_wall_time: str | None = None) -> list[Record]:
    """Train to the end, from the newest checkpoint if there is one, and return the records of metrics.jsonl. The options are those of `kto-ds train`."""
    _run("train", config, accept_changes=accept_changes, max_wall_time=max_wall_time)
    return metrics(config)


def evaluate(config: RunConfig) -> dict[str, dict[str, float]]:
    """Score the evaluation splits with the export, or with eval.path, and return the metrics of each."""
    _run("evaluate", config)
    return json.loads((config.output_dir / "evaluation.json").read_text(encoding="utf-8"))["splits"]


def export(config: RunConfig, *, checkpoint: str = "latest", merge: bool = False) -> Path:
    """Write a checkpoint as a Hugging Face folder and return that. The options are those of `kto-ds export`."""
    _run("export", config, checkpoint=checkpoint, merge=merge)
    return config.merged_dir if merge else config.export_dir


def metrics(config: RunConfig) -> list[Record]:
    """Return the records of metrics.jsonl so far, one of each logged step and evaluation, as for pandas.DataFrame."""
    return read_records(config.output_dir / METRICS_FILE)


def launch(command: str, config: RunConfig, *, num_ranks: int) -> None:
    """Run precompute-ref, train or evaluate on `num_ranks` ranks of this machine, and wait. What they print goes to the process's own output.

    An interrupt has them save, and raises Preempted once they have. KtoError, with their exit code, when they fail.
    """
    if command in cli.SINGLE_PROCESS or command not in cli.COMMANDS:
        raise UserError(f"{command} does not run on several ranks", where="command", remedy="launch precompute-ref, train, evaluate or doctor")
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        write_yaml(config, file)
        file.flush()
        exit_code, signal_name = run_job([sys.executable, "-m", "deepspeed.launcher.runner", *launcher_arguments([command, "--config", file.name], num_ranks=num_ranks)])
    if exit_code == EXIT_PREEMPTED:
        raise Preempted(f"{signal_name or f'exit code {exit_code}'}: {command} on {num_ranks} ranks is stopped; launch it again to go on")
    if exit_code:
        error = KtoError(f"{command} on {num_ranks} ranks ended with exit code {exit_code}; what was wrong stands in its output")
        error.exit_code = exit_code
        raise error


def _run(command: str, config: RunConfig, **options: object) -> None:
    """Run a stage in this process, which lives on: a command of its own may write to the same folder afterwards, and another model needs the memory of this one."""
    stage = cli.load_stage(command)
    try:
        stage(config, **options)
    finally:
        release_folders()
        _free_memory()


def _free_memory() -> None:
    import torch  # which the stage has imported

    gc.collect()  # a model refers to itself
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
