"""The DeepSpeed JSON: who owns which key, and how a file of ds_configs/ becomes complete."""

import difflib
import json
from pathlib import Path

from pydantic import ValidationError

import kto_ds
from kto_ds.config import OptimConfig
from kto_ds.errors import UserError, excerpt
from kto_ds.runtime.zero_keys import refuse_conflicts

# What DeepSpeed alone decides. DeepSpeed ignores other top-level keys in silence, so a misspelt one must be refused here.
ALLOWED_KEYS = frozenset(
    "zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer communication_data_type prescale_gradients "
    "gradient_predivide_factor disable_allgather disable_python_gc wall_clock_breakdown memory_breakdown dump_state log_level "
    "flops_profiler comms_logger aio".split()
)
# What the run config decides: DeepSpeed key -> our key.
OWNED_KEYS = {
    "train_batch_size": "batch.global_batch_size",
    "train_micro_batch_size_per_gpu": "batch.max_tokens_per_microbatch",
    "gradient_accumulation_steps": "batch.max_tokens_per_microbatch",
    "gradient_clipping": "optim.max_grad_norm",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "torch_autocast": "model.dtype",
    "data_types": "model.dtype",
    "optimizer": "optim",
    "scheduler": "optim.lr_scheduler_type",
    "steps_per_print": "report.logging_steps",
}
DEEPSPEED_LIVE_NUMEL = 1_000_000_000  # DeepSpeed's own default


def find_deepspeed_config(name: str) -> Path:
    """Return the file for `deepspeed.config`: a path, or the name of a file of ds_configs/ without its ending."""
    package = Path(kto_ds.__file__).parent
    # Inside the package when installed, beside it in a checkout.
    folders = [package / "ds_configs", package.parent / "ds_configs"]
    for candidate in [Path(name), *(folder / f"{name}.json" for folder in folders)]:
        if candidate.is_file():
            return candidate
    known = sorted({path.stem for folder in folders for path in folder.glob("*.json")})
    raise UserError(f"no such file, and no such name in ds_configs/: {name}", where="deepspeed.config", remedy=f"give a JSON file or one of {', '.join(known)}")


def read_deepspeed_config(name: str) -> dict:
    """Return the checked content of a DeepSpeed JSON; errors name the key."""
    path = find_deepspeed_config(name)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"not a readable JSON file: {error}", where=str(path)) from error
    if not isinstance(raw, dict):
        raise UserError(f"expected a JSON object, found {excerpt(raw)}", where=str(path), remedy='write {"zero_optimization": {"stage": 3}}')
    for key, value in raw.items():
        if key in OWNED_KEYS:
            if value != "auto":
                raise UserError(f"{key} = {excerpt(value)} is decided by {OWNED_KEYS[key]}", where=str(path), remedy=f"remove {key} from the DeepSpeed file")
        elif key not in ALLOWED_KEYS:
            close = difflib.get_close_matches(key, [*ALLOWED_KEYS, *OWNED_KEYS], n=1)
            raise UserError(f"{key}: unknown key" + (f"; did you mean {close[0]}?" if close else ""), where=str(path))
    refuse_conflicts(raw, where=str(path))
    return {key: value for key, value in raw.items() if key not in OWNED_KEYS}


def check_zero_section(section: dict, where: str) -> None:
    """Let DeepSpeed itself judge the keys of zero_optimization; a UserError names the first wrong one."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**section)
    except (ValidationError, TypeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        key = ".".join(["zero_optimization", *map(str, first["loc"])])
        raise UserError(f"{key}: {first['msg']}", where=where, remedy="correct or remove it; ds_configs/README.md lists the keys") from error


def zero_stage(deepspeed_config: dict) -> int:
    return int(deepspeed_config.get("zero_optimization", {}).get("stage", 0))


def reading_config(raw: dict, *, dtype: str) -> dict:
    """Return the config for a partitioned model that is only read: the parameters' part of a stage 3 file, DeepSpeed's defaults without one."""
    section = raw.get("zero_optimization", {}) if zero_stage(raw) == 3 else {"stage": 3}
    completed = {
        "steps_per_print": None,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {key: value for key, value in section.items() if key not in ("offload_optimizer", "zero_hpz_partition_size")},
    }
    return {**completed, "bf16": {"enabled": True}} if dtype == "bfloat16" else completed


def gather_by_layer(completed: dict, *, layer_numel: int) -> dict:
    """Return a stage 3 config that prefetches one decoder layer ahead and holds two, unless the file says otherwise. `layer_numel`: elements of a layer.

    The layers are leaf modules, gathered by one collective each. A smaller prefetch would gather a layer in two parts; a shorter reuse distance
    would gather it twice between the recomputation and its backward. docs/benchmarks/zero3.md has what was measured.
    """
    two_layers = max(DEEPSPEED_LIVE_NUMEL, 2 * layer_numel)
    derived = {"stage3_prefetch_bucket_size": layer_numel, "stage3_max_live_parameters": two_layers, "stage3_max_reuse_distance": two_layers}
    given = {key: value for key, value in completed["zero_optimization"].items() if value != "auto"}  # which DeepSpeed would take for its own default
    return {**completed, "zero_optimization": {**derived, **given}}


def offloads_parameters(raw: dict) -> bool:
    return zero_stage(raw) == 3 and raw["zero_optimization"].get("offload_param", {}).get("device", "none") != "none"


def complete_deepspeed_config(raw: dict, *, optim: OptimConfig, dtype: str, on_cuda: bool) -> dict:
    """Return the config for deepspeed.initialize: the file, and everything the run config owns."""
    offload = raw.get("zero_optimization", {}).get("offload_optimizer", {})
    offloads = offload.get("device", "none") != "none"
    if offload.get("ratio", 1.0) < 1 and not on_cuda:
        raise UserError("zero_optimization.offload_optimizer.ratio: without a GPU there is nothing to share the optimizer with", where="deepspeed.config", remedy="use zero3")
    params = {
        "lr": optim.learning_rate,
        "betas": [optim.adam_beta1, optim.adam_beta2],
        "eps": optim.adam_epsilon,
        "weight_decay": optim.weight_decay,
    }
    if offloads and on_cuda:
        optimizer = {"type": "AdamW", "params": params}  # DeepSpeedCPUAdam, compiled on first use
    else:
        optimizer = {"type": "AdamW", "params": {**params, "torch_adam": True, "fused": on_cuda}}
    completed = {
        "steps_per_print": None,
        **raw,
        # Micro-batches hold unequal numbers of examples, so the loop sets every boundary and scale itself.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # DeepSpeed clips at 1.0 when the key is absent.
        "gradient_clipping": optim.max_grad_norm,
        "optimizer": optimizer,
    }
    if dtype == "bfloat16":
        completed["bf16"] = {"enabled": True}
        # Stage 0 can only accumulate in the dtype of the weights.
        if zero_stage(raw) > 0:
            completed["data_types"] = {"grad_accum_dtype": "fp32"}
    return completed
