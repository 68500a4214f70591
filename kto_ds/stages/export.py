"""A checkpoint, the newest if none is named -> a Hugging Face folder: sharded safetensors, config, tokenizer, model card. Of LoRA an adapter's folder, or with --merge a model's."""

import json
import time
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from kto_ds.artifacts import require_match
from kto_ds.config import LossConfig, OptimConfig, RunConfig
from kto_ds.data.dataset import REPORT
from kto_ds.errors import UserError, excerpt
from kto_ds.model.lora import merge_adapters, require_peft, write_adapter
from kto_ds.model.save import MAX_SHARD_SIZE, FileLayout, plan_files, write_model
from kto_ds.model.support import DTYPES, model_digest, read_generation_config, read_model_config, weight_files
from kto_ds.report.metrics_file import METRICS_FILE, read_records
from kto_ds.report.screen import WorkBar
from kto_ds.report.wandb_process import WandbProcess, has_run, wandb_order
from kto_ds.runtime.collectives import start
from kto_ds.runtime.guard import logs_folder
from kto_ds.runtime.library_log import library_log
from kto_ds.runtime.restore import Checkpoint, LazyWeight
from kto_ds.stages.identity import library_versions, run_tokenizer, weights_line, weights_of_config
from kto_ds.stages.push import push, require_pushable
from kto_ds.stages.trained import choose_checkpoint, require_same_config, trained_weights, whole
from kto_ds.staging import staged_folder, writing_to


def main(config: RunConfig, checkpoint: str = "latest", merge: bool = False, push_to_hub: str | None = None, private: bool = False, public: bool = False) -> None:
    """`checkpoint` is latest, best or step-N. With `merge` the adapters of LoRA go into the weights they were trained on. `push_to_hub` names a repository for the whole export."""
    require_pushable(push_to_hub, private=private, public=public)
    target = _export(config, checkpoint, merge)
    if push_to_hub is not None:
        pushed = push(target, push_to_hub, public=public)
        print(f"pushed to {pushed.address}, which is {'private' if pushed.is_private else 'public'}", flush=True)


def _export(config: RunConfig, checkpoint: str, merge: bool) -> Path:
    """Write the export and return its folder."""
    model_config = read_model_config(config.model)
    if config.model.lora is not None:
        require_peft("model.lora")
    elif merge:
        raise UserError("there are no adapters to merge: model.lora is null", where="--merge", remedy="leave this option out: the export is a whole model")
    chosen = choose_checkpoint(config.output_dir / "checkpoints", checkpoint, start(timeout_seconds=config.train.setup_timeout_seconds))
    loss = weights_of_config(config.loss, chosen.manifest["config"])
    require_same_config(config, loss, chosen)
    logs = logs_folder(config.output_dir, "export")
    with writing_to(config.output_dir):
        logs.mkdir(parents=True, exist_ok=True)
    with library_log(logs, 0) as log:
        return _write(config, model_config, chosen, loss, log, merge=merge)


def _write(config: RunConfig, model_config: PretrainedConfig, chosen: Checkpoint, loss: LossConfig, log: TextIO, *, merge: bool) -> Path:
    weights = trained_weights(chosen, log=log)
    tokenizer, text = run_tokenizer(config), _model_card(config, loss, chosen, is_adapter=config.model.lora is not None and not merge)
    target, began = config.merged_dir if merge else config.export_dir, time.monotonic()
    with staged_folder(target) as folder:
        if config.model.lora is None:
            _write_whole(folder, config, model_config, weights)
        elif merge:
            _merged_model(config, model_config, weights, chosen).save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
        else:
            write_adapter(folder, config.model.lora, _all_whole(weights, config), base=config.model.path, revision=config.model.revision)
        tokenizer.save_pretrained(folder)
        card = folder / "README.md"
        card.write_text(text, encoding="utf-8")
        # safetensors makes files that only their owner can read; a model is for sharing, as far as the umask allows.
        for path in folder.iterdir():
            path.chmod(card.stat().st_mode)
    size, seconds = sum(path.stat().st_size for path in target.glob("*.safetensors")) / 1e9, time.monotonic() - began
    print(f"exported step {chosen.step} to {target}: {size:,.2f} GB in {seconds:.1f} s, {size / seconds:.2f} GB/s", flush=True)
    if config.report.wandb.mode != "disabled" and has_run(config.output_dir):
        order = wandb_order(config.report.wandb, config.report.wandb.mode, output_dir=config.output_dir, run_config={}, export=target)
        WandbProcess(order, tell=print).close()
    return target


