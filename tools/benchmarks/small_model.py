"""A model that fits a CPU, and rows for it: random weights, a tokenizer trained on the rows themselves."""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

VOCAB_SIZE = 32_768
HEAD_DIM = 64
SEED = 0
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of at most `vocab_size` tokens with the ChatML template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special, alphabet = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def make_model(folder: Path, texts: list[str], *, hidden_size: int, num_layers: int, max_length: int, vocab_size: int = VOCAB_SIZE) -> str:
    """Write a seeded Qwen3 model and a tokenizer trained on the texts; return what they came out as, in words."""
    tokenizer = train_tokenizer(texts, vocab_size)
    tokenizer.save_pretrained(folder)
    heads = hidden_size // HEAD_DIM
    config = Qwen3Config(
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=3 * hidden_size, num_hidden_layers=num_layers, head_dim=HEAD_DIM,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 2), max_position_embeddings=max(4096, max_length), tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    characters = sum(map(len, texts)) / sum(len(tokenizer(text)["input_ids"]) for text in texts)
    head = vocab_size * hidden_size
    layers = sum(weight.numel() for weight in model.parameters()) - head
    return (
        f"Tokenizer: {len(tokenizer):,} tokens, {characters:.1f} characters a token. Model: Qwen3, float32, hidden size {hidden_size}, {num_layers} layers "
        f"with {layers / 1e6:.1f} million weights, head with {head / 1e6:.1f} million (vocabulary {vocab_size:,}, tied)."
    )


def read_rows(path: Path) -> list[dict]:
    if not path.is_file():
        raise SystemExit(f"--rows: no such file: {path}; give a JSON array of rows with messages and label, such as kto_en_demo.json of LLaMA-Factory")
    return json.loads(path.read_text(encoding="utf-8"))


def texts_of(rows: list[dict]) -> list[str]:
    """Return all texts of rows with messages, or of pairs with conversations, chosen and rejected."""
    return [message["content"] for row in rows for message in row.get("messages", [])] + [
        message["value"] for row in rows if "chosen" in row for message in (*row["conversations"], row["chosen"], row["rejected"])
    ]


def paired_rows(rows: list[dict], tokenizer: PreTrainedTokenizerFast, count: int, *, low: float, high: float, max_length: int) -> list[dict]:
    """Return the first `count` pairs whose prompt has `low` to `high` times as many tokens as its two completions on average; SystemExit when there are fewer."""
    found = []
    for row in rows:
        prompt, *answers = (len(tokenizer(text)["input_ids"]) for text in (_joined(row), row["chosen"]["value"], row["rejected"]["value"]))
        if low <= 2 * prompt / max(1, sum(answers)) <= high and prompt + max(answers) < 0.9 * max_length:  # the template adds a little
            found.append(row)
    if len(found) < count:
        raise SystemExit(f"--num_rows: only {len(found)} pairs have a prompt of {low:g} to {high:g} times their completions' tokens")
    return found[:count]


def _joined(row: dict) -> str:
    return "\n".join(message["value"] for message in row["conversations"])


def distinct_rows(rows: list[dict], tokenizer: PreTrainedTokenizerFast, count: int, max_length: int) -> list[dict]:
    """Return the first `count` rows with a prompt of their own that leaves room for a completion; SystemExit when there are fewer."""
    found: dict[str, dict] = {}
    for row in rows:
        prompt = row["messages"][:-1]
        length = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))
        if length < max_length:
            found.setdefault(json.dumps(prompt), row)
    if len(found) < count:
        raise SystemExit(f"--num_rows: only {len(found)} rows have a prompt of their own below {max_length} tokens")
    return list(found.values())[:count]


def equal_rows(rows: list[dict], tokenizer: PreTrainedTokenizerFast, count: int, tokens: int) -> list[dict]:
    """Return rows of one turn with exactly `tokens` tokens in the question and in the answer each, cut from the texts of `rows` in their order.

    Where the next word would be too much, " a" fills up.
    """
    words = chain.from_iterable(text.split() for text in texts_of(rows))
    return [
        {"messages": [{"role": role, "content": _exactly(words, tokenizer, tokens)} for role in ("user", "assistant")], "label": number % 2 == 0}
        for number in range(count)
    ]  # fmt: skip


def _exactly(words: Iterator[str], tokenizer: PreTrainedTokenizerFast, tokens: int) -> str:
    """Return the next words as a text of so many tokens; SystemExit when they run out. The word that no longer fits is lost."""
    text, length = "", 0
    for word in words:
        # A byte-level BPE splits before a space, so that a word's tokens do not depend on those before it.
        more = len(tokenizer(f" {word}")["input_ids"])
        if length + more > tokens:
            text += " a" * (tokens - length)
            assert len(tokenizer(text)["input_ids"]) == tokens, f"not {tokens} tokens: {text!r}"
            return text
        text, length = f"{text} {word}", length + more
    raise SystemExit("--num_rows: the rows have too few words")
