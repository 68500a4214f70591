"""What a step does besides kernels, on CUDA: page-locked batches in every layout, and phases timed by events of the stream."""

import numpy as np
import pytest
import torch

from kto_ds.data.ahead import ahead
from kto_ds.data.batch import make_batch
from kto_ds.data.packing import share_out
from kto_ds.report.throughput import StepTimer, device_clock
from tests.unit.splits import make_split

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("layout", ["prefix_shared", "packed", "padded"])
def test_a_batch_pinned_in_another_thread_arrives_whole(layout):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 90, rng.integers(1, 40)).tolist() for _ in range(12)]
    completions = [rng.integers(3, 90, rng.integers(1, 60)).tolist() for _ in range(24)]
    split = make_split(prompts * 2, completions, desirable=[number % 2 == 0 for number in range(24)], max_length=120, kl_group_size=3, max_group_examples=24, shuffle=False, seed=0)
    lengths = dict(pair_prompts=split.pair_prompts, pair_lengths=split.pair_lengths, prompt_lengths=split.prompt_lengths)
    (micro_batches,) = share_out(np.arange(24), layout=layout, max_tokens=300, num_ranks=1, **lengths)
    for micro_batch, pinned in zip(micro_batches, ahead(lambda micro_batch: make_batch(micro_batch, split, layout).pinned(), micro_batches), strict=True):
        wanted, found = make_batch(micro_batch, split, layout), pinned.to(torch.device("cuda"))
        for name in ("input_ids", "position_ids", "predictors", "targets", "completion_lengths"):
            assert vars(pinned)[name].is_pinned() and torch.equal(vars(found)[name].cpu(), vars(wanted)[name]), name


def test_a_phase_lasts_as_long_as_its_kernels():
    device = torch.device("cuda")
    timer = StepTimer(device_clock(device))
    timer.begin("kl")
    torch.cuda._sleep(200_000_000)  # clock ticks of the device: 0.1 s and more
    timer.begin("policy")
    timer.begin("host")
    lap = timer.lap()
    assert lap.seconds_of["kl"] > 0.05 and lap.seconds_of["policy"] < 0.02, "the host got here at once, the stream did not"