def _write_whole(folder: Path, config: RunConfig, model_config: PretrainedConfig, weights: dict[str, LazyWeight]) -> None:
    """Write config and weights of the model, a layer at a time."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(model_config, dtype=DTYPES[config.model.dtype], trust_remote_code=config.model.trust_remote_code)
    lm.generation_config = read_generation_config(config.model)
    layout = plan_files(lm)
    _require_all(lm, layout, weights)
    with WorkBar("export", total=layout.num_bytes, unit="B") as bar:
        write_model(lm, folder, lambda names: {name: whole(name, weights[name], lm.dtype) for name in names}, layout=layout, on_written=bar.advance)


def _all_whole(weights: dict[str, LazyWeight], config: RunConfig) -> dict[str, Tensor]:
    return {name: whole(name, weight, DTYPES[config.model.dtype]) for name, weight in weights.items()}


def _merged_model(config: RunConfig, model_config: PretrainedConfig, weights: dict[str, LazyWeight], checkpoint: Checkpoint) -> PreTrainedModel:
    """Return the model that the adapters were trained on with their products added to its weights: the whole ones, where training had them in 4 bits."""
    found = {"base model": model_digest(config.model)}
    require_match({"base model": checkpoint.manifest["identity"]["base model"]}, found, where="model.path", remedy="merge into the weights that were trained on")
    lm = AutoModelForCausalLM.from_pretrained(
        weight_files(config.model)[0], config=model_config, dtype=DTYPES[config.model.dtype], use_safetensors=True, trust_remote_code=config.model.trust_remote_code
    )
    merge_adapters(lm, config.model.lora, _all_whole(weights, config))
    return lm


def _require_all(lm: PreTrainedModel, layout: FileLayout, weights: dict[str, LazyWeight]) -> None:
    """Refuse a checkpoint in which a weight of the model is missing or has another shape."""
    wanted = lm.state_dict()
    names = [name for layer in layout.layers for name in layer]  # of what is tied, one name
    if missing := sorted(set(names) - set(weights)):
        raise UserError(f"the checkpoint lacks {len(missing)} parameters, the first: {missing[0]}", where="model.path", remedy="export with the config the run was trained with")
    for name in names:
        if weights[name].shape != wanted[name].shape:
            raise UserError(f"{name} has shape {tuple(weights[name].shape)}, expected {tuple(wanted[name].shape)}", where="checkpoints")


def _model_card(config: RunConfig, loss: LossConfig, checkpoint: Checkpoint, *, is_adapter: bool) -> str:
    sources = "\n".join(f"- `{Path(source.path).name}`" + (f", split `{source.split}`" if source.split else "") for source in config.data.train)
    metrics = "\n".join(f"| {split} | {name} | {value:.5g} |" for split, record in _last_records(config, checkpoint.step).items() for name, value in record.items() if isinstance(value, (int, float)))
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    optim = OptimConfig.model_validate(checkpoint.manifest["config"]["optim"])
    # The hub takes only names of its own there, and where a folder lies is nobody else's business.
    base = f"base_model: {json.dumps(config.model.path)}\n" if not Path(config.model.path).exists() else ""
    return f"""---
{base}library_name: {"peft" if is_adapter else "transformers"}
tags: [kto, kto_ds]
---

# {Path(config.output_dir).name}

{_model_name(config.model.path)}, aligned with thumbs-up / thumbs-down data by [KTO](https://arxiv.org/abs/2402.01306) with kto_ds.

## Data

{_data_line(config)}

{sources}

## Training

Step {checkpoint.step}; loss `{loss.loss_type}`, beta {loss.beta:g}, weights {weights_line(loss)};
AdamW, learning rate {optim.learning_rate:g} ({optim.lr_scheduler_type}), {config.batch.global_batch_size} examples a step, {config.model.dtype}, seed {config.seed}.
Reference: {excerpt(_model_name(config.reference.path or config.model.path))}. Made with {versions}.

## Final metrics

| split | metric | value |
|---|---|---|
{metrics}
"""


def _model_name(path: str) -> str:
    return Path(path).resolve().name if Path(path).exists() else path


def _data_line(config: RunConfig) -> str:
    path = config.dataset_dir / REPORT
    if not path.is_file():
        return "Rows of"
    report = json.loads(path.read_text(encoding="utf-8"))["train"]
    return f"{report['examples']:,} examples ({report['desirable']:,} desirable, {report['undesirable']:,} undesirable, {report['tokens']:,} tokens) of"


def _last_records(config: RunConfig, step: int) -> dict[str, dict]:
    """Return the last record of each split up to a step."""
    path = config.output_dir / METRICS_FILE
    return {record["split"]: record for record in read_records(path) if record["step"] <= step} if path.is_file() else {}
