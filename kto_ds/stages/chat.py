"""A chat at the terminal: the policy, from an export or a checkpoint, beside the reference, with the reward of each answer."""

import io
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from rich.console import Console
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from kto_ds.config import ModelConfig, RunConfig
from kto_ds.errors import UserError, excerpt
from kto_ds.model.load import load_plain
from kto_ds.model.lora import add_adapters, require_lora_served
from kto_ds.model.speaker import Speaker, Way, answer, logp_of
from kto_ds.model.support import DTYPES, longest_servable, read_model_config
from kto_ds.report.chat_view import Reward, hearing, show_rewards, tell
from kto_ds.runtime.collectives import World, start
from kto_ds.stages.identity import reference_model, require_same_tokenizer, run_tokenizer, tokenizer_identity, weights_of_config
from kto_ds.stages.samples import stop_ids_of
from kto_ds.stages.trained import choose_checkpoint, exported_model, put_weights, require_same_config, trained_weights

EXPORT_FIRST = "run kto-ds export --config RUN.yaml, give --checkpoint latest, or set eval.path"
POLICY, REFERENCE = "policy", "reference"
MAX_SEED = 2**32 - 1  # as of a run
HELP = """\
  /reset        forget the conversation
  /undo         take the last question and its answers back
  /system TEXT  begin anew, with this system message; without a text with none
  /seed N       draw the next answers from this seed, below 2**32
  /help         this list
  /quit         leave, as Ctrl-D does; Ctrl-C breaks an answer off"""

Messages = list[dict[str, str]]


class Chat(NamedTuple):
    """Who speaks, and how."""

    speakers: dict[str, Speaker]  # the policy, and the reference if it is there
    tokenizer: PreTrainedTokenizerBase
    template_options: dict
    way: Way
    beta: float
    positions: int | None  # that all of the models have
    console: Console


def main(
    config: RunConfig, checkpoint: str | None = None, policy_only: bool = False, max_new_tokens: int = 256, temperature: float = 0.7, top_p: float = 0.9
) -> None:
    """`checkpoint` is latest, best or step-N; without one the export speaks."""
    for name, value, fits in (("max_new_tokens", max_new_tokens, max_new_tokens > 0), ("temperature", temperature, temperature >= 0), ("top_p", top_p, 0 < top_p <= 1)):
        if not fits:
            raise UserError(f"{value} is out of range", where=f"--{name}", remedy="give a number above 0, top_p at most 1; a temperature of 0 takes the likeliest token always")
    tokenizer, console = run_tokenizer(config), Console()
    way = Way(max_new_tokens, temperature, top_p)
    try:
        speakers, models = _speakers(config, checkpoint, policy_only, tokenizer, start(timeout_seconds=config.train.setup_timeout_seconds))
    except torch.OutOfMemoryError as error:
        remedy = "give --policy_only to leave the reference out, or let this process see more GPUs (CUDA_VISIBLE_DEVICES)"
        raise UserError(f"the models do not fit into the device's memory: {str(error).splitlines()[0]}", where="kto-ds chat", remedy=remedy) from error
    for name, model in zip(speakers, models):
        tell(console, f"{name}: {model}")
    if not tokenizer.chat_template:
        tell(console, "the tokenizer has no chat template: each line is a prompt as it stands, and by itself", "dim")
    tell(console, "/help lists what else there is to type", "dim")
    positions = min((limit for speaker in speakers.values() if (limit := longest_servable(speaker.lm.config))), default=None)
    _talk(Chat(speakers, tokenizer, config.data.chat_template_kwargs, way, config.loss.beta, positions, console), config.seed)


# the models


def _speakers(config: RunConfig, checkpoint: str | None, policy_only: bool, tokenizer: PreTrainedTokenizerBase, world: World) -> tuple[dict[str, Speaker], list[str]]:
    """Return the models by name, and in words what they are. Adapters and the reference below them share their weights."""
    if checkpoint is None:
        path, model, adapter = exported_model(config, remedy=EXPORT_FIRST)
        require_same_tokenizer(model, tokenizer_identity(tokenizer), where="eval.path")
        model_config = _served(model, world)
        lm, has_adapters = load_plain(model, model_config, device_map=_device_map(world), adapter=adapter and adapter.folder), adapter is not None
    else:
        chosen = choose_checkpoint(config.output_dir / "checkpoints", checkpoint, world)
        require_same_config(config, weights_of_config(config.loss, chosen.manifest["config"]), chosen)
        model, has_adapters = config.model.model_copy(update={"lora": None}), config.model.lora is not None
        path, model_config = f"step {chosen.step} of {config.output_dir}", _served(config.model, world)
        lm = load_plain(model, model_config, device_map=_device_map(world))
        if has_adapters:
            add_adapters(lm, config.model.lora, seed=config.seed)
        put_weights(lm, trained_weights(chosen, log=io.StringIO()), DTYPES[model.dtype])
    speakers, models = {POLICY: Speaker(lm, stop_ids_of(model, tokenizer))}, [path]
    if not policy_only:
        section = reference_model(config)
        require_same_tokenizer(section, tokenizer_identity(tokenizer), where="reference.path")
        shares = has_adapters and section == model
        below = lm if shares else load_plain(section, _served(section, world), device_map=_device_map(world))
        speakers[REFERENCE] = Speaker(below, stop_ids_of(section, tokenizer), is_below_adapters=shares)
        models.append(section.path)
    return speakers, models


