"""A tiny language model with a supervised start, and what is sampled from it: plain torch and transformers, one process.

Shapes: B prompts of a batch, T tokens of prompt, answer and end of sequence together. All prompts are equally long, so nothing is padded.
"""

import random
from collections.abc import Callable, Sequence

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from kto_ds.demo import task

PAD, EOS = "<pad>", "<eos>"
MAX_POSITIONS = 64
MAX_NEW_TOKENS = task.ANSWER_LENGTH + 1  # the answer and the end of sequence: a longer completion is cut here, and wrong
SAMPLING_BATCH = 500
IGNORED = -100  # the label that the loss of transformers leaves out


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single characters that adds no special token by itself."""
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, *task.ALPHABET])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, pad_token=PAD, eos_token=EOS, model_max_length=MAX_POSITIONS)


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return an untrained Llama of 0.3M parameters, float32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.04,  # 0.02 needs three times the steps; from 0.06, KTO gains little on some seeds
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def half_wrong_batch(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], rng: random.Random) -> tuple[Tensor, Tensor]:
    """Return input ids and labels, both [B, T]: every prompt with its right answer or, just as often, a wrong one."""
    answers = [task.right_answer(prompt) if rng.random() < 0.5 else task.wrong_answer(prompt, rng) for prompt in prompts]
    texts = [prompt + answer + EOS for prompt, answer in zip(prompts, answers, strict=True)]
    input_ids = torch.tensor(tokenizer(texts)["input_ids"])
    labels = input_ids.clone()
    labels[:, :-MAX_NEW_TOKENS] = IGNORED
    return input_ids, labels


def supervised_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    steps: int = 900,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    seed: int,
    progress: Callable[[int, float], None],
) -> None:
    """Train the model in place on answers of which half are wrong; `progress` gets the number of steps done and their loss."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    model.train()
    for step in range(1, steps + 1):
        input_ids, labels = half_wrong_batch(tokenizer, rng.choices(prompts, k=batch_size), rng)
        loss = model(input_ids=input_ids.to(model.device), labels=labels.to(model.device), use_cache=False).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps:
            progress(step, loss.item())
    model.eval()


@torch.no_grad()
def sample_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    seed: int,
    temperature: float = 1.0,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[str]:
    """Return one completion of each prompt, drawn from the model's own distribution; the end of sequence is cut off."""
    assert len({len(prompt) for prompt in prompts}) == 1, "prompts of one length only: nothing is padded here"
    completions = []
    model.eval()
    cuda_devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda_devices):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), SAMPLING_BATCH):
            input_ids = torch.tensor(tokenizer(list(prompts[start : start + SAMPLING_BATCH]))["input_ids"], device=model.device)  # [B, prompt]
            sequences = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=max_new_tokens,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
            )
            completions += tokenizer.batch_decode(sequences[:, input_ids.shape[1] :], skip_special_tokens=True)
    return completions


def measure_accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], *, seed: int) -> float:
    """Return the share of prompts answered right, one answer each sampled at temperature 1."""
    completions = sample_completions(model, tokenizer, prompts, seed=seed)
    return sum(map(task.is_right, prompts, completions)) / len(prompts)


def label_rows(prompts: Sequence[str], completions: Sequence[str]) -> list[dict[str, str | bool]]:
    """Return rows as kto_ds reads them, with the program's verdict as label; an empty completion is no row, since it has nothing to learn from."""
    return [
        {"prompt": prompt, "completion": completion, "label": task.is_right(prompt, completion)}
        for prompt, completion in zip(prompts, completions, strict=True)
        if completion
    ]
