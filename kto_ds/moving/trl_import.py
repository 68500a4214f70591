"""From a command of TRL's to settings of ours, with a word on every option. Pure: what has to be looked up is handed in."""

import difflib
from typing import Literal, NamedTuple

from kto_ds.errors import UserError, excerpt
from kto_ds.moving.trl_command import Command, Values, typed
from kto_ds.moving.trl_options import EARLIER, OPTIONS, RENAMED
from kto_ds.moving.trl_rules import Given
from kto_ds.redaction import HIDDEN, SECRET_OPTION

Kind = Literal["became", "as it is", "no counterpart", "not given"]
KNOWN = {**OPTIONS, **EARLIER}
# Of model_init_kwargs: what its keys are as options; the script lets them go before those.
INIT_KWARGS = {"dtype": "dtype", "torch_dtype": "dtype", "revision": "model_revision", "attn_implementation": "attn_implementation", "trust_remote_code": "trust_remote_code"}
# Of wandb's client, which TRL leaves them to.
VARIABLES = {"WANDB_PROJECT": "report.wandb.project", "WANDB_MODE": "report.wandb.mode"}
WANDB_MODES = {"dryrun": "offline", "run": "online", "shared": "online"}  # wandb's other names of modes, and what is nearest here


class Outcome(NamedTuple):
    option: str
    value: str
    kind: Kind
    text: str


class Translation(NamedTuple):
    settings: Values  # by dotted key of ours; only where they are not what kto_ds has anyway
    outcomes: list[Outcome]


def translate(command: Command, *, num_gpus: int, sharding: tuple[str, str], defaults: Values) -> Translation:
    """Return what the command becomes. `sharding` is a deepspeed.config and where it is from, `defaults` are ours by dotted key. UserError for a value that TRL would refuse too."""
    given, outcomes = _known_options(command)
    values = {name: option.default for name, option in KNOWN.items()} | given
    settings: Values = {}
    for name, option in KNOWN.items():
        verdict = option.rule(Given(values[name], values, name in given, num_gpus, sharding))
        changed = {key: value for key, value in verdict.settings.items() if key not in defaults or defaults[key] != value}
        settings |= changed
        kind = _kind(name in given, bool(changed), verdict.has_counterpart)
        if kind is not None:
            became = [f"{key}: {_shown(value, key)}" for key, value in (changed or verdict.settings).items()]
            outcomes.append(Outcome(name, _shown(values[name], name), kind, "; ".join([*became, *([verdict.why] if verdict.why else [])])))
    if "report.wandb.mode" in settings:
        told = {name: value for name in VARIABLES if (value := command.variables.get(name))}
        found = {name: WANDB_MODES.get(value, value) if name == "WANDB_MODE" else value for name, value in told.items()}
        settings |= {VARIABLES[name]: value for name, value in found.items()}
        outcomes += [Outcome(name, told[name], "became", f"{VARIABLES[name]}: {value}") for name, value in found.items()]
    return Translation({key: value for key, value in settings.items() if key not in defaults or defaults[key] != value}, outcomes)


def _kind(is_given: bool, is_changed: bool, has_counterpart: bool) -> Kind | None:
    """Return under which heading an option is told; None for one that is not given and needs no word."""
    if not is_given:
        return "not given" if is_changed or not has_counterpart else None
    if not has_counterpart:
        return "no counterpart"
    return "became" if is_changed else "as it is"


def _known_options(command: Command) -> tuple[Values, list[Outcome]]:
    """Return the options that TRL's script has, under their present names, and a word on those that it has not."""
    given: Values = {}
    outcomes = [Outcome(name, _shown(value, name), "as it is", "of the launcher: launch/ has ours") for name, value in command.launcher.items() if not isinstance(value, dict)]
    for written, value in command.options.items():
        name = RENAMED.get(written, written)
        if name not in KNOWN:
            close = difflib.get_close_matches(name, KNOWN, n=1)
            outcomes.append(Outcome(written, _shown(value, written), "no counterpart", "is no option of TRL's KTO script (1.16)" + (f"; did you mean --{close[0]}?" if close else "")))
            continue
        given[name] = _checked(name, typed(value, KNOWN[name].kind))
    if isinstance(kwargs := given.get("model_init_kwargs"), dict):
        given |= {INIT_KWARGS[name]: value for name, value in kwargs.items() if name in INIT_KWARGS}
        given["model_init_kwargs"] = {name: value for name, value in kwargs.items() if name not in INIT_KWARGS}
    return given, outcomes


def _checked(name: str, value: object) -> object:
    """Return the value if it is of the kind that the option takes; null goes for most."""
    kind = KNOWN[name].kind
    if kind == "flag" and not (value is None or isinstance(value, bool)):
        raise UserError(f"--{name}: expected true or false, found {excerpt(value)}", where="the command", remedy="correct it, or leave it out")
    may_be_null = KNOWN[name].default is None or name == "max_length"
    if kind == "number" and not (value is None and may_be_null or isinstance(value, (int, float)) and not isinstance(value, bool)):
        raise UserError(f"--{name}: expected a number, found {excerpt(value)}", where="the command", remedy="correct it, or leave it out")
    return value


def _shown(value: object, name: str) -> str:
    """Return a value as it is told; that of a name such as use_auth_token stays untold."""
    value = _without_secrets(value, name)
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _without_secrets(value: object, name: str) -> object:
    if isinstance(value, dict):
        return {key: _without_secrets(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_secrets(inner, name) for inner in value]
    return value if value is None or isinstance(value, bool) or not SECRET_OPTION.fullmatch(f"--{name}") else HIDDEN
