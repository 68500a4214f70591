"""Sub-commands and overrides: `kto-ds <command> --config RUN.yaml [--section.key value ...]`."""

import argparse
import difflib
import importlib
import json
import os
import re
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsError

from kto_ds.cli_apart import APART, names_runs, page_arguments, sweep_options
from kto_ds.config import RunConfig
from kto_ds.config_text import explain, known_keys, nearest_key, read_yaml, write_yaml
from kto_ds.early import STOPPING, leave, leave_on_signals
from kto_ds.errors import EXIT_OK, EXIT_PREEMPTED, EXIT_UNEXPECTED, KtoError, Preempted, UserError
from kto_ds.redaction import redact
from kto_ds.streams import survive

COMMANDS = {
    "plan": "parameters, memory, disk and time of the run on a kind of GPU, before anything is started",
    "doctor": "what would go wrong with a run on these machines (start it with deepspeed for several ranks)",
    "prepare": "rows -> tokens, KL groups -> dataset artefact",
    "inspect": "what lies in the artefacts: examples, pairs, reference log-probs, and how a step is packed",
    "precompute-ref": "reference model -> log-probs on disk (start it with deepspeed for several ranks)",
    "train": "KTO under DeepSpeed (start it with deepspeed for several ranks)",
    "evaluate": "score the evaluation rows with an exported model",
    "export": "checkpoint -> Hugging Face folder",
    "chat": "talk to the policy beside the reference, with the reward of each answer",
    "verify": "every digest of the run's artefacts and checkpoints",
    "report": "how a run stands, as text, pictures and a page; kto-ds report RUN [RUN ...] needs no config, and compares runs",
    "import-trl": "a command or YAML file of TRL's KTO script -> run.yaml, with a word on every option",
    "sweep": "trials of a run with several values of some keys, compared by a metric; all share one dataset and one reference",
    "demo": "the whole pipeline on a small task that a program can check",
}
SINGLE_PROCESS = ("plan", "prepare", "inspect", "export", "chat", "verify", "report", "sweep", "import-trl", "demo")
# Options of a command besides those of the config: name -> default, help.
OWN_OPTIONS = {
    "plan": {
        "gpu": ("H100", "kind of GPU, such as A100-80, H100, H200 or B200"),
        "num_gpus": (0, "number of GPUs, and exit 2 where the run does not fit on them; 0: 8, 16, 32 and 64"),
        "plot": (None, "file for a picture (PNG) of the memory by part"),
        "json": (False, "print the plan as JSON"),
    },
    "doctor": {
        "quick": (False, "leave out the dry run: a step, a save and a resume with the run's own model"),
        "timeout_seconds": (120, "longest wait for all ranks to come, and for each kind of collective"),
    },
    "inspect": {
        "split": ("train", "split of the dataset artefact"),
        "num_rows": (5, "examples of each label that are shown"),
        "step": (1, "optimizer step whose micro-batches are shown"),
        "num_ranks": (1, "ranks that the step is shared out to"),
    },
    "train": {
        "profile": (False, "write a torch profiler trace of steps 3 to 5 to <output_dir>/profile"),
        "accept_changes": (False, "go on from the checkpoint although optim or the number of steps has changed since"),
        "max_wall_time": (None, "save and stop before so much time has passed since the start: seconds, or [D-]HH:MM:SS"),
    },
    "export": {
        "checkpoint": ("latest", "latest, best (of checkpoint.metric_for_best_model) or step-N"),
        "merge": (False, "of a run with model.lora: write the whole model with the adapters in its weights, to <output_dir>/merged"),
        "push_to_hub": (None, "then upload the export to this repository of the Hugging Face hub, user/model"),
        "private": (False, "of --push-to-hub: only you see a repository that is made; so it is without this option too"),
        "public": (False, "of --push-to-hub: everybody sees it"),
    },
    "chat": {
        "checkpoint": (None, "latest, best (of checkpoint.metric_for_best_model) or step-N, instead of the export"),
        "policy_only": (False, "leave the reference out: half of the memory where it shares no weights with the policy, and no rewards"),
        "max_new_tokens": (256, "tokens of the longest answer"),
        "temperature": (0.7, "0: always the likeliest token"),
        "top_p": (0.9, "draw from the likeliest tokens that have this probability together"),
    },
    "report": {"wandb_sync": (False, "upload metrics.jsonl to wandb, as the run of its own that training began, if it did")},
    "sweep": {
        "values": (None, "YAML file with a list of values for each key: loss.beta: [0.05, 0.1]; or give them as --loss.beta 0.05,0.1"),
        "num_trials": (0, "so many of the combinations, chosen by seed; 0: all"),
        "metric": (None, "what trials are compared by, such as eval/rewards/margins; default: reward AUC of the first evaluation split"),
        "num_gpus": (0, "ranks of a trial; 0: NUM_RANKS, or one for each visible GPU, or 1"),
        "dry_run": (False, "list the trials and stop"),
        "print_commands": (False, "print the command of each unfinished trial, one a line, and stop"),
    },
}
NOT_SWEPT = {"model.lora.target_modules"}  # by the command line, where commas part the entries of one list
OWN = "own "  # ahead of their names while the config is parsed


