"""From a Hugging Face folder or hub name to a Policy, partitioned while it is read where ZeRO-3 wants that."""

import contextlib

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.integrations import HfDeepSpeedConfig

from kto_ds.config import ModelConfig
from kto_ds.errors import UserError
from kto_ds.model.attention import register_attention
from kto_ds.model.checkpointing import checkpoint_layers
from kto_ds.model.kernels import Kernels, use_liger
from kto_ds.model.policy import Policy
from kto_ds.model.support import DTYPES, weight_files


def load_policy(
    model: ModelConfig,
    config: PretrainedConfig,
    *,
    layout: str,
    backend: str,
    gradient_checkpointing: bool,
    kernels: Kernels = "torch",
    partition_for: dict | None = None,
    device: torch.device | None = None,
) -> Policy:
    """Read the weights and return the Policy, dropout off, in train mode so that checkpointing is active.

    With `partition_for`, a DeepSpeed stage 3 config, parameters are partitioned over the ranks while they are read. With `device` they are
    read to it one by one, so that the ranks of a machine do not each hold a copy in its memory first.
    """
    for name, value in config.to_dict().items():
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
    if layout != "padded":
        attention = register_attention(backend)
    else:
        attention = "eager" if config.to_dict().get("attn_logit_softcapping") else "sdpa"
    # transformers looks for a living HfDeepSpeedConfig through a weak reference while it loads.
    keep_alive = HfDeepSpeedConfig(partition_for) if partition_for else contextlib.nullcontext()
    folder, _ = weight_files(model)
    try:
        lm, loading = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=DTYPES[model.dtype], attn_implementation=attention,
            use_safetensors=True, trust_remote_code=model.trust_remote_code, output_loading_info=True,
            device_map=None if device is None else {"": device},
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, ImportError) as error:  # a quantised model asks for libraries of its own
        raise UserError(f"cannot load {model.path}: {str(error).splitlines()[0]}", where="model.path") from error
    del keep_alive
    missing = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
    if missing:
        raise UserError(f"{len(missing)} weights are missing from {model.path} or have another shape, the first: {missing[0]}", where="model.path")
    head = lm.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise UserError(f"{config.model_type} has no plain output head", where="model.path")
    if kernels == "liger":
        use_liger(lm)
    if gradient_checkpointing:
        checkpoint_layers(lm, every=model.gradient_checkpointing_every, offload=model.gradient_checkpointing_offload)
    return Policy(lm).train()
