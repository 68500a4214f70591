"""From a Hugging Face folder or hub name to a Policy, partitioned while it is read where ZeRO-3 wants that."""

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import deepspeed
import torch
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import meta_device_safe_creation_ops
from transformers.integrations import HfDeepSpeedConfig
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils.loading_report import LoadStateDictInfo

from kto_ds.config import ModelConfig
from kto_ds.errors import UserError, excerpt
from kto_ds.model.attention import Exchange, register_attention
from kto_ds.model.checkpointing import checkpoint_layers
from kto_ds.model.kernels import Kernels, use_liger
from kto_ds.model.lora import add_adapters, four_bits, load_adapter
from kto_ds.model.policy import Policy
from kto_ds.model.stream import Partitioning, Range, missing_weights, plan_sources, read_partitioned
from kto_ds.model.support import DTYPES, padded_attention, weight_files
from kto_ds.model.weight_files import open_weights


def destination(model: ModelConfig, partition_for: dict | None, device: torch.device) -> dict:
    """Return where load_policy is to put the weights, as its keyword arguments: in partitions where there is a DeepSpeed stage 3 config, else on `device`."""
    # transformers does not partition 4-bit weights: these are small enough to lie on one device until DeepSpeed does.
    return {"partition_for": partition_for} if partition_for and not model.load_in_4bit else {"device": device}


def load_policy(
    model: ModelConfig,
    config: PretrainedConfig,
    *,
    layout: str,
    backend: str,
    gradient_checkpointing: bool,
    kernels: Kernels = "torch",
    exchange: Exchange | None = None,
    partition_for: dict | None = None,
    device: torch.device | None = None,
    beat: Callable[[], object] = lambda: None,
    seed: int = 0,
    adapter: Path | None = None,
) -> Policy:
    """Read the weights and return the Policy, dropout and noise of routers off, in train mode so that checkpointing is active.

    With `partition_for`, a DeepSpeed stage 3 config, every rank reads its part of every parameter and no more. With `device` the weights are
    read to it one by one, so that the ranks of a machine do not each hold a copy in its memory first.
    `beat` is called as the reading goes on. `model.lora` puts fresh adapters on, drawn from `seed`; `adapter` is a folder with trained ones.
    """
    for name, value in config.to_dict().items():
        if ("dropout" in name or name.endswith("pdrop") or "jitter" in name) and isinstance(value, float):
            setattr(config, name, 0.0)
    if layout != "padded":
        attention = register_attention(backend, exchange)
    else:
        attention = padded_attention(config)
    folder, names = weight_files(model)
    began, size = time.monotonic(), sum((folder / name).stat().st_size for name in names)
    is_main = not deepspeed.comm.is_initialized() or deepspeed.comm.get_rank() == 0
    try:
        lm = _stream(model, config, attention, partition_for, beat) if partition_for else None
        lm = lm or _from_pretrained(model, config, attention, partition_for, None if device is None else {"": device})
    except torch.OutOfMemoryError as error:
        remedy = "use more GPUs with a deepspeed.config of stage 3, or one with offload; of a model that is only read, set reference.placement: sharded"
        raise UserError(f"{model.path} does not fit into the device's memory: {str(error).splitlines()[0]}", where="model.path", remedy=remedy) from error
    seconds = time.monotonic() - began
    if is_main:
        print(f"weights: {size / 1e9:,.2f} GB from {len(names)} file{'s' if len(names) > 1 else ''} in {seconds:.1f} s, {size / 1e9 / seconds:.2f} GB/s", flush=True)
    head = lm.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise UserError(f"{config.model_type} has no plain output head", where="model.path")
    if model.lora is not None:
        add_adapters(lm, model.lora, seed=seed)
    if adapter is not None:
        load_adapter(lm, adapter)
    if kernels == "liger":
        use_liger(lm)
    if gradient_checkpointing:
        checkpoint_layers(lm, every=model.gradient_checkpointing_every, offload=model.gradient_checkpointing_offload)
    return Policy(lm).train()


def load_plain(model: ModelConfig, config: PretrainedConfig, *, device_map: dict | str, adapter: Path | None = None) -> PreTrainedModel:
    """Return the model as transformers runs it, with its own attention and head, in eval mode; `adapter` is a folder with trained adapters for it."""
    lm = _from_pretrained(model, config, padded_attention(config), None, device_map)
    if adapter is not None:
        load_adapter(lm, adapter)
    return lm.eval()


