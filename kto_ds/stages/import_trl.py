"""A command line or YAML file of TRL's KTO script -> run.yaml of ours, and what every option became, or why it has no counterpart."""

import io
import json
import sys
from pathlib import Path
from typing import TextIO

from pydantic import ValidationError

from kto_ds.config import RunConfig
from kto_ds.config_text import dump_values, explain, leaves, read_yaml
from kto_ds.errors import UserError, excerpt
from kto_ds.moving.trl_command import Command, Values, count_gpus, read_command, read_file, typed
from kto_ds.moving.trl_import import Kind, Outcome, translate
from kto_ds.redaction import redact
from kto_ds.runtime.deepspeed_config import check_zero_section, read_deepspeed_config

HEADINGS: dict[Kind, str] = {
    "became": "became", "not given": "not given, but TRL's default is another one than ours", "as it is": "needs no key of the config", "no counterpart": "no counterpart",
}  # fmt: skip
NEEDED = {"output_dir": "x", "model": {"path": "x"}, "data": {"train": [{"path": "x"}]}}  # what a config has no default of


def main(file: Path | None, words: list[str], out: Path | None, num_gpus: int) -> None:
    """Write run.yaml to `out`, or print it; the account goes to stdout, or to stderr where the config goes there. `words` are those of the command; 0 GPUs: as it says."""
    if out is not None and out.exists():
        raise UserError("there is a file already", where=str(out), remedy="give another name with --out, or delete it")
    if num_gpus < 0:
        raise UserError(f"{num_gpus} is no number of GPUs", where="--num_gpus", remedy="give 1 or more, or leave it out")
    if bool(words) == (file is not None):
        raise UserError("expected a file or a command behind --", where="command line", remedy="kto-ds import-trl -- trl kto --model_name_or_path ...")
    command = read_file(file, read_yaml) if file is not None else read_command(words, read_yaml)
    found, origin = (num_gpus, "--num_gpus") if num_gpus else count_gpus(command)
    count = found or 1
    defaults = leaves(RunConfig, RunConfig.model_validate(NEEDED).model_dump(mode="json"))
    sharding = _sharding(command)
    settings, outcomes = translate(command, num_gpus=count, sharding=sharding, defaults=defaults)
    outcomes = [outcome._replace(value=redact(outcome.value), text=redact(outcome.text)) for outcome in outcomes]
    for key, option in (("model.path", "--model_name_or_path"), ("data.train", "--dataset_name")):
        if settings.get(key) is None:
            raise UserError(f"it names no {key.replace('.', ' ')}", where="the command", remedy=f"add {option} to it, where a script has it in itself")
    config = _validated(_nested(settings))
    text = _config_text(_nested(settings), outcomes)
    if out is None:
        sys.stdout.write(text)
    else:
        out.write_text(text, encoding="utf-8")
    stream = sys.stderr if out is None else sys.stdout
    print(f"GPUs: {count} ({origin})" if found else "GPUs: 1 is assumed for the batch, as nothing says how many there were: give --num_gpus", file=stream)
    print("deepspeed.config: {} ({})".format(*sharding), file=stream)
    _tell(outcomes, stream)
    named = out or "RUN.yaml"
    print(f"\nnext: kto-ds plan --config {named}, then bash launch/pipeline.sh {named}; a step takes {config.batch.global_batch_size} examples", file=stream)


def _nested(settings: Values) -> dict:
    """Return the settings as sections, in the order of the config."""
    found: dict = {}
    order = list(RunConfig.model_fields)
    for key in sorted(settings, key=lambda key: order.index(key.split(".")[0])):
        section, (*path, leaf) = found, key.split(".")
        for name in path:
            section = section.setdefault(name, {})
        section[leaf] = settings[key]
    return found


def _validated(values: dict) -> RunConfig:
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise explain(error, where="what TRL's options became") from error


def _config_text(values: dict, outcomes: list[Outcome]) -> str:
    lost = [f"#   {_typed(outcome)}: {outcome.text}\n" for outcome in outcomes if outcome.kind == "no counterpart"]
    stream = io.StringIO()
    stream.write("# Made by kto-ds import-trl. What it does not name is as kto-ds train --help says.\n")
    stream.write("".join(["# Without a counterpart:\n", *lost]) if lost else "")
    dump_values(values, stream)
    return stream.getvalue()


