"""Every option of `trl kto` (TRL 1.16: ScriptArguments, KTOConfig, ModelConfig, DatasetMixtureConfig) with its default and what becomes of it.

tests/unit/test_import_trl.py compares names and defaults with TRL's own.
"""

from typing import NamedTuple

from kto_ds.moving import trl_inputs as inputs
from kto_ds.moving import trl_rules as rules
from kto_ds.moving.trl_command import Kind
from kto_ds.moving.trl_rules import Rule, always, idle, part_of, same, without

LAYOUT = idle("how a step is laid out has no part in its result here; batch.max_tokens_per_microbatch bounds the memory")
MEMORY_OF_EVALUATION = idle("about the memory of an evaluation, which keeps a few numbers an example here")
DDP = idle("about DDP; DeepSpeed shards here")
LOADER = idle("rows are read from a memory map, one step ahead")
CONSOLE = idle("about the console")
KINDS_OF_RATIO = without("the schedule has no further settings")
NO_DORA = "adapters are LoRA's or rsLoRA's"
HUB = idle("an export is pushed once, by kto-ds export --push-to-hub; hf auth login or HF_TOKEN has the token, and no config")
SYNC = "the reference is frozen: its log-probs are computed once"


class Option(NamedTuple):
    default: object
    rule: Rule
    kind: Kind = "text"  # of its values


def _flag(default: bool | None, rule: Rule) -> Option:
    return Option(default, rule, "flag")


def _number(default: float | None, rule: Rule) -> Option:
    return Option(default, rule, "number")


