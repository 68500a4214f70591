"""The one forward path: train, evaluate and precompute-ref all score pairs with this module.

Legend: R rows, L row length, T = R * L, C completion tokens, S sequences (pairs), D hidden size.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from kto_ds.data.batch import Batch
from kto_ds.model.attention import Memory
from kto_ds.model.logprobs import LogprobHead, logit_change
from kto_ds.model.routers import RouterLoad, meter_routers


class Policy(nn.Module):
    """A causal language model whose forward returns sequence log-probs.

    Backbone and head run inside one forward, so that whoever wraps this module (DeepSpeed) sees every parameter being used.
    """

    def __init__(self, lm: PreTrainedModel):
        super().__init__()
        self.lm = lm
        self.router_meter = meter_routers(lm, lm.config)  # None in a dense model
        lm.set_output_embeddings(LogprobHead(lm.get_output_embeddings().weight, logit_change(lm.config)))

    @property
    def decoder_layers(self) -> list[GradientCheckpointingLayer]:
        return decoder_layers(self.lm)

    def forward(self, batch: Batch, per_token: bool = False, with_load: bool = False, memory: Memory | None = None) -> Tensor | tuple[Tensor, RouterLoad]:
        """Return the log-prob of each pair's completion after its prompt, summed over its tokens, [S] float32; or those of all tokens, [C].

        A mixture of experts also tells how its routers sent the tokens, where it is asked to: (log-probs, load).
        With a memory of the tokens before the batch, which packed layouts need: the logits of what follows each predictor, [C, V].
        """
        inputs = {"attention_mask": batch.attention_mask} if batch.segments is None else {"segments": batch.segments, "memory": memory}
        if self.router_meter:
            self.router_meter.begin(batch.uses.flatten() if with_load else None)
        # With use_cache, transformers would take packed positions for one sequence.
        outputs = self.lm.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **inputs)
        hidden = outputs.last_hidden_state.flatten(0, 1)[batch.predictors]  # [C, D]
        if memory is not None:
            return self.lm.get_output_embeddings()(hidden)
        token_logps = self.lm.get_output_embeddings()(hidden, batch.targets)  # [C]
        logps = token_logps if per_token else sum_by_pair(token_logps, batch)
        return (logps, self.router_meter.end()) if with_load else logps


def decoder_layers(lm: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """Return the layers in their order; none of a model that came with code of its own and does not mark them as transformers does."""
    return [module for module in lm.modules() if isinstance(module, GradientCheckpointingLayer)]


def sum_by_pair(token_logps: Tensor, batch: Batch) -> Tensor:
    """Add up the log-probs of each pair's tokens: [C] -> [S] float32."""
    # A filler scores one sequence and keeps none: the result is empty, yet part of the graph, so backward runs on every rank.
    # No index_add: on CUDA it adds in any order, and the same batch would come to other sums the next time.
    # It adds one after the other: in float32 the sum of a thousand tokens would be off by several 1e-3, as much as the log-ratio of an early step.
    sums = torch.segment_reduce(token_logps.double(), "sum", lengths=batch.completion_lengths, unsafe=True)  # unsafe: does not wait for the lengths to check them
    return sums[: batch.num_pairs].float()
