"""A command line or a YAML file of TRL's KTO script as {option: value}, and what its launcher says of the GPUs. Nothing is judged here."""

import json
import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from kto_ds.errors import UserError, excerpt

Values = dict[str, object]
Kind = Literal["flag", "number", "text"]
ReadYaml = Callable[[Path], dict]

GIVE_ONE = "give a command as it is typed, behind --: kto-ds import-trl -- trl kto --model_name_or_path ..., or a file with it, or TRL's YAML file"
# Of accelerate launch, torchrun and deepspeed; `trl kto` takes those of the first among its own.
LAUNCHER_OPTIONS = frozenset("""
    num_processes num_machines machine_rank main_process_ip main_process_port mixed_precision multi_gpu gpu_ids accelerate_config config_file use_deepspeed use_fsdp
    deepspeed_config_file zero_stage zero3_init_flag offload_optimizer_device offload_param_device gradient_clipping num_cpu_threads_per_process dynamo_backend
    nproc_per_node nnodes node_rank master_addr master_port rdzv_backend rdzv_endpoint rdzv_id standalone num_gpus num_nodes hostfile include module
""".split())  # fmt: skip
# The files that TRL brings for --accelerate_config; each but single_gpu has 8 processes.
ACCELERATE_CONFIGS = {
    "single_gpu": {"num_processes": 1, "distributed_type": "NO"}, "multi_gpu": {"num_processes": 8, "distributed_type": "MULTI_GPU"},
    "zero1": {"num_processes": 8, "distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 1}},
    "zero2": {"num_processes": 8, "distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}},
    "zero3": {"num_processes": 8, "distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3}},
    "fsdp1": {"num_processes": 8, "distributed_type": "FSDP"}, "fsdp2": {"num_processes": 8, "distributed_type": "FSDP"},
}  # fmt: skip
OTHER_TRAINERS = frozenset({"distillation", "dpo", "grpo", "reward", "rloo", "sft"})  # of TRL's own CLI


class Command(NamedTuple):
    options: Values  # of the script; from the command line as text, a list of texts, or True for a flag; the line goes before the YAML file
    launcher: Values  # of accelerate, torchrun or deepspeed, the content of accelerate's file included
    variables: dict[str, str]


def read_file(path: Path, read_yaml: ReadYaml) -> Command:
    """Return the command in a shell script, or that stands for a YAML file of TRL's."""
    if path.suffix in (".yaml", ".yml"):
        return read_command(["trl", "kto", "--config", str(path)], read_yaml)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error}", where=str(path), remedy=GIVE_ONE) from error
    found = [command for command in _commands(text, path) if _script_place(command) is not None]
    if len(found) != 1:
        raise UserError(f"expected one command that starts TRL's KTO, found {len(found)}", where=str(path), remedy=GIVE_ONE)
    return read_command(found[0], read_yaml)


def read_command(words: list[str], read_yaml: ReadYaml) -> Command:
    """Return what the words of a command line say: `trl kto ...`, or `accelerate launch ... kto.py ...` and its like, or options alone."""
    if unset := next((word for word in words if re.search(r"\$\w|\$\{|\$\(|`", word)), None):
        raise UserError(f"{excerpt(unset)} is for a shell to fill in", where="the command", remedy="write its value in its place")
    place = _script_place(words)
    if place is None:
        if not words or not words[0].startswith("--"):
            raise UserError("starts no KTO script of TRL's", where="the command", remedy=GIVE_ONE)
        place = -1
    variables = dict(word.split("=", 1) for word in words[: max(place, 0)] if re.fullmatch(r"[A-Z_]+=.*", word))
    launcher = _options(words[: max(place, 0)])
    options = _options(words[place + 1 :])
    if isinstance(file := options.pop("config", None), str):
        values = read_yaml(Path(file))
        variables = {**{name: str(value) for name, value in (values.pop("env", None) or {}).items()}, **variables}
        options = {**values, **options}
    launcher |= {name: options.pop(name) for name in LAUNCHER_OPTIONS & options.keys()}
    return Command(options, launcher | _accelerate_file(launcher, read_yaml), variables)


def _commands(text: str, path: Path) -> Iterator[list[str]]:
    """Yield the words of every command of a shell script."""
    for line in text.replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a quote that another line closes: no command of one line
            continue
        command: list[str] = []
        for word in [*words, ";"]:
            if word in ("&&", "||", ";", "|", "&"):
                yield command
                command = []
            else:
                command.append(word)


def _script_place(words: list[str]) -> int | None:
    """Return where the script stands in a command: behind it come its options. UserError for another trainer of TRL's."""
    for place, word in enumerate(words):
        name = os.path.basename(word)
        following = words[place + 1] if place + 1 < len(words) else ""
        if name == "trl" and following in OTHER_TRAINERS:
            raise UserError(f"trl {excerpt(following)} is not KTO", where="the command", remedy="only trl kto has a counterpart")
        if name == "trl" and following == "kto":
            return place + 1
        if word.startswith("--"):
            continue
        if "kto" in name and name.endswith(".py") or word == "trl.scripts.kto":
            return place
    return None


def _options(words: list[str]) -> Values:
    """Return --name value, --name=value, --flag, --no_flag and --name several values as {name: value}."""
    found: Values = {}
    name = None
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, has_value, value = word[2:].partition("=")
            name = name.replace("-", "_")
            if name.startswith("no_") and not has_value:
                found[name.removeprefix("no_")] = False
                name = None
            else:
                found[name] = value if has_value else True
        elif re.fullmatch(r"-[A-Za-z]+", word):  # a short option, as -m: no value of the one before it
            name = None
        elif name is not None:
            earlier = found[name]
            found[name] = word if earlier is True else [*(earlier if isinstance(earlier, list) else [earlier]), word]
    return found


def _accelerate_file(launcher: Values, read_yaml: ReadYaml) -> Values:
    """Return the content of the file that --config_file or --accelerate_config names; what stands on the command line goes before it."""
    name = launcher.get("accelerate_config") or launcher.get("config_file")
    if not isinstance(name, str):
        return {}
    content = ACCELERATE_CONFIGS[name] if name in ACCELERATE_CONFIGS and not Path(name).is_file() else read_yaml(Path(name))
    return {key: value for key, value in content.items() if key not in launcher}


def count_gpus(command: Command) -> tuple[int | None, str]:
    """Return how many GPUs the launcher takes in all, and what says so; None where nothing does."""
    launcher = command.launcher
    for name, nodes in (("num_processes", None), ("nproc_per_node", "nnodes"), ("num_gpus", "num_nodes")):
        if (count := _integer(launcher.get(name))) is not None:
            hosts = _integer(launcher.get(nodes)) or 1 if nodes else 1
            return count * hosts, f"{name} {count}" + (f" x {nodes} {hosts}" if hosts > 1 else "")
    visible = command.variables.get("CUDA_VISIBLE_DEVICES")
    return (len(visible.split(",")), "CUDA_VISIBLE_DEVICES") if visible else (None, "")


def _integer(value: object) -> int | None:
    return _number(int, str(value))


def typed(value: object, kind: Kind) -> object:
    """Return the value that TRL's parser would make of a text: a flag as it takes them, a number, null, JSON, or the text."""
    if isinstance(value, list):
        return [typed(one, kind) for one in value]
    if not isinstance(value, str):
        return value
    word = value.lower()
    if kind == "flag" and word in ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0"):
        return word in ("yes", "true", "t", "y", "1")
    if word in ("null", "none"):
        return None
    if kind == "number":
        return next((number for number in (_number(int, value), _number(float, value)) if number is not None), value)
    try:
        return json.loads(value) if value.startswith(("{", "[")) else value
    except ValueError:
        return value


def _number(read: Callable[[str], float], text: str) -> float | None:
    try:
        return read(text)
    except ValueError:
        return None
