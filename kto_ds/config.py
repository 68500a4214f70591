"""Every knob of a run, typed and strict. One section a room; leaf names are those of TRL and transformers where they mean the same."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from kto_ds.errors import UserError, excerpt


def _refuse_bool(value: object) -> object:
    # pydantic reads True as 1; `save_steps: true` is a mistake, not a 1.
    if isinstance(value, bool):
        raise ValueError("a number is expected, not true or false")
    return value


Count = Annotated[int, BeforeValidator(_refuse_bool), Field(ge=1)]
Number = Annotated[float, BeforeValidator(_refuse_bool), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelConfig(Section):
    path: str = Field(description="folder or hub name of the policy before training")
    revision: str | None = Field(None, description="hub revision, best a commit hash")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="weights in forward and backward; master weights are float32 always")
    attention: Literal["auto", "flash_attention_2", "torch_varlen", "sdpa"] = Field("auto", description="attention kernel of the packed layouts")
    layout: Literal["auto", "prefix_shared", "packed", "padded"] = Field("auto", description="how sequences lie in a micro-batch")
    gradient_checkpointing: bool = Field(True, description="recompute activations in backward")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model: only for sources you trust")
    lora: None = Field(None, description="adapters: not available yet, only null")
    router_aux_loss_coef: None = Field(None, description="mixture-of-experts balance: not available yet, only null")


class SourceConfig(Section):
    path: str = Field(description="JSON, JSONL, Parquet or CSV file, a folder saved by datasets, or a hub name")
    split: str | None = Field(None, description="split of a hub or saved dataset")
    weight: Literal[1, 1.0] = Field(1.0, description="share of the source: only 1 so far")


class DataConfig(Section):
    train: list[SourceConfig] = Field(min_length=1, description="training sources, read in order")
    eval: list[SourceConfig] = Field([], description="evaluation sources, read in order")
    max_length: Annotated[Count, Field(ge=2)] = Field(2048, description="tokens of prompt and completion together")
    truncation_mode: Literal["keep_start"] = Field("keep_start", description="long completions lose their end; a prompt of max_length tokens is dropped")
    shuffle: bool = Field(True, description="seeded grouping and epoch order; false keeps file order")
    kl_group_size: Annotated[Count, Field(ge=2)] = Field(4, description="distinct prompts among which completions are swapped for the reference point")
    on_bad_row: Literal["error"] = Field("error", description="what a row that breaks the schema does")
    dataset_num_proc: Count | None = Field(None, description="tokenization workers; the result does not depend on it")
    artifact: Path | None = Field(None, description="dataset artefact; default <output_dir>/dataset")


class ReferenceConfig(Section):
    path: str | None = Field(None, description="reference model; default model.path")
    artifact: Path | None = Field(None, description="reference artefact; default <output_dir>/reference")
    max_tokens_per_microbatch: Count = Field(16384, description="token budget of one no-grad forward on one rank")


class LossConfig(Section):
    loss_type: Literal["kto", "apo_zero_unpaired"] = Field("kto", description="apo_zero_unpaired is kto with the reference point held at 0")
    beta: Positive = Field(0.1, description="strength of the pull to the reference (arXiv 2402.01306)")
    desirable_weight: NonNegative = Field(1.0, description="lambda_D, weight of desirable examples")
    undesirable_weight: NonNegative = Field(1.0, description="lambda_U, weight of undesirable examples")


class BatchConfig(Section):
    global_batch_size: Annotated[Count, Field(ge=2)] = Field(32, description="examples in one optimizer step, over all ranks")
    max_tokens_per_microbatch: Count = Field(8192, description="token budget of one forward and backward on one rank")


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


class DeepSpeedConfig(Section):
    config: str = Field("zero3", description="a DeepSpeed JSON file, or the name of one in ds_configs/")


class EvalConfig(Section):
    eval_steps: Count | None = Field(None, description="evaluate every so many steps; null: only at the end")
    path: str | None = Field(None, description="model that `kto-ds evaluate` scores; default <output_dir>/export")
    generate: None = Field(None, description="sampling in evaluation: not available yet, only null")


class CheckpointConfig(Section):
    save_steps: Count = Field(100, description="save every so many steps; the last step is saved always")
    save_total_limit: Annotated[Count, Field(ge=2)] = Field(3, description="verified checkpoints that are kept")
    resume: Literal["auto", "never"] = Field("auto", description="auto continues from the newest verified checkpoint of output_dir")


class WandbConfig(Section):
    mode: Literal["disabled", "offline", "online"] = Field("disabled", description="wandb mode")
    project: str = Field("kto_ds", description="wandb project")
    name: str | None = Field(None, description="wandb run name; default the name of output_dir")


class ReportConfig(Section):
    logging_steps: Count = Field(1, description="log means over this many steps")
    wandb: WandbConfig = WandbConfig()


class RunConfig(Section):
    output_dir: Path = Field(description="folder of the run: artefacts, checkpoints, metrics, export")
    seed: Annotated[int, BeforeValidator(_refuse_bool), Field(ge=0, lt=2**32)] = Field(42, description="data order and KL groups")
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
        return self

    @property
    def dataset_dir(self) -> Path:
        return self.data.artifact or self.output_dir / "dataset"

    @property
    def reference_dir(self) -> Path:
        return self.reference.artifact or self.output_dir / "reference"

    @property
    def export_dir(self) -> Path:
        return self.output_dir / "export"


def read_yaml(path: Path) -> dict:
    """Return the mapping in the YAML 1.2 file at `path`; duplicate keys and tags that build objects are errors."""
    try:
        values = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the config: {error.strerror}", where=str(path), remedy="give the path of a YAML file with --config") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"not valid YAML: {' '.join(str(error).split())}", where=str(path)) from error
    if not isinstance(values, dict):
        raise UserError(f"expected a mapping of sections, found {excerpt(values)}", where=str(path))
    return values


def write_yaml(config: RunConfig, stream) -> None:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    yaml.dump(config.model_dump(mode="json"), stream)


def known_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of the config, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from known_keys(field.annotation, f"{prefix}{name}.")


def nearest_key(key: str) -> str:
    """Return a hint with the known key most like `key`: in its own section first, then by its last part anywhere."""
    section, _, leaf = key.rpartition(".")
    known = list(known_keys())
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    anywhere = {name.rpartition(".")[2]: name for name in reversed(known)}
    for candidates, cutoff in ((siblings, 0.6), (anywhere, 0.75), (siblings, 0.0), (anywhere, 0.0)):
        if close := difflib.get_close_matches(leaf, candidates, n=1, cutoff=cutoff):
            return f"did you mean {candidates[close[0]]}?" if cutoff else f"the nearest known key is {candidates[close[0]]}; all keys: kto-ds train --help"
    raise AssertionError("the config has keys")


def explain(error: ValidationError, where: str) -> UserError:
    """Turn pydantic's findings into one message that names each key, what was found and what is expected."""
    lines = []
    for found in error.errors():
        key = ".".join(str(part) for part in found["loc"])
        if found["type"] == "extra_forbidden":
            lines.append(f"{key}: unknown key; {nearest_key(key)}")
        elif found["type"] == "missing":
            lines.append(f"{key}: required, but not set")
        else:
            message = found["msg"].removeprefix("Value error, ")
            lines.append(f"{key}: {message}; found {excerpt(found['input'])}" if key else message)
    if len(lines) > 1:
        lines = [f"{len(lines)} keys cannot be used"] + [f"  {line}" for line in lines]
    return UserError("\n".join(lines), where=where)
