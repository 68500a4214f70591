"""Every knob of a run, typed and strict. One section a room; leaf names are those of TRL and transformers where they mean the same."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator

from kto_ds.config_data import DataConfig
from kto_ds.config_types import Count, Folder, NonNegative, Positive, Section, Text, refuse_bool
from kto_ds.redaction import secret_in

# A tag tells pydantic which of two types is meant, so that it explains one only. `explain` leaves the tags out again.
Weight = Annotated[
    Annotated[NonNegative, Tag("<number>")] | Annotated[Literal["auto"], Tag("<auto>")],
    Discriminator(lambda value: "<auto>" if value == "auto" else "<number>"),
]


class LoraConfig(Section):
    """Adapters in place of full fine-tuning; the keys are those of peft.LoraConfig."""

    r: Count = Field(16, description="rank of the adapters")
    lora_alpha: Count = Field(32, description="the product of an adapter is scaled by lora_alpha / r")
    lora_dropout: Literal[0] = Field(0, description="dropout is off everywhere, so that policy and reference can be compared: only 0")
    target_modules: Annotated[list[Text], Field(min_length=1)] = Field(
        ["all-linear"], description="names, or ends of names, of the linear layers that get an adapter; all-linear: every one but the head"
    )
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r) instead (arXiv 2312.03732)")

    @field_validator("target_modules", mode="before")
    @classmethod
    def _as_list(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("target_modules")
    @classmethod
    def _check_targets(cls, value: list[str]) -> list[str]:
        if "all-linear" in value and len(value) > 1:
            raise ValueError("all-linear stands for every layer; leave it out, or the names beside it")
        return value


class ModelConfig(Section):
    path: Text = Field(description="folder or hub name of the policy before training")
    revision: str | None = Field(None, description="hub revision, best a commit hash")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="weights in forward and backward; master weights are float32 always")
    attention: Literal["auto", "flash_attention_2", "torch_varlen", "sdpa"] = Field("auto", description="attention kernel of the packed layouts")
    kernels: Literal["auto", "liger", "torch"] = Field("auto", description="RMSNorm, SwiGLU and rotary embeddings: auto takes Liger's on CUDA where it is installed and the model is of a tested family")
    layout: Literal["auto", "prefix_shared", "packed", "padded"] = Field("auto", description="how sequences lie in a micro-batch")
    gradient_checkpointing: bool = Field(True, description="recompute activations in backward")
    gradient_checkpointing_every: Count = Field(1, description="checkpoint every k-th decoder layer: 1 all of them, 2 half; fewer are faster and take more memory")
    gradient_checkpointing_offload: bool = Field(False, description="inputs of checkpointed layers wait for backward in host memory")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model: only for sources you trust")
    lora: LoraConfig | None = Field(None, description="train adapters and leave the weights as they are; null: full fine-tuning")
    load_in_4bit: bool = Field(False, description="hold the weights below the adapters in 4 bits (QLoRA: NF4, by bitsandbytes); only with model.lora, on CUDA")
    router_aux_loss_coef: NonNegative | None = Field(None, description="weight of the load-balancing loss of a mixture of experts; null: as the model's own config says, 0: none")

    @field_validator("load_in_4bit")
    @classmethod
    def _check_4bit(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("lora", "") is None:
            raise ValueError("weights of 4 bits take no gradient, only adapters on them do; set model.lora, such as model: {lora: {r: 16}}, or leave this key out")
        return value

    @field_validator("gradient_checkpointing_every", "gradient_checkpointing_offload")
    @classmethod
    def _check_checkpointing(cls, value: int | bool, info: ValidationInfo) -> int | bool:
        if value != cls.model_fields[info.field_name].default and not info.data.get("gradient_checkpointing", True):
            raise ValueError("no layer is checkpointed with gradient_checkpointing: false; leave this key out, or set model.gradient_checkpointing: true")
        return value


class ReferenceConfig(Section):
    path: Text | None = Field(None, description="reference model; default model.path")
    revision: str | None = Field(None, description="hub revision of reference.path, best a commit hash")
    dtype: Literal["bfloat16", "float32"] | None = Field(None, description="weights of the reference; default model.dtype")
    placement: Literal["auto", "replica", "sharded"] = Field(
        "auto", description="where a model that is only read lies: a copy on every rank, or partitioned over them as by ZeRO-3; auto takes copies where they fit"
    )
    per_token: bool = Field(False, description="store the log-probs of single tokens too, for other ways of masking; training reads sums only")
    artifact: Folder | None = Field(None, description="reference artefact; default <output_dir>/reference")
    max_tokens_per_microbatch: Count = Field(16384, description="token budget of one no-grad forward on one rank")

    @field_validator("revision")
    @classmethod
    def _check_revision(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("path", "") is None:
            raise ValueError("only reference.path has a revision of its own; set model.revision, or name the model under reference.path")
        return value


class LossConfig(Section):
    loss_type: Literal["kto", "apo_zero_unpaired"] = Field("kto", description="apo_zero_unpaired is kto with the reference point held at 0")
    beta: Positive = Field(0.1, description="strength of the pull to the reference (arXiv 2402.01306)")
    desirable_weight: Weight = Field(1.0, description="lambda_D, weight of desirable examples; auto: as recommended for the labels of the training split")
    undesirable_weight: Weight = Field(1.0, description="lambda_U, weight of undesirable examples; auto: likewise")
    kl_fraction: Annotated[Positive, Field(le=1)] = Field(1.0, description="share of a step's KL groups that the reference point z is estimated from; less is faster and z noisier")

    @field_validator("kl_fraction")
    @classmethod
    def _check_fraction(cls, value: float, info: ValidationInfo) -> float:
        if value != 1 and info.data.get("loss_type") == "apo_zero_unpaired":
            raise ValueError("loss_type apo_zero_unpaired estimates no reference point; leave this key out")
        return value


class BatchConfig(Section):
    global_batch_size: Annotated[Count, Field(ge=2)] = Field(32, description="examples in one optimizer step, over all ranks")
    max_tokens_per_microbatch: Count = Field(8192, description="token budget of one forward and backward on one rank; rows are filled up by 1/64 at most")
    max_tokens_per_scoring_microbatch: Count | None = Field(
        None, description="token budget of one forward without gradients on one rank, for mismatched pairs and evaluation; default twice max_tokens_per_microbatch"
    )

    sequence_parallel_size: Count = Field(
        1, description="ranks that share the tokens of each micro-batch (DeepSpeed Ulysses), which then holds so many times max_tokens_per_microbatch: for rows too long for one GPU"
    )

    @property
    def scoring_tokens(self) -> int:
        return self.max_tokens_per_scoring_microbatch or 2 * self.max_tokens_per_microbatch


class OptimConfig(Section):
    learning_rate: Positive = Field(1.0e-6, description="peak learning rate")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial"] = Field("cosine", description="transformers.get_scheduler")
    warmup_ratio: Annotated[NonNegative, Field(le=1)] = Field(0.1, description="share of the steps spent warming up")
    adam_beta1: Annotated[NonNegative, Field(lt=1)] = Field(0.9, description="AdamW")
    adam_beta2: Annotated[NonNegative, Field(lt=1)] = Field(0.999, description="AdamW")
    adam_epsilon: Positive = Field(1.0e-8, description="AdamW")
    weight_decay: NonNegative = Field(0.0, description="AdamW, decoupled")
    max_grad_norm: NonNegative = Field(1.0, description="clip the gradient to this norm; 0 switches clipping off")


class TrainConfig(Section):
    num_train_epochs: Positive = Field(1.0, description="passes over the training examples")
    max_steps: Count | None = Field(None, description="optimizer steps of the run; overrides num_train_epochs")
    setup_timeout_seconds: Count = Field(7200, description="longest time without progress before the first step is done, and in precompute-ref and evaluate; then the run is ended")
    step_timeout_seconds: Count = Field(1800, description="longest time without progress after it: in a micro-batch, an evaluation's, or a save")
    on_nonfinite: Literal["stop", "skip"] = Field("stop", description="a step with NaN or Inf, or with a loss spike, ends the run before its update, or is left out; numerics.jsonl names its rows")
    max_skipped_steps: Count = Field(5, description="with on_nonfinite: skip, steps that may be left out in a row")
    loss_spike_sigmas: Positive | None = Field(None, description="a loss this many standard deviations above the mean of the last 128 steps is a spike; null: none is")


class DeepSpeedConfig(Section):
    config: str = Field("zero3", description="a DeepSpeed JSON file, or the name of one in ds_configs/")


class GenerateConfig(Section):
    """What the policy says to prompts of the evaluation splits; names are those of transformers.GenerationConfig."""

    num_prompts: Count = Field(8, description="distinct prompts of each evaluation split, spread over it")
    max_new_tokens: Count = Field(128, description="longest completion")
    temperature: NonNegative = Field(0.0, description="0: always the likeliest token; 1: drawn from the policy's own distribution, by the run's seed")
    top_p: Annotated[Positive, Field(le=1)] = Field(1.0, description="draw from the likeliest tokens that have this probability together")
    every: Count = Field(1, description="generate in every so many evaluations, and always before the first step and in the last evaluation")


class EvalConfig(Section):
    eval_steps: Count | None = Field(None, description="evaluate every so many steps; null: only at the end")
    path: Text | None = Field(None, description="model that `kto-ds evaluate` scores; default <output_dir>/export")
    generate: GenerateConfig | None = Field(None, description="write what the policy answers to samples.jsonl; null: it is not asked")


class CheckpointConfig(Section):
    save_steps: Count = Field(100, description="save every so many steps; the last step is saved always")
    save_total_limit: Annotated[Count, Field(ge=2)] = Field(3, description="verified checkpoints that are kept")
    resume: Literal["auto", "never"] = Field("auto", description="auto continues from the newest verified checkpoint of output_dir")
    metric_for_best_model: Text | None = Field(
        None, description="metric of an evaluation, <split>/<metric> such as eval/rewards/auc: the step where it is best is saved and kept, whatever else goes"
    )
    greater_is_better: bool | None = Field(None, description="whether more of metric_for_best_model is better; default: unless its name ends in loss")

    @field_validator("greater_is_better")
    @classmethod
    def _check_greater_is_better(cls, value: bool | None, info: ValidationInfo) -> bool | None:
        if value is not None and info.data.get("metric_for_best_model", "") is None:
            raise ValueError("is about checkpoint.metric_for_best_model; set that, or leave this key out")
        return value

    @property
    def best_is_greatest(self) -> bool:
        if self.greater_is_better is None:
            return not (self.metric_for_best_model or "").endswith("loss")
        return self.greater_is_better


class WandbConfig(Section):
    mode: Literal["disabled", "offline", "online"] = Field("disabled", description="wandb mode")
    project: str = Field("kto_ds", description="wandb project")
    name: str | None = Field(None, description="wandb run name; default the name of output_dir")


class ReportConfig(Section):
    logging_steps: Count = Field(1, description="log means over this many steps; an evaluation or a save has a line of its own besides")
    wandb: WandbConfig = WandbConfig()
    tensorboard: bool = Field(False, description="write the metrics for TensorBoard too, to <output_dir>/tensorboard (pip install 'kto-ds[tensorboard]')")


def _texts(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, text) of every text in nested dicts and lists."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, (dict, list)):
        for part, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(inner, f"{key}.{part}".lstrip("."))


class RunConfig(Section):
    output_dir: Folder = Field(description="folder of the run: artefacts, checkpoints, metrics, export")
    seed: Annotated[int, BeforeValidator(refuse_bool), Field(ge=0, lt=2**32)] = Field(42, description="data order and KL groups")
    model: ModelConfig
    data: DataConfig
    reference: ReferenceConfig = ReferenceConfig()
    loss: LossConfig = LossConfig()
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    report: ReportConfig = ReportConfig()

    @model_validator(mode="after")
    def _check_across_sections(self) -> "RunConfig":
        if self.batch.global_batch_size < self.data.kl_group_size:
            raise ValueError(
                f"batch.global_batch_size: a step of {self.batch.global_batch_size} cannot hold a KL group of {self.data.kl_group_size} prompts; "
                f"raise it to {self.data.kl_group_size} or more, or lower data.kl_group_size"
            )
        if self.eval.generate and not self.data.eval_splits and self.data.held_out_fraction is None:
            raise ValueError("eval.generate: there are no evaluation rows to take prompts from; list sources under data.eval, or set data.held_out_fraction")
        for key, text in _texts(self.model_dump(mode="json")):
            if secret := secret_in(text):
                raise ValueError(f"{key}: holds {secret}, which would be written to the run's files; take it out, and log in by a variable or a file of the service")
        return self

    @property
    def dataset_dir(self) -> Path:
        return self.data.artifact or self.output_dir / "dataset"

    @property
    def reference_dir(self) -> Path:
        return self.reference.artifact or self.output_dir / "reference"

    @property
    def starts_from_reference(self) -> bool:
        """Whether policy and reference are one model before the first update. A reference that is named is read in full, not in 4 bits."""
        own = self.model.path, self.model.revision
        is_named = self.reference.path is not None and (str(Path(self.reference.path)), self.reference.revision) == (str(Path(own[0])), own[1])
        return self.reference.path is None or is_named and not self.model.load_in_4bit

    @property
    def export_dir(self) -> Path:
        return self.output_dir / "export"

    @property
    def merged_dir(self) -> Path:
        return self.output_dir / "merged"
