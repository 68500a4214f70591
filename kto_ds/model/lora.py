"""LoRA (arXiv 2106.09685) by peft: adapters put on a model, read, written and merged; and the 4-bit weights below them, QLoRA (arXiv 2305.14314).

Adapters go into the model in place, without peft's wrapper: whatever else handles a policy sees the modules it knows. They alone get a gradient.
They have the dtype of the weights, as ZeRO-3 wants of all parameters; DeepSpeed keeps float32 masters of them.

Legend: R rank, I inputs and O outputs of a linear layer.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kto_ds.config import LoraConfig, ModelConfig
from kto_ds.errors import UserError, excerpt, reading
from kto_ds.model.policy import decoder_layers
from kto_ds.model.support import DTYPES, FOUR_BITS

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAME = "default"  # peft's own for the only adapter of a layer
MERGE = "merge it into its model with peft, and give the merged one"
PREFIX = "base_model.model."  # of every name in a file of peft


class Adapter(NamedTuple):
    """An adapter on disk, and the model it belongs to."""

    folder: Path
    base: str  # folder or hub name
    revision: str | None


def require_lora_served(model: ModelConfig, config: PretrainedConfig, device: torch.device) -> None:
    """Refuse adapters that cannot be trained here, or that this model has no place for. No weight is read."""
    if model.load_in_4bit:
        require_4bit(device)
    if model.lora is not None:
        require_peft("model.lora")
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config, dtype=DTYPES[model.dtype], trust_remote_code=model.trust_remote_code)
        add_adapters(lm, model.lora, seed=0)


def require_peft(where: str) -> None:
    if find_spec("peft") is None:
        raise UserError("adapters need peft, which is not installed", where=where, remedy="pip install 'kto-ds[lora]'")


def require_4bit(device: torch.device) -> None:
    if device.type != "cuda":
        raise UserError(f"weights of 4 bits need a CUDA device, and this is {device.type}", where="model.load_in_4bit", remedy="leave it out: LoRA on whole weights runs anywhere")
    if find_spec("bitsandbytes") is None:
        raise UserError("weights of 4 bits need bitsandbytes, which is not installed", where="model.load_in_4bit", remedy="pip install 'kto-ds[qlora]'")


def four_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return how transformers is to read weights as 4-bit ones, for products in `dtype`."""
    # Stored as numbers of this dtype too: ZeRO-3 gathers all parameters of a layer in one piece of memory.
    return BitsAndBytesConfig(**FOUR_BITS, bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_storage=dtype)


def add_adapters(lm: PreTrainedModel, lora: LoraConfig, *, seed: int) -> None:
    """Put fresh adapters on the model and freeze all else. The product of a fresh one is zero; equal seeds give equal ones on every rank."""
    from peft import inject_adapter_in_model

    config = _peft_config(lora, _target_names(lm, lora))
    with torch.random.fork_rng(devices=[]):  # made on the host, wherever the model lies
        torch.manual_seed(seed)
        inject_adapter_in_model(config, lm)


def in_words(model: ModelConfig, lm: PreTrainedModel) -> str:
    """Return what of an adapted model is trained."""
    adapters = {name: parameter for name, parameter in lm.named_parameters() if ".lora_" in name}
    names = sorted({layer.rpartition(".")[2] for layer in adapted_layers(adapters)})
    numel = sum(parameter.numel() for parameter in adapters.values())
    return f"LoRA of rank {model.lora.r} on {', '.join(names)}: {numel:,} parameters are trained{', beside weights of 4 bits' if model.load_in_4bit else ''}"


def find_adapter(path: str) -> Adapter | None:
    """Return the adapter in a local folder, None where there is something else; UserError for one that cannot be served."""
    folder = Path(path)
    if not (folder / ADAPTER_CONFIG).is_file() or (folder / "config.json").is_file():
        return None
    require_peft(str(folder))
    with reading(folder):
        try:
            entries = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
            kind, base, revision = entries["peft_type"], entries["base_model_name_or_path"], entries.get("revision")
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"not the config of an adapter: {excerpt(str(error))}", where=str(folder / ADAPTER_CONFIG)) from error
    if kind != "LORA" or not isinstance(base, str):
        raise UserError(f"an adapter of kind {excerpt(kind)} on {excerpt(base)}; only LoRA is served", where=str(folder), remedy=MERGE)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"there is no {ADAPTER_WEIGHTS}", where=str(folder), remedy="save the adapter as safetensors; pickled weights are not read")
    return Adapter(folder, base, revision)


