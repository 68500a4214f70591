"""The memory formula of `kto-ds plan` beside what the allocator hands out: whole steps under ZeRO-3, on one rank and on two, every allocation counted.

torch's profiler notes each allocation of the CPU allocator with the bytes then held, temporary ones inside operators too: the largest of them is what
torch.cuda.max_memory_allocated is on a GPU. The kernels of a CPU differ from those of a GPU, so the formula has both; tools/bench_gpu.py memory compares it with a GPU.
"""

import ctypes
import gc
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kto_ds.config import ModelConfig
from kto_ds.model.memory import Load, peak_memory
from kto_ds.model.sizes import model_sizes, skeleton
from kto_ds.model.states import read_zero
from tests.distributed.ranks import Ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

BASE = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 16}
# A large vocabulary, many activations, mostly layers. One tied, one in bfloat16, one with half of its layers checkpointed.
SHAPES = {
    "head": ({**BASE, "vocab_size": 8192, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "tie_word_embeddings": False}, "bfloat16", 1, 256),
    "activations": ({**BASE, "vocab_size": 1024, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "tie_word_embeddings": True}, "float32", 2, 1024),
    "layers": ({**BASE, "vocab_size": 512, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "tie_word_embeddings": False}, "float32", 1, 128),
}
ZERO = {
    "stage": 3, "reduce_bucket_size": 200_000, "sub_group_size": 400_000, "stage3_param_persistence_threshold": 1000, "stage3_max_live_parameters": 400_000,
    "stage3_max_reuse_distance": 400_000,
}  # fmt: skip
TOLERANCE = {1: 0.01, 2: 0.1}  # by ranks; on two, measured / formula is 1.09, 1.02 and 0.94: at the head, a float32 copy of it is held that the formula does not know
STEPS = 2  # the second has Adam's moments


def measure_shapes(arguments: list[str]) -> None:
    """Be one rank: measure every shape and, on rank 0, write the peaks to a file."""
    from kto_ds.runtime import collectives

    world = collectives.start(timeout_seconds=600)
    torch.set_num_threads(1)
    count_in_every_thread()
    peaks = {name: measure(*shape) for name, shape in SHAPES.items()}
    if world.is_main:
        Path(arguments[0]).write_text(json.dumps(peaks))
    collectives.stop()


def count_in_every_thread() -> None:
    """Let the allocator's count of bytes held follow threads that the profiler does not watch too: those of gloo free much of what a gather used."""
    ctypes.c_bool.in_dll(ctypes.CDLL(str(Path(torch.__path__[0], "lib", "libc10.so"))), "FLAGS_caffe2_report_cpu_memory_usage").value = True


def measure(shape: dict, dtype: str, every: int, tokens: int) -> int:
    """Return the most bytes that this rank holds at one time of the last step, from the model's making on."""
    import deepspeed
    from transformers import AutoModelForCausalLM, Qwen3Config

    from kto_ds.config import OptimConfig
    from kto_ds.model.attention import register_attention
    from kto_ds.model.checkpointing import checkpoint_layers
    from kto_ds.model.policy import Policy
    from kto_ds.runtime.deepspeed_config import complete_deepspeed_config
    from kto_ds.runtime.engine import Engine

    zero = complete_deepspeed_config({"zero_optimization": ZERO}, optim=OptimConfig(), dtype=dtype, on_cuda=False)
    batch = make_rows(shape["vocab_size"], tokens)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        with deepspeed.zero.Init(config_dict_or_path=zero):
            lm = AutoModelForCausalLM.from_config(Qwen3Config(**shape), dtype=vars(torch)[dtype], attn_implementation=register_attention("sdpa"))
        checkpoint_layers(lm, every=every, offload=False)
        engine = Engine(Policy(lm).train(), zero, OptimConfig(), STEPS)
        engine.warm_up(batch)
        gc.collect()
        for step in range(STEPS):
            with torch.profiler.record_function(f"step {step}"):
                with torch.no_grad():
                    engine(batch)
                engine.backward(-engine(batch).mean(), is_last=True)
                engine.step()
    [(begin, end)] = [
        (event.start_ns(), event.start_ns() + event.duration_ns()) for event in profile.profiler.kineto_results.events() if event.name() == f"step {STEPS - 1}"
    ]
    events = sorted(allocations(profile.profiler.kineto_results.experimental_event_tree()), key=lambda event: event.start_time_ns)
    held_before = events[0].extra_fields.total_allocated - events[0].extra_fields.alloc_size
    return max(event.extra_fields.total_allocated for event in events if begin <= event.start_time_ns <= end) - held_before


def allocations(events) -> list:
    """Return what was allocated and freed, at whatever depth of the calls."""
    waiting, found = list(events), []
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.typed[0] == torch._C._profiler._EventType.Allocation:
            found.append(event)
    return found


def make_rows(vocab_size: int, tokens: int):
    """A packed micro-batch of four rows, half of their tokens completion."""
    from kto_ds.data.batch import make_batch
    from kto_ds.data.packing import make_units
    from tests.unit.splits import make_split

    generator = np.random.default_rng(0)
    texts = generator.integers(3, vocab_size, (2, 4, tokens // 8)).tolist()
    split = make_split(*texts, desirable=[True, False] * 2, max_length=tokens, kl_group_size=2, max_group_examples=4, shuffle=False, seed=0)
    pairs = np.arange(4)
    units = make_units(pairs, pair_prompts=split.pair_prompts, pair_lengths=split.pair_lengths, prompt_lengths=split.prompt_lengths, layout="prefix_shared", max_tokens=tokens)
    return make_batch(units, split, "prefix_shared")


@pytest.fixture(scope="module", params=[1, 2])
def peaks(request, tmp_path_factory) -> tuple[int, dict[str, int]]:
    folder = tmp_path_factory.mktemp("memory")
    with Ranks([folder / "peaks.json"], log=folder / "log", num_ranks=request.param, program=measure_shapes) as ranks:
        assert ranks.wait(600) == [0] * request.param, ranks.output()[-4000:]
    return request.param, json.loads((folder / "peaks.json").read_text())


@pytest.mark.parametrize("name", SHAPES)
def test_the_formula_is_what_the_allocator_hands_out(peaks, name):
    from transformers import Qwen3Config

    num_ranks, measured = peaks
    shape, dtype, every, tokens = SHAPES[name]
    load = Load(
        tokens=tokens, scored_tokens=tokens // 2, scoring_tokens=tokens, weight_bytes=2 if dtype == "bfloat16" else 4, checkpoint_every=every, kernels="torch", device="cpu"
    )
    peak = peak_memory(model_sizes(skeleton(ModelConfig(path="random"), Qwen3Config(**shape))), read_zero({"zero_optimization": ZERO}), load, num_ranks)
    assert peak.memory.allocated == pytest.approx(measured[name], rel=TOLERANCE[num_ranks]), (peak, measured[name])