def _served(model: ModelConfig, world: World) -> PretrainedConfig:
    model_config = read_model_config(model)
    require_lora_served(model, model_config, world.device)
    return model_config


def _device_map(world: World) -> dict | str:
    """Return where a model goes: on one device, or over all GPUs that this process sees."""
    return "auto" if world.device.type == "cuda" and torch.cuda.device_count() > 1 else {"": world.device}


# the conversation


def _talk(chat: Chat, seed: int) -> None:
    """Answer line by line. Each speaker has its own answers behind it: two conversations that have the questions in common."""
    histories: dict[str, Messages] = {name: [] for name in chat.speakers}
    num_asked = 0
    for line in _lines(chat.console):
        command, _, text = line.partition(" ")
        match command:
            case "":
                continue
            case "/quit":
                return
            case "/help":
                tell(chat.console, HELP)
            case "/reset":
                histories = {name: [message for message in history if message["role"] == "system"] for name, history in histories.items()}
            case "/system":
                histories = {name: [{"role": "system", "content": text}] if text else [] for name in chat.speakers}
            case "/undo":
                histories = {name: history[:-2] if history[-1:] and history[-1]["role"] == "assistant" else history for name, history in histories.items()}
            case "/seed" if text.isdecimal() and len(text) <= len(str(MAX_SEED)) and int(text) <= MAX_SEED:
                seed, num_asked = int(text), 0
            case _ if line.startswith("/"):
                tell(chat.console, f"{excerpt(line)} is not understood; /help lists what is")
            case _:
                histories = _answered(chat, histories, line, seed + num_asked)
                num_asked += 1


def _lines(console: Console) -> Iterator[str]:
    """Yield what is typed, or piped in, up to its end; blanks around it are left out."""
    is_typed = sys.stdin.isatty()
    if is_typed:
        import readline  # noqa: F401, gives input() keys to edit and recall lines with
    while True:
        try:
            line = input("> " if is_typed else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt as signalled:
            _require_ctrl_c(signalled)
            return
        if not is_typed:
            tell(console, f"> {line}")
        yield line


def _answered(chat: Chat, histories: dict[str, Messages], question: str, seed: int) -> dict[str, Messages]:
    """Show the answers and their rewards; return the conversations with them, or as they were where that was not possible."""
    asked = {name: [*history, {"role": "user", "content": question}] for name, history in histories.items()}
    try:
        prompts = {name: _prompt_ids(chat, messages) for name, messages in asked.items()}
    except Exception as error:  # a template is a program, which raises what its author thought of
        tell(chat.console, f"the chat template refuses this conversation: {excerpt(str(error), limit=400)}; /reset or /undo")
        return histories
    longest = max(map(len, prompts.values())) + chat.way.max_new_tokens
    if chat.positions and longest > chat.positions:
        tell(chat.console, f"with an answer of {chat.way.max_new_tokens} tokens this takes {longest:,}, and the model has {chat.positions:,} positions; /reset or /undo")
        return histories
    answers: dict[str, list[int]] = {}
    try:
        with hearing(chat.console, list(chat.speakers)) as hear:
            for name, speaker in chat.speakers.items():
                answers[name] = answer(speaker, chat.tokenizer, prompts[name], chat.way, seed=seed, on_text=lambda piece, name=name: hear(name, piece))
        if REFERENCE in chat.speakers:
            show_rewards(chat.console, [_reward(chat, name, prompts[name], answers[name]) for name in answers])
    except KeyboardInterrupt as signalled:
        _require_ctrl_c(signalled)
        tell(chat.console, "broken off, and taken back")
        return histories
    except torch.OutOfMemoryError:
        tell(chat.console, "no memory left for this answer; /reset or /undo")
        return histories
    texts = {name: chat.tokenizer.decode(ids, skip_special_tokens=True) for name, ids in answers.items()}
    return {name: [*messages, {"role": "assistant", "content": texts[name]}] for name, messages in asked.items()}


def _require_ctrl_c(signalled: KeyboardInterrupt) -> None:
    """Let what is no Ctrl-C, but a request to end, go its way."""
    if str(signalled) not in ("", "SIGINT"):
        raise signalled


def _prompt_ids(chat: Chat, messages: Messages) -> list[int]:
    tokenizer = chat.tokenizer
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **chat.template_options)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = tokenizer(messages[-1]["content"])["input_ids"]
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids  # of a tokenizer that ends every text


def _reward(chat: Chat, name: str, prompt: list[int], ids: list[int]) -> Reward:
    policy_logp, reference_logp = (logp_of(chat.speakers[speaker], prompt, ids) for speaker in (POLICY, REFERENCE))
    return Reward(name, chat.beta * (policy_logp - reference_logp), policy_logp, reference_logp, len(ids))
