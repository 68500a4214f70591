"""Sums of token log-probs on CUDA: the same on every run, since artefacts and resumed runs are compared to the bit, and as on the CPU."""

import pytest
import torch

from kto_ds.data.batch import make_batch
from kto_ds.data.packing import make_units
from kto_ds.model.policy import sum_by_pair
from tests.unit.test_reference_work import random_split

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_sums_by_pair_are_repeatable_and_those_of_the_cpu():
    split = random_split(0)
    pairs = torch.arange(2 * split.num_examples).numpy()
    units = make_units(pairs, pair_prompts=split.pair_prompts, pair_lengths=split.pair_lengths, prompt_lengths=split.prompt_lengths, layout="packed", max_tokens=10**9)
    batch = make_batch(units, split, "packed")
    token_logps = -torch.rand(len(batch.targets))
    on_cpu = token_logps.clone().requires_grad_()
    wanted = sum_by_pair(on_cpu, batch)
    weights = torch.randn(len(wanted))
    (wanted * weights).sum().backward()
    sums = []
    for _ in range(5):
        on_cuda = token_logps.cuda().requires_grad_()
        found = sum_by_pair(on_cuda, batch.to(torch.device("cuda")))
        (found * weights.cuda()).sum().backward()
        sums.append(found.detach().cpu())
        torch.testing.assert_close(on_cuda.grad.cpu(), on_cpu.grad)
    torch.testing.assert_close(sums[0], wanted.detach())
    assert all(torch.equal(other, sums[0]) for other in sums[1:])