def _from_pretrained(model: ModelConfig, config: PretrainedConfig, attention: str, partition_for: dict | None, device_map: dict | str | None) -> PreTrainedModel:
    # transformers looks for a living HfDeepSpeedConfig through a weak reference while it loads.
    keep_alive = HfDeepSpeedConfig(partition_for) if partition_for else contextlib.nullcontext()
    folder, _ = weight_files(model)
    try:
        lm, loading = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=DTYPES[model.dtype], attn_implementation=attention,
            use_safetensors=True, trust_remote_code=model.trust_remote_code, output_loading_info=True,
            device_map=device_map,
            quantization_config=four_bits(DTYPES[model.dtype]) if model.load_in_4bit else None,
        )  # fmt: skip
    except torch.OutOfMemoryError:  # a RuntimeError, whose remedy is not another model
        raise
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:  # a quantised model asks for libraries of its own
        raise UserError(f"cannot load {model.path}: {str(error).splitlines()[0]}", where="model.path") from error
    del keep_alive
    _require_complete(model, sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"]))
    return lm


def _require_complete(model: ModelConfig, missing: list[str]) -> None:
    if missing:
        raise UserError(f"{len(missing)} weights are missing from {model.path} or have another shape, the first: {missing[0]}", where="model.path")


def _stream(model: ModelConfig, config: PretrainedConfig, attention: str, partition_for: dict, beat: Callable[[], object]) -> PreTrainedModel | None:
    """Return the model with its parameters partitioned and read, each rank its part; None, and a notice, where only from_pretrained can read it."""
    folder, names = weight_files(model)
    is_main = deepspeed.comm.get_rank() == 0
    reason = _unstreamable(config, folder)
    if not reason:
        named = copy.deepcopy(config)
        named.name_or_path = str(folder)
        with torch.device("meta"), meta_device_safe_creation_ops():
            lm = AutoModelForCausalLM.from_config(named, dtype=DTYPES[model.dtype], attn_implementation=attention)
        try:
            with _reading(model):
                files = open_weights(folder, names)
            sources = plan_sources(lm, files)
            missing = missing_weights(lm, sources)
            reason = "it may lack weights" if missing and lm._keys_to_ignore_on_load_missing else ""
        except UserError:
            raise
        except Exception as error:  # of any conversion that transformers may have, or a dtype that torch has not
            reason = f"{type(error).__name__}: {error}"
    if reason:
        if is_main:
            print(f"notice: {excerpt(model.path)} is read by transformers, whole on rank 0: {excerpt(reason)}", flush=True)
        return None
    _require_complete(model, missing)
    partitioning, num_ranks = _partitioning(partition_for)
    with tqdm(total=files.num_bytes // num_ranks, desc="weights, rank 0", unit="B", unit_scale=True, disable=None if is_main else True) as bar, _reading(model):
        read_partitioned(lm, sources, files._replace(on_read=lambda num_bytes: (bar.update(num_bytes), beat())), partitioning)
    # What the files do not have, such as rotary frequencies, transformers makes as from_pretrained does.
    info = LoadStateDictInfo(missing_keys=set(), unexpected_keys=set(), mismatched_keys=set(), error_msgs=[], conversion_errors={}, skipped_pp_keys=set())
    lm._finalize_model_loading(lm, LoadStateDictConfig(pretrained_model_name_or_path=str(folder), device_map={"": partitioning.device}), info)
    return lm.eval()


def _unstreamable(config: PretrainedConfig, folder: Path) -> str:
    """Return why the files of a model cannot be read part by part; an empty text where they can."""
    if config.to_dict().get("quantization_config"):
        return "its weights are quantised"
    if (folder / "adapter_config.json").is_file():
        return "an adapter lies beside its weights"
    return "" if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else "it has code of its own"


@contextlib.contextmanager
def _reading(model: ModelConfig) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot load {model.path}: {str(error).splitlines()[0]}", where="model.path") from error


def _partitioning(deepspeed_config: dict) -> tuple[Partitioning, int]:
    """Return how ZeRO-3 partitions parameters, and over how many ranks: contiguous ranges of the flattened parameter, padded to equal lengths."""
    zero = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=deepspeed_config)  # of nothing yet: the parameters come one by one

    def part(numel: int, rank: int, num_ranks: int) -> Range:
        size = -(-numel // zero.dp_world_size) * zero.dp_world_size // num_ranks
        return min(rank * size, numel), min((rank + 1) * size, numel)

    def kept(numel: int) -> list[Range]:
        parts = [part(numel, zero.rank, zero.dp_world_size)]
        if zero.zero_param_process_group is not None:  # ZeRO++ keeps a second part, of those that the ranks of a node share
            parts.append(part(numel, zero.rank_in_group, zero.num_ranks_in_param_group))
        return parts

    def partition(parameter: nn.Parameter) -> None:
        # What Init does with a parameter, but for the broadcast of the whole from rank 0.
        zero._convert_to_deepspeed_param(parameter)
        parameter.partition()

    return Partitioning(zero.dtype, zero.local_device, kept, partition), zero.dp_world_size
