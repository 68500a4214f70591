"""The CUDA kernels against the CPU path that tests/unit checks: same log-probs, same gradients, in every packed layout."""

import pytest
import torch

from kto_ds.data.batch import Segments
from kto_ds.model.attention import KERNELS, choose_backend, sdpa_kernel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

QUERY_LENGTHS, KEY_LENGTHS = (7, 5, 9, 33), (7, 12, 16, 33)  # a prompt, two completions behind it, a sequence of its own


def segments(device: str) -> Segments:
    offsets = [torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device) for lengths in (QUERY_LENGTHS, KEY_LENGTHS)]
    return Segments(*offsets, key_index=None, query_lengths=QUERY_LENGTHS, key_lengths=KEY_LENGTHS)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("backend", ["flash_attention_2", "torch_varlen"])
def test_kernel_agrees_with_sdpa_in_float32(backend, window):
    try:
        choose_backend(backend, device=torch.device("cuda"), dtype=torch.bfloat16)
    except Exception as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    query, key, value = (torch.randn(heads, length, 64) for heads, length in ((8, sum(QUERY_LENGTHS)), (2, sum(KEY_LENGTHS)), (2, sum(KEY_LENGTHS))))
    exact = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    fast = [tensor.to("cuda", torch.bfloat16).requires_grad_() for tensor in (query, key, value)]
    wanted = sdpa_kernel(*exact, segments("cpu"), scale=0.125, window=window)
    found = KERNELS[backend](*fast, segments("cuda"), scale=0.125, window=window)
    torch.testing.assert_close(found.float().cpu(), wanted, atol=2e-2, rtol=2e-2)
    wanted.square().sum().backward()
    found.float().square().sum().backward()
    for have, want in zip(fast, exact):
        torch.testing.assert_close(have.grad.float().cpu(), want.grad, atol=8e-2, rtol=8e-2)
