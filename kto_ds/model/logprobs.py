"""The head of the policy: log-probs of given tokens, without the logits of all of them at once.

Legend: C scored tokens, D hidden size, V vocabulary, B tokens of a chunk.
"""

import torch
from torch import Tensor, nn

# A chunk's logits are float32 [B, V]; this bounds them whatever V is.
CHUNK_LOGITS_BYTES = 128 << 20


class ChunkedLogprobs(torch.autograd.Function):
    """log_softmax(hidden @ weight.T)[targets], chunk by chunk over the tokens, logits computed again in backward.

    Reductions and the weight gradient are float32. The naive version is the oracle in tests/unit/test_logprobs.py.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,  # [C, D]
        weight: Tensor,  # [V, D]
        targets: Tensor,  # [C] int64
        chunk_size: int,  # B
    ) -> Tensor:  # [C] float32
        logps = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        normalizers = torch.empty_like(logps)  # [C] logsumexp of each token's logits
        for start in range(0, len(targets), chunk_size):
            chunk = slice(start, start + chunk_size)
            logits = _logits(hidden[chunk], weight)  # [B, V]
            normalizers[chunk] = torch.logsumexp(logits, dim=-1)
            logps[chunk] = logits.gather(1, targets[chunk, None]).squeeze(1) - normalizers[chunk]
        ctx.save_for_backward(hidden, weight, targets, normalizers)
        ctx.chunk_size = chunk_size
        return logps

    @staticmethod
    def backward(ctx, grad_logps: Tensor):  # [C]
        hidden, weight, targets, normalizers = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wants_weight else None
        for start in range(0, len(targets), ctx.chunk_size):
            chunk = slice(start, start + ctx.chunk_size)
            # d logp / d logits = onehot(target) - softmax
            grad_logits = _logits(hidden[chunk], weight).sub_(normalizers[chunk, None]).exp_().neg_()  # [B, V]
            grad_logits.scatter_add_(1, targets[chunk, None], torch.ones_like(grad_logits[:, :1]))
            grad_logits = grad_logits.mul_(grad_logps[chunk, None]).to(weight.dtype)
            if wants_hidden:
                grad_hidden[chunk] = grad_logits @ weight
            if wants_weight:
                grad_weight += grad_logits.T @ hidden[chunk]
        return grad_hidden, grad_weight.to(weight.dtype) if wants_weight else None, None, None


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [B, D] @ weight.T -> [B, V] in float32: logits rounded to bfloat16 would put noise of 0.03 a token into rewards and z."""
    if hidden.dtype == torch.float32:
        return hidden @ weight.T
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.float() @ weight.float().T


class LogprobHead(nn.Module):
    """Stands in for a model's `lm_head` and owns its weight: the same parameter, tied or not, under the same name.

    It is called as a module, so DeepSpeed's hooks gather the weight before it runs, forward and backward, once for all chunks.
    """

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight  # [V, D]; ZeRO-3 may have partitioned it

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the log-prob of every target: hidden [C, D], targets [C] int64 -> [C] float32."""
        assert hidden.dim() == 2 and targets.shape == hidden.shape[:1], f"expected [C, D] and [C], found {tuple(hidden.shape)} and {tuple(targets.shape)}"
        chunk_size = max(1, CHUNK_LOGITS_BYTES // (4 * self.weight.shape[0]))
        return ChunkedLogprobs.apply(hidden, self.weight, targets, chunk_size)