class _Settings(RunConfig, BaseSettings):
    """RunConfig from the YAML file below and command-line options above; the environment is not read."""

    @classmethod
    def settings_customise_sources(cls, settings_cls, init_settings, env_settings, dotenv_settings, file_secret_settings):
        return (init_settings,)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        hint = ""
        if message.startswith("unrecognized arguments: --") and self.prog.split()[-1] not in APART:
            key = message.removeprefix("unrecognized arguments: --").split()[0].split("=")[0]
            options = [part.split("=")[0] for part in message.split() if part.startswith("--")]
            message = f"unrecognized arguments: {' '.join(options)}"  # without their values, which may be secrets
            hint = _own_option_hint(self.prog.split()[-1], key) or nearest_key(key, as_option=True)
        raise UserError(message, where="command line", remedy=hint or f"{self.prog} --help lists the options")


def _own_option_hint(command: str, option: str) -> str:
    """Return a remedy where `option` is, or is nearly, one of those that a command has beside the config keys."""
    for owner, options in OWN_OPTIONS.items():
        if option.replace("-", "_") in options and owner != command:
            return f"--{option} is an option of kto-ds {owner}"
    close = difflib.get_close_matches(option, OWN_OPTIONS.get(command, {}), n=1)
    return f"did you mean --{close[0]}?" if close else ""


def program() -> None:
    """The `kto-ds` program: run the command line and end the process with the exit code; see errors.py for what the codes mean."""
    leave_on_signals()
    survive()
    try:
        exit_code = main(sys.argv[1:])
        sys.stdout.flush()
        sys.stderr.flush()
    except SystemExit as ended:  # --help
        exit_code = EXIT_UNEXPECTED if _reader_left() else ended.code
    except BrokenPipeError:
        exit_code = EXIT_UNEXPECTED
    except KeyboardInterrupt:  # while it reported an error, after rank 0 did
        exit_code = EXIT_PREEMPTED
    for signum in STOPPING:  # from which an interpreter on its way out takes the handlers, and what is done would look killed
        signal.signal(signum, signal.SIG_IGN)
    if exit_code:
        # The threads of a process group that was not left can abort the interpreter on its way out, with an exit code of their own.
        os._exit(exit_code)


def _unwind_on_signals() -> None:
    """From here on a signal unwinds what is under way; a run that has something to save hears it in its own way. What is no program of its own stays as it is."""
    for signum in STOPPING:
        if signal.getsignal(signum) is leave:
            signal.signal(signum, _interrupt)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt(signal.Signals(signum).name)


def main(argv: list[str]) -> int:
    """Run one command, leave the process group and return the exit code."""
    exit_code = run(argv)
    collectives = sys.modules.get("kto_ds.runtime.collectives")
    # After an error other ranks may sit in a collective, where leaving in an orderly way would wait for them.
    if collectives and exit_code == EXIT_OK:
        collectives.stop()
    return exit_code


def run(argv: list[str]) -> int:
    """Run one command and return its exit code. A process may run several; all ranks then run the same ones."""
    try:
        command, options = _split(argv)
        _run(command, options)
        return EXIT_OK
    except KtoError as error:
        if not isinstance(error, Preempted):  # which rank 0 raises too, after it has closed its files
            _let_rank_0_speak()
        if not error.is_told:
            _say(f"kto-ds: {error}" if isinstance(error, Preempted) else f"kto-ds: error: {error}")
        return error.exit_code
    except KeyboardInterrupt as signalled:
        if os.environ.get("RANK", "0") == "0":
            _say(f"kto-ds: {signalled or 'SIGINT'}: stopped; start the same command again")
        return EXIT_PREEMPTED
    except Exception as error:
        if not (isinstance(error, BrokenPipeError) and _reader_left()):
            _let_rank_0_speak()
            print(redact(traceback.format_exc()), file=sys.stderr, end="", flush=True)
        return EXIT_UNEXPECTED


def _reader_left() -> bool:
    """Whether nobody reads the output any more, as in `kto-ds inspect ... | head`: an end, but no mistake to report."""
    # A flush would tell only as long as something is left to write.
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _split(argv: list[str]) -> tuple[str, list[str]]:
    # The deepspeed launcher puts --local_rank=N before the command; the environment says the same.
    argv = [argument for argument in argv if not argument.startswith("--local_rank=") and not argument.startswith("--local-rank=")]
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: kto-ds <command> --config RUN.yaml [--section.key value ...]\n\ncommands:")
        print("\n".join(f"  {name:<15} {text}" for name, text in COMMANDS.items()))
        print("\nkto-ds <command> --help lists every option.")
        raise SystemExit(EXIT_OK)
    if argv[0] not in COMMANDS:
        raise UserError(f"unknown command {argv[0]!r}", where="command line", remedy=f"use one of {', '.join(COMMANDS)}")
    return argv[0], argv[1:]