DATA = {
    "dataset_name": Option(None, inputs.dataset),
    "dataset_config": Option(None, without("a hub dataset's configuration cannot be named: save it with save_to_disk of datasets and name the folder", "default")),
    "dataset_train_split": Option("train", part_of("dataset_name")),
    "dataset_test_split": Option("test", part_of("dataset_name")),
    "dataset_streaming": _flag(False, idle("prepare reads rows block by block in any case")),
    "ignore_bias_buffers": _flag(False, DDP),
    "datasets": Option([], inputs.mixture),
    "streaming": _flag(False, idle("prepare reads rows block by block in any case")),
    "test_split_size": _number(None, inputs.test_split_size),
}
STEPS = {
    "output_dir": Option(None, lambda given: rules.Verdict({"output_dir": given.value or inputs.DEFAULT_FOLDER})),
    "per_device_train_batch_size": _number(8, rules.batch_size),
    "num_train_epochs": _number(3.0, same("train.num_train_epochs")),
    "max_steps": _number(-1, lambda given: rules.Verdict({"train.max_steps": given.value if given.value > 0 else None})),
    "learning_rate": _number(1e-6, same("optim.learning_rate")),
    "lr_scheduler_type": Option("linear", rules.replaced(
        "optim.lr_scheduler_type", {name: name for name in ("linear", "cosine", "constant", "constant_with_warmup", "polynomial")}, "stays cosine; linear, constant and polynomial are there too"
    )),
    "lr_scheduler_kwargs": Option(None, KINDS_OF_RATIO),
    "warmup_steps": _number(0, rules.warmup),
    "optim": Option("adamw_torch_fused", rules.optimizer),
    "optim_args": Option(None, without("AdamW has its keys in section optim")),
    "weight_decay": _number(0.0, rules.weight_decay),
    "adam_beta1": _number(0.9, same("optim.adam_beta1")),
    "adam_beta2": _number(0.999, same("optim.adam_beta2")),
    "adam_epsilon": _number(1e-8, same("optim.adam_epsilon")),
    "optim_target_modules": Option(None, without("the optimizer is AdamW on all that is trained")),
    "gradient_accumulation_steps": _number(1, part_of("per_device_train_batch_size")),
    "average_tokens_across_devices": _flag(True, idle("KTO's loss is a mean over examples, here over all of a step")),
    "max_grad_norm": _number(1.0, same("optim.max_grad_norm")),
    "label_smoothing_factor": _number(0.0, idle("TRL's KTO does not read it")),
    "max_length": _number(1024, rules.max_length),
    "seed": _number(42, same("seed")),
    "data_seed": _number(None, without("one seed is for all: seed")),
    "full_determinism": _flag(False, without("steps are the same bit for bit where kernels are deterministic; no switch makes them so")),
    "train_sampling_strategy": Option("sequential", rules.order),
    "length_column_name": Option("length", LOADER),
    "auto_find_batch_size": _flag(False, LAYOUT),
}  # fmt: skip
KTO = {
    "loss_type": Option("kto", same("loss.loss_type")),
    "beta": _number(0.1, same("loss.beta")),
    "desirable_weight": _number(1.0, same("loss.desirable_weight")),
    "undesirable_weight": _number(1.0, same("loss.undesirable_weight")),
    "precompute_ref_log_probs": _flag(False, idle("always here: kto-ds precompute-ref writes them once for all runs")),
    "precompute_ref_batch_size": _number(None, idle("reference.max_tokens_per_microbatch bounds its memory")),
    "sync_ref_model": _flag(False, always(False, SYNC)),
    "ref_model_mixup_alpha": _number(0.6, idle(SYNC)),
    "ref_model_sync_steps": _number(512, idle(SYNC)),
    "disable_dropout": _flag(True, always(True, "dropout is off, so that policy and reference can be compared")),
    "router_aux_loss_coef": _number(None, same("model.router_aux_loss_coef")),
    "dataset_num_proc": _number(None, same("data.dataset_num_proc")),
    "pad_to_multiple_of": Option("auto", LAYOUT),
}
PRECISION = {
    "bf16": _flag(None, rules.precision),
    "fp16": _flag(False, always(False, "float16 overflows without loss scaling, which there is none of: bfloat16 in its place")),
    "dtype": Option("float32", rules.weights_dtype),
    "bf16_full_eval": _flag(False, idle("evaluation has model.dtype")),
    "fp16_full_eval": _flag(False, idle("evaluation has model.dtype")),
    "tf32": _flag(None, idle("about products of float32, which there are none of in bfloat16")),
    "activation_checkpointing": _flag(None, part_of("gradient_checkpointing")),
    "activation_checkpointing_kwargs": Option(None, idle("how layers are checkpointed is chosen for ZeRO-3")),
    "gradient_checkpointing": _flag(True, rules.checkpointing),
    "gradient_checkpointing_kwargs": Option(None, idle("how layers are checkpointed is chosen for ZeRO-3")),
    "activation_offloading": _flag(False, rules.activation_offloading),
    "torch_compile": _flag(False, without("models run as they are, with kernels of model.kernels and model.attention")),
    "torch_compile_backend": Option(None, idle("see --torch_compile")),
    "torch_compile_mode": Option(None, idle("see --torch_compile")),
    "use_liger_kernel": _flag(False, idle("model.kernels: auto takes Liger's on CUDA where it is installed")),
    "liger_kernel_config": Option(None, idle("model.kernels: auto takes Liger's on CUDA where it is installed")),
    "use_cache": _flag(False, idle("off in training")),
    "neftune_noise_alpha": _number(None, without("noise on embeddings would set policy and reference apart")),
    "torch_empty_cache_steps": _number(None, idle("about the memory of PyTorch")),
    "use_cpu": _flag(False, idle("without a GPU it runs on the CPU; DS_ACCELERATOR=cpu keeps it there")),
}
LOGGING = {
    "logging_strategy": Option("steps", always("steps", "metrics are logged by steps: report.logging_steps")),
    "logging_steps": _number(10, rules.steps("report.logging_steps")),
    "logging_first_step": _flag(False, idle("a line has the means over all steps since the last one; set report.logging_steps to 1 to have them all")),
    "log_on_each_node": _flag(True, CONSOLE),
    "logging_nan_inf_filter": _flag(True, idle("a step with NaN or Inf ends the run before its update, or is left out: train.on_nonfinite")),
    "include_num_input_tokens_seen": Option("no", idle("tokens a second are logged always")),
    "log_level": Option("passive", CONSOLE), "log_level_replica": Option("warning", CONSOLE), "disable_tqdm": _flag(None, CONSOLE),
    "report_to": Option("none", inputs.trackers),
    "run_name": Option(None, inputs.run_name),
    "project": Option("huggingface", idle("is Trackio's; wandb's is report.wandb.project, which WANDB_PROJECT sets here")),
    "trackio_space_id": Option(None, idle("is Trackio's")), "trackio_bucket_id": Option(None, idle("is Trackio's")), "trackio_static_space_id": Option(None, idle("is Trackio's")),
}  # fmt: skip
EVALUATION = {
    "eval_strategy": Option("no", rules.eval_strategy),
    "eval_steps": _number(None, rules.eval_steps),
    "eval_delay": _number(0, without("evaluation begins at the first eval.eval_steps", 0)),
    "per_device_eval_batch_size": _number(8, LAYOUT),
    "prediction_loss_only": _flag(False, MEMORY_OF_EVALUATION),
    "eval_on_start": _flag(False, idle("before the first step rewards are 0 but for rounding, which train prints")),
    "eval_do_concat_batches": _flag(True, MEMORY_OF_EVALUATION), "eval_use_gather_object": _flag(False, MEMORY_OF_EVALUATION),
    "eval_accumulation_steps": _number(None, MEMORY_OF_EVALUATION), "batch_eval_metrics": _flag(False, MEMORY_OF_EVALUATION),
    "include_for_metrics": Option([], idle("metrics are those of docs/metrics.md")),
    "label_names": Option(None, idle("the label is the field label, or columns names it")),
    "load_best_model_at_end": _flag(False, idle("kto-ds export --checkpoint best takes the best one")),
    "metric_for_best_model": Option(None, rules.best_metric),
    "greater_is_better": _flag(None, rules.greater_is_better),
    "do_train": _flag(False, idle("TRL's script does not read it")), "do_eval": _flag(False, idle("TRL's script does not read it")), "do_predict": _flag(False, idle("TRL's script does not read it")),
}  # fmt: skip
SAVING = {
    "save_only_model": _flag(False, without("a checkpoint without the optimizer could not be resumed from; kto-ds export makes the model")),
    "save_strategy": Option("steps", always("steps", "checkpoints are saved by steps, and at the end: checkpoint.save_steps")),
    "save_steps": _number(500, rules.save_steps),
    "save_on_each_node": _flag(False, idle("all ranks write one checkpoint to a folder that all of them see")),
    "save_total_limit": _number(None, rules.save_total_limit),
    "enable_jit_checkpoint": _flag(False, idle("SIGTERM, SIGINT and SIGUSR1 always save and end with exit code 75")),
    "ignore_data_skip": _flag(False, without("a resumed run goes on with the next step of its plan")),
    "restore_callback_states_from_checkpoint": _flag(False, idle("there are no callbacks")),
    "resume_from_checkpoint": Option(None, idle("a run resumes by itself from its own newest checkpoint; checkpoints of TRL's are not read")),
    "push_to_hub": _flag(False, inputs.push),
    "hub_model_id": Option(None, part_of("push_to_hub")), "hub_private_repo": _flag(None, part_of("push_to_hub")),
    "hub_token": Option(None, HUB), "hub_strategy": Option("every_save", HUB), "hub_always_push": _flag(False, HUB), "hub_revision": Option(None, HUB),
}
MACHINES = {
    "accelerator_config": Option(None, LOADER),
    "parallelism_config": Option(None, without("batch.sequence_parallel_size shares rows among ranks; weights are sharded by ZeRO alone")),
    "dataloader_drop_last": _flag(False, without("the last step of an epoch may be smaller and counts by its own examples")),
    "dataloader_num_workers": _number(0, LOADER), "dataloader_pin_memory": _flag(True, LOADER), "dataloader_persistent_workers": _flag(False, LOADER),
    "dataloader_prefetch_factor": _number(None, LOADER), "dataloader_multiprocessing_context": Option(None, LOADER), "dataloader_in_order": _flag(True, LOADER),
    "remove_unused_columns": _flag(True, idle("fields that are not used are ignored and listed")),
    "ddp_find_unused_parameters": _flag(None, DDP), "ddp_bucket_cap_mb": _number(None, DDP), "ddp_broadcast_buffers": _flag(None, DDP), "ddp_static_graph": _flag(None, DDP),
    "ddp_backend": Option(None, DDP),
    "ddp_timeout": _number(1800, same("train.step_timeout_seconds")),
    "fsdp": Option(None, part_of("deepspeed")), "fsdp_config": Option(None, part_of("deepspeed")),
    "deepspeed": Option(None, inputs.sharded),
    "debug": Option("", idle("kill -USR2 writes the stacks of a rank")),
    "skip_memory_metrics": _flag(True, idle("peak memory is logged always")),
    "local_rank": _number(-1, idle("the launcher sets it")),
}  # fmt: skip
MODEL = {
    "model_name_or_path": Option(None, same("model.path")),
    "model_revision": Option("main", inputs.model_revision),
    "model_init_kwargs": Option(None, without("of these only dtype, revision, attn_implementation and trust_remote_code have a counterpart, and are taken over", {})),
    "trust_remote_code": _flag(False, same("model.trust_remote_code")),
    "attn_implementation": Option(None, inputs.attention),
    "use_peft": _flag(False, inputs.adapters),
    "lora_r": _number(16, part_of("use_peft")), "lora_alpha": _number(32, part_of("use_peft")), "lora_target_modules": Option(None, part_of("use_peft")),
    "use_rslora": _flag(False, part_of("use_peft")),
    "lora_dropout": _number(0.05, idle("0, as dropout is off; TRL's disable_dropout switches that of adapters off too")),
    "lora_target_parameters": Option(None, without("experts of a mixture get no adapters")),
    "lora_modules_to_save": Option(None, without("adapters alone are trained beside frozen weights")),
    "lora_task_type": Option("CAUSAL_LM", always("CAUSAL_LM", "the model is a causal language model")),
    "use_dora": _flag(False, without(NO_DORA)),
    "load_in_8bit": _flag(False, without("weights below adapters have 4 bits, model.load_in_4bit, or are whole")),
    "load_in_4bit": _flag(False, inputs.four_bits),
    "bnb_4bit_quant_type": Option("nf4", always("nf4", "4 bits are NF4")),
    "use_bnb_nested_quant": _flag(False, idle("scales are quantised too, always")),
    "bnb_4bit_quant_storage": Option(None, idle("chosen so that ZeRO-3 can shard it")),
}
OPTIONS: dict[str, Option] = {**MODEL, **DATA, **STEPS, **KTO, **PRECISION, **EVALUATION, **SAVING, **LOGGING, **MACHINES}

