"""What a model answers to prompts of the evaluation splits, beside what it answered before the first step and what the rows have.

Legend: K prompts of a split, G tokens of the longest completion.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from kto_ds.config import GenerateConfig, ModelConfig
from kto_ds.data.continuation import share_prompts
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.sharding import Sharding
from kto_ds.data.tokenization import load_tokenizer
from kto_ds.errors import UserError
from kto_ds.model.generate import Completion, generate
from kto_ds.model.support import find_model_config, longest_servable, read_generation_config
from kto_ds.report.samples_file import SAMPLES_FILE, Sample, read_samples, write_samples
from kto_ds.runtime.collectives import gather_objects, on_main_rank, sum_across_ranks
from kto_ds.stages.inputs import evaluation_splits
from kto_ds.stages.objective import Cut, logps_of


class Questions(NamedTuple):
    """What the model is asked, and how its answers are read; the same on every rank."""

    settings: GenerateConfig
    examples: dict[str, np.ndarray]  # [K] of each evaluation split, ascending
    tokenizer: PreTrainedTokenizerBase
    stop_ids: list[int]


def open_questions(
    settings: GenerateConfig | None, model: ModelConfig, splits: dict[str, TokenizedSplit], *, max_tokens: int, where: str = "model.path"
) -> Questions | None:
    """Choose the prompts of eval.generate; none where that is null. `where` is the key that names the model.

    A prompt is answered by one rank, which takes it in one forward of at most `max_tokens`, also where ranks share longer rows between them.
    """
    if settings is None:
        return None
    tokenizer = load_tokenizer(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    positions = longest_servable(find_model_config(model, where=where))
    room = max_tokens if positions is None else positions - settings.max_new_tokens
    examples = {name: spread_prompts(splits[name], settings.num_prompts, min(room, max_tokens)) for name in evaluation_splits(splits)}
    if empty := [name for name, chosen in examples.items() if not len(chosen)]:
        if room >= max_tokens:
            what = f"every prompt of {empty[0]} has more tokens than a forward of one rank may have, {max_tokens:,}, and ranks do not share a prompt that is answered"
            raise UserError(what, where="eval.generate", remedy="raise batch.max_tokens_per_scoring_microbatch, or set eval.generate: null")
        what = f"no prompt of {empty[0]} leaves room for so many tokens: the model has only {positions:,} positions to use"
        raise UserError(what, where="eval.generate.max_new_tokens", remedy="lower it")
    return Questions(settings, examples, tokenizer, stop_ids_of(model, tokenizer))


def spread_prompts(split: TokenizedSplit, num_prompts: int, longest: int) -> np.ndarray:
    """Return the first example of each of `num_prompts` distinct prompts, at equal distances among those of at most `longest` tokens; of all where there are fewer."""
    _, firsts = np.unique(split.prompt_of, return_index=True)
    firsts = np.sort(firsts)
    firsts = firsts[split.prompt_lengths[split.prompt_of[firsts]] <= longest]
    chosen = min(num_prompts, len(firsts))
    return firsts[np.arange(chosen) * len(firsts) // max(1, chosen)]


def stop_ids_of(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a completion: the tokenizer's end of sequence, and what the model's generation config names, such as the end of a turn."""
    named = read_generation_config(model).eos_token_id
    return sorted({tokenizer.eos_token_id, *(named if isinstance(named, list) else [] if named is None else [named])})


class Asker(NamedTuple):
    """A model on all ranks, and what its answers are measured against."""

    forward: Callable[..., Tensor]  # that of Policy
    questions: Questions
    splits: dict[str, TokenizedSplit]
    reference_logps: dict[str, np.ndarray]  # [2E] of each split, by pair id
    beta: float
    seed: int
    sharding: Sharding