def load_adapter(lm: PreTrainedModel, folder: Path) -> None:
    """Put the adapters of a folder on their model, which may be partitioned already."""
    from peft import PeftConfig, inject_adapter_in_model

    head = lm.get_output_embeddings()
    try:
        with reading(folder):
            config, stored = PeftConfig.from_pretrained(folder), load_file(folder / ADAPTER_WEIGHTS)
        inject_adapter_in_model(config, lm)
    except (ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"this adapter cannot be put on its base model: {excerpt(str(error).splitlines()[0])}", where=str(folder)) from error
    own = {file_name(name): parameter for name, parameter in lm.named_parameters() if ".lora_" in name}
    odd = sorted(own.keys() ^ stored.keys()) or [name for name in own if own[name].shape != stored[name].shape]
    if odd or lm.get_output_embeddings() is not head:
        what = f"more than plain LoRA on linear layers below the head: {excerpt(odd[0])}" if odd else "an adapter on the output head"
        raise UserError(f"an adapter that is not served, {what}", where=str(folder), remedy=MERGE)
    for name, parameter in own.items():
        parameter.data.copy_(stored[name])


@contextmanager
def without_adapters(lm: PreTrainedModel) -> Iterator[None]:
    """Have the model be the one below its adapters inside the block."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [module for module in lm.modules() if isinstance(module, BaseTunerLayer)]
    for module in adapted:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in adapted:
            module.enable_adapters(True)


def write_adapter(folder: Path, lora: LoraConfig, weights: dict[str, Tensor], *, base: str, revision: str | None) -> None:
    """Write adapters in the form of peft; `weights` by their names in the model."""
    layers = adapted_layers(weights)
    names = sorted({layer.rpartition(".")[2] for layer in layers}) if lora.target_modules == ["all-linear"] else lora.target_modules
    config = _peft_config(lora, names)
    config.base_model_name_or_path, config.revision, config.inference_mode = base, revision, True
    config.save_pretrained(folder)
    stored = [name for layer in layers for name in weight_names(layer)]
    save_file({file_name(name): weights[name].contiguous() for name in stored}, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


@torch.no_grad()
def merge_adapters(lm: PreTrainedModel, lora: LoraConfig, weights: dict[str, Tensor]) -> None:
    """Add the products of adapters to the weights they lie beside, in float32 and rounded once; `weights` by their names in the adapted model."""
    scale = lora.lora_alpha / (lora.r**0.5 if lora.use_rslora else lora.r)
    for layer in adapted_layers(weights):
        first, second = (weights[name].float() for name in weight_names(layer))  # [R, I], [O, R]
        module = lm.get_submodule(layer)
        product = scale * (second @ first)  # [O, I]
        module.weight.copy_(module.weight.float() + (product.T if isinstance(module, Conv1D) else product))


def adapted_layers(weights: dict[str, Tensor]) -> list[str]:
    """Return the names of the layers that these adapters lie on."""
    return [name.removesuffix(f".lora_A.{NAME}.weight") for name in weights if name.endswith(f".lora_A.{NAME}.weight")]


def weight_names(layer: str) -> tuple[str, str]:
    """Return the names of the two weights of a layer's adapter, in the order in which they are applied."""
    return f"{layer}.lora_A.{NAME}.weight", f"{layer}.lora_B.{NAME}.weight"


def file_name(name: str) -> str:
    """Return what a file of peft calls a parameter of an adapted model."""
    return PREFIX + name.replace(f".{NAME}.", ".")


def _target_names(lm: PreTrainedModel, lora: LoraConfig) -> list[str]:
    """Return the names, or ends of names, of the layers that get an adapter; UserError for one that no such layer has."""
    head = lm.get_output_embeddings()
    within = {id(module) for layer in decoder_layers(lm) for module in layer.modules()}
    linear = {name for name, module in lm.named_modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head and (not within or id(module) in within)}
    leaves = sorted({name.rpartition(".")[2] for name in linear})
    targets = leaves if lora.target_modules == ["all-linear"] else lora.target_modules
    for target in targets:
        matched = {name for name, _ in lm.named_modules() if name == target or name.endswith(f".{target}")}
        if not matched or matched - linear:
            what = f"{excerpt(target)} names {min(matched - linear)}, which is no linear layer of a decoder layer" if matched else f"no layer is called {excerpt(target)}"
            raise UserError(what, where="model.lora.target_modules", remedy=f"give all-linear, or some of {', '.join(leaves)}; embeddings, norms, experts and the head get no adapter")
    return targets


def _peft_config(lora: LoraConfig, target_names: list[str]):
    import peft

    options = {"r": lora.r, "lora_alpha": lora.lora_alpha, "use_rslora": lora.use_rslora}
    return peft.LoraConfig(**options, target_modules=target_names, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM")
