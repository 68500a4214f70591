"""Command lines that are not a config with overrides: those of demo, import-trl and report RUN, and the lists of values of sweep."""

from argparse import ArgumentParser
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple


def demo_arguments(parser: ArgumentParser, options: list[str]) -> dict:
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="folder of the run")
    parser.add_argument("--num_ranks", type=int, default=2, help="ranks that deepspeed starts")
    return vars(parser.parse_args(options))


def import_arguments(parser: ArgumentParser, options: list[str]) -> dict:
    """Return the arguments of import-trl; what stands behind -- is the command that is read, and none of our options."""
    own, words = (options[: options.index("--")], options[options.index("--") + 1 :]) if "--" in options else (options, [])
    parser.add_argument("file", type=Path, nargs="?", help="shell script with one command that starts TRL's KTO, or TRL's YAML file; or give the command behind --")
    parser.add_argument("--out", type=Path, help="file for the config; default: print it")
    parser.add_argument("--num_gpus", "--num-gpus", type=int, default=0, help="GPUs that TRL ran on, for the size of its batch; default: as the command says")
    return {**vars(parser.parse_args(own)), "words": words}


def names_runs(options: list[str]) -> bool:
    """Whether `kto-ds report` is given runs by their folders, and no config."""
    return "--config" not in {option.partition("=")[0] for option in options} and not all(option.startswith("-") for option in options)


def page_arguments(parser: ArgumentParser, options: list[str]) -> dict:
    parser.add_argument("paths", type=Path, nargs="+", metavar="RUN", help="folder of a run, or a metrics.jsonl")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page; default report.html in the folder of the first run with metrics")
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="also draw pictures of every run, into this folder")
    return vars(parser.parse_args(options))


# What demo and import-trl do with what is behind their names; they have no config.
APART = {"demo": demo_arguments, "import-trl": import_arguments}


class SweepOptions(NamedTuple):
    """The options of sweep: `base` for every trial alike, `own` of sweep itself, and the values of the keys that have several."""

    base: list[str]
    own: list[str]
    values: dict[str, list[str]]


def sweep_options(options: list[str], own: dict[str, object], keys: Collection[str]) -> SweepOptions:
    """Sort the options of sweep. `own` has the default of each of its own, False for flags; commas part the values of `keys` of the config, but not in JSON."""
    found = SweepOptions([], [], {})
    rest = list(options)
    while rest:
        option = rest.pop(0)
        key, has_value, value = option.removeprefix("--").partition("=")
        name = key.replace("-", "_")
        words = [option]
        if option.startswith("--") and not has_value and own.get(name) is not False and rest and not rest[0].startswith("--"):
            words.append(value := rest.pop(0))
        if key in keys and "," in value and not value.lstrip().startswith(("[", "{")):
            found.values[key] = [part.strip() for part in value.split(",")]
        else:
            (found.own if name in own else found.base).extend(words)
    return found
