"""A run of 12 steps that takes seconds, and what is read back of it."""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kto_ds import api
from tests.distributed.runs import conversation, number_tokenizer, write_config, write_rows, write_zero

TIMINGS = {"tokens_per_second", "seconds", "seconds/kl", "seconds/policy", "seconds/update", "seconds/host", "tflops", "mfu", "hfu", "peak_memory_gib"}
RARE_TOKEN = 60  # stands in one row only
NUM_STEPS, SAVE_STEPS = 12, 2


def make_tiny_run(folder: Path) -> Path:
    """Fill a folder with model, run.yaml and dataset artefact of 32 examples: 4 steps an epoch, 3 epochs. The reference is for the caller to score."""
    torch.manual_seed(0)
    shape = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
    LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=1, eos_token_id=2, pad_token_id=0)).save_pretrained(folder / "model")
    number_tokenizer(61).save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(1)
    draw = lambda length: torch.randint(3, RARE_TOKEN, (length,), generator=generator).tolist()  # noqa: E731
    rows = [conversation(draw(3 + number % 9), draw(5 + 7 * number % 31), number % 3 == 0) for number in range(32)]
    rows[5]["completion"][0]["content"] += f" t{RARE_TOKEN} t7"
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "eval.jsonl", [conversation(draw(4 + number), draw(9), number % 2 == 0) for number in range(10)])
    write_config(
        folder / "run.yaml",
        output_dir=str(folder / "run"),
        model={"path": str(folder / "model"), "dtype": "float32"},
        data={"train": [{"path": str(folder / "rows.jsonl")}], "eval": [{"path": str(folder / "eval.jsonl")}], "max_length": 64, "artifact": str(folder / "dataset")},
        reference={"artifact": str(folder / "reference")},
        batch={"global_batch_size": 8, "max_tokens_per_microbatch": 128},
        optim={"learning_rate": 1e-3},
        train={"num_train_epochs": 3},
        eval={"eval_steps": 4},
        checkpoint={"save_steps": SAVE_STEPS, "save_total_limit": 2},
        deepspeed={"config": write_zero(folder, 3)},
    )
    api.prepare(api.read_config(folder / "run.yaml"))
    return folder


def config_of(folder: Path, **overrides) -> list[str]:
    return ["--config", str(folder / "run.yaml"), *(str(part) for key, value in overrides.items() for part in (f"--{key.replace('__', '.')}", value))]


def status_of(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def without_timings(records: list[dict]) -> list[dict]:
    return [{name: value for name, value in record.items() if name not in TIMINGS} for record in records]