def _run(command: str, options: list[str]) -> None:
    parser = _Parser(prog=f"kto-ds {command}", description=COMMANDS[command])
    if command == "report" and names_runs(options):
        load_stage("run_page")(**page_arguments(parser, options))
        return
    if command in APART:
        load_stage(command)(**APART[command](parser, options))
        return
    more = {}
    if command == "sweep":
        sorted_out = sweep_options(options, {name: default for name, (default, _) in OWN_OPTIONS[command].items()}, set(known_keys()) - NOT_SWEPT)
        options, more = [*sorted_out.base, *sorted_out.own], {"base": sorted_out.base, "listed": sorted_out.values}
    config, given = read_config(command, options)
    if given.print_config:
        write_yaml(config, sys.stdout)
        return
    if command in SINGLE_PROCESS and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{command} runs as one process", where="command line", remedy=f"start it as kto-ds {command}, without deepspeed")
    load_stage(command)(config, **{name: vars(given)[name] for name in OWN_OPTIONS.get(command, {})}, **more)


def load_stage(command: str) -> Callable:
    """Import a stage only when it runs: torch and DeepSpeed take seconds, and must not delay a message about a config key."""
    _quiet_libraries()
    if "DS_ACCELERATOR" not in os.environ:
        import torch

        if not torch.cuda.is_available():
            os.environ["DS_ACCELERATOR"] = "cpu"
    module = importlib.import_module(f"kto_ds.stages.{command.replace('-', '_')}")
    _unwind_on_signals()
    return module.main


def _quiet_libraries() -> None:
    """Keep the libraries' deprecation notices and per-rank progress bars off the console."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if os.environ.get("RANK", "0") != "0":
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def read_config(command: str, options: list[str]) -> tuple[RunConfig, argparse.Namespace]:
    """Return (resolved config, the options that are not part of it) from `--config RUN.yaml --section.key value ...`."""
    # An option of ours goes before a section of the config of the same name, whose keys can still be given one by one.
    parser = _Parser(prog=f"kto-ds {command}", description=COMMANDS[command], allow_abbrev=False, conflict_handler="resolve")
    parser.add_argument("--config", type=Path, required=True, metavar="RUN.yaml", help="the run; options below override it")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    overrides = CliSettingsSource(_Settings, root_parser=parser, cli_parse_none_str="null", cli_hide_none_type=True, cli_enforce_required=False)
    for name, (default, text) in OWN_OPTIONS.get(command, {}).items():
        kind = {"action": "store_true"} if default is False else {"type": str if default is None else type(default), "default": default}
        parser.add_argument(*_spellings(name), dest=f"{OWN}{name}", **kind, help=f"{text} (default: {default})")
    parsed = parser.parse_args(options)
    values = read_yaml(parsed.config)
    own = {"--config", "--print-config", *(spelling for name in OWN_OPTIONS.get(command, {}) for spelling in _spellings(name))}
    given = {option[2:].split("=")[0] for option in options if option.startswith("--") and option.split("=")[0] not in own}
    try:
        settings = _Settings(_cli_settings_source=overrides(parsed_args=parsed), **values)
        config = RunConfig.model_validate(settings.model_dump())
    except ValidationError as error:
        raise explain(error, where=f"{parsed.config} and command line" if given else str(parsed.config), options=given) from error
    except SettingsError as error:
        key = re.search(r'for (?:field ")?([\w.]+)', str(error))
        place = f" ({error.__cause__})" if isinstance(error.__cause__, json.JSONDecodeError) else ""
        what = f"{key[1] if key else 'an option'}: expected a section or a mapping in JSON{place}"
        raise UserError(what, where="command line", remedy="write it in quotes as JSON, such as --report.wandb '{\"mode\": \"offline\"}'") from error
    return config, argparse.Namespace(**{name.removeprefix(OWN): value for name, value in vars(parsed).items()})


def _spellings(name: str) -> list[str]:
    """Return the ways to write an option that is not part of the config: --a_b, and --a-b as most programs have it."""
    return [f"--{name}", *([f"--{name.replace('_', '-')}"] if "_" in name else [])]


def _let_rank_0_speak() -> None:
    """All ranks meet the same mistakes; a rank other than 0 speaks only if rank 0 has not ended the job by then."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(5)


def _say(message: str) -> None:
    rank = os.environ.get("RANK", "0")
    message = message if rank == "0" else f"[rank {rank}] {message}"
    # Keys, paths and the parser's words about them come from files: none may write control codes to a terminal.
    shown = "".join(character if character == "\n" or character.isprintable() else ascii(character)[1:-1] for character in redact(message))
    print(shown, file=sys.stderr, flush=True)