# What earlier releases called otherwise.
RENAMED = {"evaluation_strategy": "eval_strategy", "torch_dtype": "dtype", "push_to_hub_model_id": "hub_model_id", "push_to_hub_token": "hub_token"}
# Options that TRL or transformers had once.
EARLIER: dict[str, Option] = {
    "warmup_ratio": _number(None, rules.warmup_ratio),
    "max_prompt_length": _number(None, same("data.max_prompt_length")),
    "max_completion_length": _number(None, same("data.max_completion_length")),
    "truncation_mode": Option(None, lambda given: rules.Verdict(
        {"data.truncation_mode": given.value} if given.value and (given.values["max_prompt_length"] or given.value != "keep_end") else {}, "" if given.values["max_prompt_length"] else "cuts prompts at data.max_prompt_length only"
    )),
    "generate_during_eval": _flag(None, inputs.generation),
    "label_pad_token_id": _number(None, LAYOUT), "padding_value": _number(None, LAYOUT), "is_encoder_decoder": _flag(None, without("models are decoders")),
    "ref_model_init_kwargs": Option(None, without("section reference has path, revision and dtype")),
    "use_liger_loss": _flag(None, idle("log-probs are computed in chunks always")), "base_model_attribute_name": Option(None, LAYOUT),
    "model_adapter_name": Option(None, without("adapters are fresh ones")), "ref_adapter_name": Option(None, without("the reference is the model without adapters, or reference.path")),
    "overwrite_output_dir": _flag(None, idle("a run resumes in its folder; checkpoint.resume: never begins anew")), "logging_dir": Option(None, idle("TensorBoard's files are in tensorboard/ of output_dir")),
    "save_safetensors": _flag(None, idle("exports are safetensors always")), "group_by_length": _flag(None, LAYOUT), "cuda": _flag(None, idle("see --use_cpu")),
}  # fmt: skip
