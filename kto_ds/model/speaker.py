"""A model that speaks, in one process: transformers' own generate, with its cache, and the log-prob of an answer."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from kto_ds.model.lora import without_adapters


class Way(NamedTuple):
    """How answers are drawn; names are those of transformers.GenerationConfig."""

    max_new_tokens: int
    temperature: float  # 0: always the likeliest token
    top_p: float

    def generation_config(self, stop_ids: list[int]) -> GenerationConfig:
        drawn = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0} if self.temperature else {"do_sample": False}
        return GenerationConfig(max_new_tokens=self.max_new_tokens, eos_token_id=stop_ids, pad_token_id=stop_ids[0], **drawn)


class Speaker(NamedTuple):
    lm: PreTrainedModel
    stop_ids: list[int]
    is_below_adapters: bool = False  # speaks as the model that the adapters lie on

    def speaking(self):
        return without_adapters(self.lm) if self.is_below_adapters else nullcontext()


class _Listener(TextStreamer):
    """Hands text on as soon as it is sure that later tokens do not change it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], object]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._on_text(text)


@torch.inference_mode()
def answer(speaker: Speaker, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], way: Way, *, seed: int, on_text: Callable[[str], object]) -> list[int]:
    """Return the tokens of an answer, its end among them; `on_text` gets the text piece by piece. What the model's makers prefer in sampling is left out."""
    speaker.lm.generation_config = GenerationConfig()
    torch.manual_seed(seed)
    ids, listener = torch.tensor([prompt_ids], device=speaker.lm.device), _Listener(tokenizer, on_text)
    with speaker.speaking():
        whole = speaker.lm.generate(ids, attention_mask=torch.ones_like(ids), generation_config=way.generation_config(speaker.stop_ids), streamer=listener)
    return whole[0, len(prompt_ids) :].tolist()


@torch.inference_mode()
def logp_of(speaker: Speaker, prompt_ids: list[int], answer_ids: list[int]) -> float:
    """Return the log-prob of an answer after its prompt, in nats, summed over its tokens in float64."""
    ids = torch.tensor([prompt_ids + answer_ids], device=speaker.lm.device)
    with speaker.speaking():
        logits = speaker.lm(input_ids=ids, use_cache=False, logits_to_keep=len(answer_ids) + 1).logits[0, :-1]
    targets = ids[0, len(prompt_ids) :].to(logits.device)
    return float(sum(_token_logps(logits, targets)))


def _token_logps(logits: torch.Tensor, targets: torch.Tensor) -> Iterator[float]:
    # A few at a time: in float32 the logits of a long answer would take as much memory as a model.
    for part, wanted in zip(logits.split(64), targets.split(64)):
        yield part.float().log_softmax(dim=-1).gather(1, wanted[:, None]).double().sum().item()
