"""Liger's Triton kernels for RMSNorm, SwiGLU and rotary embeddings: where they can run, and how one model gets them and no other.

The reference, training and evaluation choose by the same rule, so that log-probs of one model agree between them. Liger's fused losses are never used:
the head of kto_ds gives log-probs of single tokens, in float32.
"""

import sys
from importlib.util import find_spec
from types import FunctionType, MethodType
from typing import Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from kto_ds.errors import UserError

Kernels = Literal["liger", "torch"]
# Families whose log-probs and gradients tests/gpu/test_kernels_gpu.py compares with transformers' own.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def choose_kernels(requested: str, config: PretrainedConfig, device: torch.device) -> Kernels:
    """Return the kernels for `model.kernels`, Liger's for `auto` wherever they can run; UserError where they are required and cannot."""
    if requested == "torch":
        return "torch"
    reason, remedy = "", "set model.kernels: auto"
    if device.type != "cuda":
        reason = f"Liger's kernels need a CUDA device, and this is {device.type}"
    elif config.model_type not in FAMILIES or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        reason = f"Liger's kernels are used with {', '.join(FAMILIES)}, not with {config.model_type}"
    elif find_spec("liger_kernel") is None or find_spec("triton") is None:
        reason, remedy = "liger-kernel is not installed", "pip install liger-kernel, or set model.kernels: auto"
    if reason and requested == "liger":
        raise UserError(reason, where="model.kernels", remedy=remedy)
    return "torch" if reason else "liger"


def use_liger(lm: PreTrainedModel) -> None:
    """Give this model Liger's kernels. Models made later, and others of its family, stay as they are."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    # Liger changes the instance, and besides replaces classes and functions in the family's module, for all models.
    module = vars(sys.modules[type(lm).__module__])
    before = dict(module)
    MODEL_TYPE_TO_APPLY_LIGER_FN[lm.config.model_type](model=lm, cross_entropy=False, fused_linear_cross_entropy=False)
    replaced = {name: value for name, value in module.items() if value is not before[name]}
    module.update({name: before[name] for name in replaced})
    # The rotary embedding is such a function only: the attention of this model gets a forward of its own that sees Liger's.
    for part in lm.modules():
        forward = type(part).forward
        if forward.__globals__ is module and replaced.keys() & set(forward.__code__.co_names):
            own = FunctionType(forward.__code__, {**module, **replaced}, forward.__name__, forward.__defaults__, forward.__closure__)
            own.__kwdefaults__ = forward.__kwdefaults__
            part.forward = MethodType(own, part)