def _typed(outcome: Outcome) -> str:
    name = outcome.option if outcome.option.isupper() else f"--{outcome.option}"
    return f"{name} {outcome.value}".rstrip()


def _tell(outcomes: list[Outcome], stream: TextIO) -> None:
    for kind, heading in HEADINGS.items():
        told = [outcome for outcome in outcomes if outcome.kind == kind]
        if told:
            print(f"\n{heading}:", file=stream)
            width = min(48, max(len(_typed(outcome)) for outcome in told))
            print("\n".join(f"  {_typed(outcome):<{width}}  {outcome.text}" for outcome in told), file=stream)


# how the states are shared out


def _sharding(command: Command) -> tuple[str, str]:
    """Return deepspeed.config and where it is from: the run's own file where it can stay as it is, else the one of ds_configs/ with its stage and offload."""
    options, launcher = command.options, command.launcher
    section = launcher.get("deepspeed_config") if isinstance(launcher.get("deepspeed_config"), dict) else {}
    file = options.get("deepspeed") or launcher.get("deepspeed_config_file") or section.get("deepspeed_config_file")
    if file:
        return _of_file(file)
    if "zero_stage" in section or "zero_stage" in launcher:
        chosen = {**section, **launcher}
        offloads = "none" != (chosen.get("offload_optimizer_device") or "none") or "none" != (chosen.get("offload_param_device") or "none")
        return _named(int(chosen["zero_stage"]), offloads), "of accelerate's file"
    if str(options.get("fsdp") or False).lower() != "false" or launcher.get("use_fsdp") or launcher.get("distributed_type") == "FSDP":
        return _of_fsdp(options, launcher), "shards as FSDP does"
    return "zero3", "TRL has whole copies without DeepSpeed or FSDP; zero1 is faster where they fit, which kto-ds plan tells"


def _of_fsdp(options: Values, launcher: Values) -> str:
    """Return the one of ds_configs/ that keeps weights sharded as FSDP is told to: by --fsdp, its --fsdp_config, accelerate's options or accelerate's file."""
    own = typed(options.get("fsdp_config"), "text")
    if isinstance(own, str):
        try:
            own = read_yaml(Path(own))  # JSON is YAML
        except UserError as error:
            raise UserError(f"--fsdp_config {excerpt(own)} cannot be used: {error.what}", where="the command", remedy="give the file, or leave the option out") from error
    sections = [section for section in (launcher.get("fsdp_config"), launcher, own) if isinstance(section, dict)]
    chosen = {key.removeprefix("fsdp_"): str(value).lower() for section in sections for key, value in section.items()}
    given = options.get("fsdp")
    words = " ".join(map(str, given if isinstance(given, list) else [given])).lower().split()
    # A number is the place among torch's strategies: 2 is SHARD_GRAD_OP, 5 HYBRID_SHARD_ZERO2.
    strategies = {"shard_grad_op", "hybrid_shard_zero2"}
    keeps_weights = strategies & set(words) or {chosen.get("sharding_strategy"), chosen.get("reshard_after_forward")} & {*strategies, "false", "2", "5"}
    offloads = "offload" in words or "true" in (chosen.get("offload_params"), chosen.get("cpu_offload"))
    return _named(2 if keeps_weights else 3, offloads)


def _of_file(file: object) -> tuple[str, str]:
    if isinstance(file, str):
        try:
            raw = read_deepspeed_config(file)
            check_zero_section(raw.get("zero_optimization", {}), where=file)
            return file, "the file as it is; what the run config decides is auto in it"
        except UserError as error:
            reason = error.what
    else:
        reason = "deepspeed.config names a file"
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8")) if isinstance(file, str) else dict(file)
        zero = content["zero_optimization"]
        stage, offloads = int(zero["stage"]), any(dict(zero.get(key) or {}).get("device", "none") != "none" for key in ("offload_optimizer", "offload_param"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--deepspeed {excerpt(file)} cannot be used: {reason}", where="the command", remedy="give a JSON file with zero_optimization and its stage") from error
    name = _named(stage, offloads)
    return name, f"has its stage{' and offload' if offloads else ''}; the file itself is not taken: {reason}"


def _named(stage: int, offloads: bool) -> str:
    return "zero3_offload" if offloads else f"zero{min(max(stage, 0), 3)}"
