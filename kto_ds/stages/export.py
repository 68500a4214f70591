"""Newest checkpoint -> a Hugging Face folder: sharded safetensors, config, tokenizer, model card."""

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from kto_ds.artifacts import require_match
from kto_ds.config import LossConfig, RunConfig
from kto_ds.data.split_report import REPORT
from kto_ds.errors import UserError, excerpt
from kto_ds.model.support import DTYPES, read_model_config
from kto_ds.report.metrics_file import METRICS_FILE, read_records
from kto_ds.runtime.checkpoint import Checkpoint, newest_verified, read_weights
from kto_ds.runtime.collectives import start
from kto_ds.stages.identity import library_versions, run_record, run_tokenizer, weights_line, weights_of_record
from kto_ds.staging import staged_folder

MAX_SHARD_SIZE = "5GB"
TRAIN_FIRST = "run kto-ds train --config RUN.yaml"
POLICY_PREFIX = "lm."  # where Policy keeps the language model


def main(config: RunConfig) -> None:
    model_config = read_model_config(config.model)
    world = start()
    checkpoint = newest_verified(config.output_dir / "checkpoints", world)
    if checkpoint is None:
        raise UserError("there is no checkpoint", where=str(config.output_dir / "checkpoints"), remedy=TRAIN_FIRST)
    remedy = "export with the config the run was trained with: it lies in config.yaml beside the checkpoints"
    loss = weights_of_record(config.loss, checkpoint.manifest["record"])
    require_match(run_record(config, loss), checkpoint.manifest["record"], where=str(checkpoint.folder), remedy=remedy)
    dtype = DTYPES[config.model.dtype]
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(model_config, dtype=dtype, trust_remote_code=config.model.trust_remote_code)
    _assign(lm, {name.removeprefix(POLICY_PREFIX): weight.to(dtype) for name, weight in read_weights(checkpoint).items()})
    lm.generation_config = _generation_config(config)
    tokenizer, text = run_tokenizer(config), _model_card(config, loss, checkpoint)
    with staged_folder(config.export_dir) as folder:
        lm.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
        tokenizer.save_pretrained(folder)
        card = folder / "README.md"
        card.write_text(text, encoding="utf-8")
        # safetensors makes files that only their owner can read; a model is for sharing, as far as the umask allows.
        for path in folder.iterdir():
            path.chmod(card.stat().st_mode)
    print(f"exported step {checkpoint.step} to {config.export_dir}")


def _assign(lm: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Give the model its weights; every parameter must be among them, finite and of its shape."""
    wanted = dict(lm.named_parameters())  # a tied head has no name of its own here
    if missing := sorted(set(wanted) - set(weights)):
        raise UserError(f"the checkpoint lacks {len(missing)} parameters, the first: {missing[0]}", where="model.path", remedy="export with the config the run was trained with")
    for name, parameter in wanted.items():
        if weights[name].shape != parameter.shape or not torch.isfinite(weights[name]).all():
            raise UserError(f"{name} is not finite or has shape {tuple(weights[name].shape)}, expected {tuple(parameter.shape)}", where="checkpoints")
    lm.load_state_dict({name: weights[name] for name in wanted}, strict=False, assign=True)
    lm.tie_weights()


def _generation_config(config: RunConfig) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(config.model.path, revision=config.model.revision)
    except OSError:
        return GenerationConfig()


def _model_card(config: RunConfig, loss: LossConfig, checkpoint: Checkpoint) -> str:
    sources = "\n".join(f"- `{Path(source.path).name}`" + (f", split `{source.split}`" if source.split else "") for source in config.data.train)
    metrics = "\n".join(f"| {split} | {name} | {value:.5g} |" for split, record in _last_records(config).items() for name, value in record.items() if isinstance(value, (int, float)))
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    optim = config.optim
    return f"""---
base_model: {json.dumps(config.model.path)}
library_name: transformers
tags: [kto, kto_ds]
---

# {Path(config.output_dir).name}

{config.model.path}, aligned with thumbs-up / thumbs-down data by [KTO](https://arxiv.org/abs/2402.01306) with kto_ds.

## Data

{_data_line(config)}

{sources}

## Training

Step {checkpoint.step}; loss `{loss.loss_type}`, beta {loss.beta:g}, weights {weights_line(loss)};
AdamW, learning rate {optim.learning_rate:g} ({optim.lr_scheduler_type}), {config.batch.global_batch_size} examples a step, {config.model.dtype}, seed {config.seed}.
Reference: {excerpt(config.reference.path or config.model.path)}. Made with {versions}.

## Final metrics

| split | metric | value |
|---|---|---|
{metrics}
"""


def _data_line(config: RunConfig) -> str:
    path = config.dataset_dir / REPORT
    if not path.is_file():
        return "Rows of"
    report = json.loads(path.read_text(encoding="utf-8"))["train"]
    return f"{report['examples']:,} examples ({report['desirable']:,} desirable, {report['undesirable']:,} undesirable, {report['tokens']:,} tokens) of"


def _last_records(config: RunConfig) -> dict[str, dict]:
    path = config.output_dir / METRICS_FILE
    return {record["split"]: record for record in read_records(path)} if path.is_file() else {}