def ask(asker: Asker, output_dir: Path, *, step: int | None, file: str = SAMPLES_FILE, wants_to_stop: Callable[[], bool]) -> None:
    """Have the model answer, and add what it says at `step` to the file; a split that is there at this step already is left as it is. All ranks call this.

    Cut is raised on all of them once any rank's `wants_to_stop` says yes. Without a step, what is drawn is as before the first one.
    """
    path = output_dir / file
    for name, examples in asker.questions.examples.items():
        began = time.monotonic()
        known = on_main_rank(lambda: (name, step) in {(sample["split"], sample["step"]) for sample in read_samples(path)})
        if known:
            continue
        completions = _completions(asker, asker.splits[name], examples, step or 0, wants_to_stop)
        logps = logps_of(asker.forward, asker.sharding.batches(examples, asker.splits[name]), examples, asker.sharding.device).cpu().numpy()
        rewards = asker.beta * (logps - asker.reference_logps[name][examples])

        def add() -> None:
            before = {sample["prompt"]: sample["completion"] for sample in read_samples(output_dir / SAMPLES_FILE) if (sample["split"], sample["step"]) == (name, 0)}
            answers = _answers(asker.questions, asker.splits[name], examples, completions, rewards)
            samples = [Sample(split=name, step=step, before=answer["completion"] if step == 0 else before.get(answer["prompt"]), **answer) for answer in answers]
            write_samples(path, [*read_samples(path), *samples])
            num_tokens = sum(len(completion.tokens) for completion in completions)
            at = "" if step is None else f" at step {step}"
            tqdm.write(f"{name}: {len(completions)} completions{at}, {num_tokens:,} tokens in {time.monotonic() - began:.1f} s, in {path}")

        on_main_rank(add)


def _completions(asker: Asker, split: TokenizedSplit, examples: np.ndarray, step: int, wants_to_stop: Callable[[], bool]) -> list[Completion]:
    """Return the completion of each example's prompt, on all ranks; they do not depend on how many ranks there are, rounding apart."""
    settings, sharding = asker.questions.settings, asker.sharding
    prompts = [split.prompt(prompt) for prompt in split.prompt_of[examples]]
    lengths = [len(prompt) + settings.max_new_tokens for prompt in prompts]
    draws = np.stack([np.random.default_rng([asker.seed, step, example]).random(settings.max_new_tokens) for example in examples])  # [K, G]

    def is_over(ended: bool) -> bool:
        num_going_on, num_stopping = sum_across_ranks(torch.tensor([float(not ended), float(wants_to_stop())], device=sharding.device)).tolist()
        if num_stopping:
            raise Cut
        return not num_going_on

    found: dict[int, Completion] = {}
    for chosen in share_prompts(lengths, max_tokens=sharding.max_tokens, num_ranks=sharding.num_ranks)[sharding.rank]:
        answers = generate(
            asker.forward, [prompts[index] for index in chosen], draws=draws[chosen], temperature=settings.temperature, top_p=settings.top_p,
            stop_ids=asker.questions.stop_ids, layout=sharding.layout, device=sharding.device, is_over=is_over,
        )  # fmt: skip
        found.update(zip(chosen, answers))
    of_all = {index: completion for share in gather_objects(found) for index, completion in share.items()}
    return [of_all[index] for index in range(len(examples))]


def _answers(questions: Questions, split: TokenizedSplit, examples: np.ndarray, completions: Sequence[Completion], rewards: np.ndarray) -> list[dict]:
    """Return what there is to say of each completion but when it was."""
    found = []
    for example, completion, reward in zip(examples.tolist(), completions, rewards.tolist()):
        prompt = split.prompt(split.prompt_of[example]).tolist()
        text = partial(text_after, questions.tokenizer, prompt, stop_ids=questions.stop_ids)
        found.append({
            "row": split.row_name(example), "prompt": text_after(questions.tokenizer, [], prompt), "completion": text(completion.tokens),
            "num_tokens": len(completion.tokens), "stopped": completion.stopped, "label": bool(split.desirable[example]),
            "dataset_completion": text(split.completion(example).tolist()), "dataset_reward": reward if np.isfinite(reward) else None,
        })  # fmt: skip
    return found


def text_after(tokenizer: PreTrainedTokenizerBase, before: list[int], ids: list[int], *, stop_ids: Sequence[int] = ()) -> str:
    """Return the text of `ids` behind `before`, special tokens shown; of one that ends with a stop token, and at most blanks behind it, what stands before that."""
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    last = max((number for number, token in enumerate(ids) if token in stop_ids), default=len(ids))
    own = ids[:last] if not decode(ids[last + 1 :]).strip() else ids
    # Some tokenizers drop the space that begins a text, and only what stands before it brings it back.
    start, whole = decode(before), decode(before + own)
    return whole.removeprefix(start) if whole.startswith(start) else decode(own)
