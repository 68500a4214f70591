"""How the tokens of a mixture of experts are routed: sums over a micro-batch, gathered while its layers run.

Legend: T input tokens, M layers that have a router, N experts, K experts of a token.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from kto_ds.errors import UserError
from kto_ds.model.support import experts_of_a_token, num_experts


class RouterLoad(NamedTuple):
    """What the routers did with some tokens; a token that several pairs share counts once for each, padding not at all."""

    assignments: Tensor  # [M, N] float32, how often each expert was among a token's K
    probabilities: Tensor  # [M, N] float32, sums of the router's softmax; these alone carry a gradient


class RouterMeter:
    """Sums up what every router gives, by hooks on them. Of the logits of all tokens nothing is kept beyond their layer.

    A checkpointed layer runs again in backward, and its hooks with it: there they repeat their arithmetic, which autograd asks for, but add to no sum.
    """

    def __init__(self, lm: PreTrainedModel, top_k: int):
        self.top_k = top_k
        # transformers says itself which module returns the router's logits, and at which place.
        recorder = lm._can_record_outputs["router_logits"]
        self.routers: list[nn.Module] = [module for module in lm.modules() if isinstance(module, recorder.target_class)]
        for router in self.routers:
            router.register_forward_hook(partial(self._measure, recorder.index))
        self._uses: Tensor | None = None  # [T] of the forward that is under way, or that backward goes through
        self._loads: list[RouterLoad] | None = None  # of the layers so far, while a forward is under way

    def begin(self, uses: Tensor | None) -> None:
        """Measure the forward that follows, in which a token counts `uses` [T] times; with None measure nothing."""
        self._uses, self._loads = uses, []

    def end(self) -> RouterLoad:
        loads, self._loads = self._loads, None
        return RouterLoad(*map(torch.stack, zip(*loads)))

    def _measure(self, index: int, router: nn.Module, inputs, outputs) -> None:
        if self._uses is None:
            return
        logits = outputs[index]  # [T, N]
        probabilities = self._uses @ logits.float().softmax(dim=-1)  # [N]
        if self._loads is not None:
            chosen = logits.detach().topk(self.top_k, dim=-1).indices  # [T, K]
            # Whole numbers below 2^24: in whatever order they are added, the sum is the same.
            assignments = torch.zeros_like(probabilities).scatter_add_(0, chosen.flatten(), self._uses.repeat_interleave(self.top_k))
            self._loads.append(RouterLoad(assignments, probabilities))


def meter_routers(lm: PreTrainedModel, config: PretrainedConfig) -> RouterMeter | None:
    """Return the meter of a mixture of experts, None for a dense model."""
    top_k = experts_of_a_token(config)
    if not top_k:
        return None
    meter = RouterMeter(lm, top_k)
    if not meter.routers:
        what = f"{config.model_type} has {num_experts(config)} experts by its config, but no layer that routes tokens to them"
        raise UserError(what, where="model.path", remedy="make mlp_only_layers or decoder_sparse_step in its config.json leave a layer with experts, or use a dense model")
    return meter
