"""The head of the policy: log-probs of given tokens, without the logits of all of them at once.

Legend: C scored tokens, D hidden size, V vocabulary, B tokens of a chunk.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

# What bounds the float32 logits [B, V] of a chunk, whatever V is. On the CPU speed is the same from 32 MiB to 128 (within 5 %, V 32k, D 256 and 1024).
# On a GPU the weight gradient [V, D] is read and written once a chunk. On an H200 (V 152k, D 5120) chunks of four times as many bytes are 10 % faster,
# of an eighth 2.8 times slower: docs/benchmarks/h200.md.
CPU_CHUNK_BYTES = 64 << 20
DEVICE_CHUNK_BYTES = 512 << 20


class LogitChange(NamedTuple):
    """What a model does to its logits before the softmax: softcap * tanh(scale * logits / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, logits: Tensor) -> Tensor:
        """Change the logits in place and return them."""
        if self.scale != 1:
            logits.mul_(self.scale)
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope(self, changed: Tensor) -> Tensor | float:
        """Return the derivative at logits that `apply` has changed."""
        return self.scale if self.softcap is None else self.scale * (1 - (changed / self.softcap).square())


UNCHANGED = LogitChange()
# Families that change their logits, by what their configs call it.
CHANGED_LOGITS = {"cohere": "logit_scale", "cohere2": "logit_scale", "granite": "logits_scaling", "gemma2": "final_logit_softcapping", "gemma3_text": "final_logit_softcapping"}


def logit_change(config: PretrainedConfig) -> LogitChange:
    """Return what a model of these families, or of one that leaves its logits alone, does to them."""
    match CHANGED_LOGITS.get(config.model_type):
        case "logit_scale":
            return LogitChange(scale=config.logit_scale)
        case "logits_scaling":
            return LogitChange(scale=1 / config.logits_scaling)
        case "final_logit_softcapping":
            return LogitChange(softcap=config.final_logit_softcapping)
    return UNCHANGED


class ChunkedLogprobs(torch.autograd.Function):
    """log_softmax(change(hidden @ weight.T))[targets], chunk by chunk over the tokens, logits computed again in backward.

    Reductions and the weight gradient are float32. All chunks use one buffer: on the CPU, fresh memory would cost a third of the forward
    in page faults. The naive version is the oracle in tests/unit/test_logprobs.py.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,  # [C, D]
        weight: Tensor,  # [V, D]
        targets: Tensor,  # [C] int64
        chunk_size: int,  # B
        change: LogitChange = UNCHANGED,
    ) -> Tensor:  # [C] float32
        logps = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        normalizers = torch.empty_like(logps)  # [C] logsumexp of each token's logits
        for chunk, logits in _chunks(hidden, weight, chunk_size, change):  # [B, V]
            own = logits.gather(1, targets[chunk, None]).squeeze(1)
            largest = logits.amax(dim=-1, keepdim=True)
            # logsumexp, in place
            normalizers[chunk] = logits.sub_(largest).exp_().sum(dim=-1).log_().add_(largest.squeeze(1))
            logps[chunk] = own - normalizers[chunk]
        ctx.save_for_backward(hidden, weight, targets, normalizers)
        ctx.chunk_size, ctx.change = chunk_size, change
        return logps

    @staticmethod
    def backward(ctx, grad_logps: Tensor):  # [C]
        hidden, weight, targets, normalizers = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wants_weight else None
        for chunk, logits in _chunks(hidden, weight, ctx.chunk_size, ctx.change):  # [B, V]
            slope = ctx.change.slope(logits)
            # d logp / d logits = onehot(target) - softmax
            scale = grad_logps[chunk, None]
            grad_logits = logits.sub_(normalizers[chunk, None]).exp_().mul_(-scale).scatter_add_(1, targets[chunk, None], scale)
            if ctx.change != UNCHANGED:
                grad_logits.mul_(slope)
            grad_logits = grad_logits.to(weight.dtype)
            if wants_hidden:
                torch.mm(grad_logits, weight, out=grad_hidden[chunk])
            if wants_weight:
                _add_product(grad_weight, grad_logits.T, hidden[chunk], ctx.chunk_size)
        return grad_hidden, grad_weight.to(weight.dtype) if wants_weight else None, None, None, None


def _chunks(hidden: Tensor, weight: Tensor, chunk_size: int, change: LogitChange) -> Iterator[tuple[slice, Tensor]]:
    """Yield (slice of tokens, their logits [B, V] in float32, to be overwritten), all in one buffer.

    Logits rounded to bfloat16 would put noise of 0.03 a token into rewards and z.
    """
    buffer = torch.empty(min(chunk_size, len(hidden)), len(weight), dtype=torch.float32, device=hidden.device)
    if not hidden.is_cuda:  # only there do float32 products of other factors exist
        hidden, weight = hidden.float(), weight.float()
    widens = {} if hidden.dtype == torch.float32 else {"out_dtype": torch.float32}
    for start in range(0, len(hidden), chunk_size):
        part = hidden[start : start + chunk_size]
        yield slice(start, start + chunk_size), change.apply(torch.mm(part, weight.T, out=buffer[: len(part)], **widens))


def _add_product(total: Tensor, left: Tensor, right: Tensor, num_columns: int) -> None:
    """total [V, D] float32 += left [V, B] @ right [B, D]. What has to lie beside `total` is no larger than the logits of `num_columns` tokens."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif left.is_cuda:  # where products of other factors add to float32
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        num_rows = max(1, num_columns * len(total) // total.shape[1])
        for part, rows in zip(total.split(num_rows), left.split(num_rows)):
            part += rows @ right


class LogprobHead(nn.Module):
    """Stands in for a model's `lm_head` and owns its weight: the same parameter, tied or not, under the same name.

    It is called as a module, so DeepSpeed's hooks gather the weight before it runs, forward and backward, once for all chunks.
    """

    def __init__(self, weight: nn.Parameter, change: LogitChange = UNCHANGED):
        super().__init__()
        self.change = change
        self.weight = weight  # [V, D]; ZeRO-3 may have partitioned it

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the log-prob of every target: hidden [C, D], targets [C] int64 -> [C] float32. Without targets: all logits, [C, V] float32, without gradient."""
        if targets is None:
            [(_, logits)] = _chunks(hidden, self.weight, len(hidden), self.change)
            return logits
        assert hidden.dim() == 2 and targets.shape == hidden.shape[:1], f"expected [C, D] and [C], found {tuple(hidden.shape)} and {tuple(targets.shape)}"
        chunk_bytes = CPU_CHUNK_BYTES if hidden.device.type == "cpu" else DEVICE_CHUNK_BYTES
        chunk_size = max(1, chunk_bytes // (4 * self.weight.shape[0]))
        return ChunkedLogprobs.apply(hidden, self.weight, targets, chunk_size, self.change)
