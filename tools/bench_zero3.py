"""Count what ZeRO-3 gathers in a KTO step of two phases, and write the tables of docs/benchmarks/zero3.md.

    python tools/bench_zero3.py --write

It compares call orders, units of gathering and distances of prefetching on a model with the layers and proportions of Qwen3-32B at 1/64 of its widths, on
two gloo ranks of one CPU, which it starts itself. All variants run through Engine. What is counted is told in docs/benchmarks/zero3.md. Counts do not depend
on the machine or its load; nothing is timed.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from benchmarks.page import PAGES, around_markers, command_line, cores, versions
from deepspeed.comm.torch import TorchBackend
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator
from deepspeed.runtime.zero.partitioned_param_profiler import PartitionedParameterProfiler as Profiler
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3Config

from kto_ds.config import OptimConfig
from kto_ds.data.batch import Batch
from kto_ds.model.policy import Policy
from kto_ds.runtime import collectives
from kto_ds.runtime.deepspeed_config import complete_deepspeed_config
from kto_ds.runtime.engine import Engine

PAGE = PAGES / "zero3.md"
NUM_RANKS = 2
NUM_STEPS = 4  # the first, in which traces are recorded, is not counted
# Qwen3-32B has hidden size 5120, feed-forward 25,600, 64 query and 8 key/value heads of 128, 151,936 tokens: the matrices of a layer are 1/4096 of these.
SHAPE = {
    "vocab_size": 2374, "hidden_size": 80, "intermediate_size": 400, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": False,
}  # fmt: skip
LAYER_32B = 487_594_240  # elements
# DeepSpeed's defaults: elements that may be there at a time, elements to prefetch.
DEFAULT_LIVE, DEFAULT_PREFETCH = 1_000_000_000, 50_000_000
PERSISTENT = 300  # elements: all norms and nothing else, as DeepSpeed's default does with a 32B model
TARGET_MODEL_SIZES, TARGET_GATHERS = 3.05, 4

COLD, WARM, ONE_FORWARD = "mismatched first", "mismatched first, after a warm-up", "both in one forward"


class Variant(NamedTuple):
    checkpointing: bool
    mismatched: int  # micro-batches of this phase in a step
    matched: int
    order: str
    by_layer: bool  # decoder layers are leaf modules, gathered whole
    prefetches_a_layer: bool  # else DeepSpeed's default

    @property
    def is_ours(self) -> bool:
        return self.order == WARM and self.by_layer and self.prefetches_a_layer


class Found(NamedTuple):
    """A step after the first, on one rank; all such steps were equal."""

    invalidations: int
    gathers: int  # collectives, without those of the update
    update_gathers: int  # of the persistent parameters, after the optimizer has changed its part of them
    model_sizes: float  # elements that these gathers, without the update's, brought together
    prefetched: float  # share of these elements that was on its way before a module asked for it
    peak_layers: float  # most elements gathered or on their way at one time, persistent ones left out, in decoder layers


@dataclass
class Meter:
    """Counts since `clear`, of DeepSpeed in this process."""

    parameters: list[nn.Parameter] = field(default_factory=list)  # of the model at hand
    invalidations: int = 0
    gathers: int = 0
    gathered: int = 0  # elements
    prefetched: int = 0  # elements
    peak: int = 0  # elements

    def clear(self) -> None:
        self.invalidations = self.gathers = self.gathered = self.prefetched = self.peak = 0

    def install(self) -> None:
        """Let DeepSpeed's one way to throw a trace away, its one collective that gathers parameters and its notes of prefetches tell this meter."""
        invalidate, gather, note = Coordinator._invalidate_trace, TorchBackend.all_gather_into_tensor, Profiler.stop_event

        def counted_invalidate(coordinator):
            self.invalidations += 1
            return invalidate(coordinator)

        def counted_gather(backend, output_tensor, *arguments, **named):
            self.gathers += 1
            self.gathered += output_tensor.numel()
            # A parameter on its way has its memory already.
            here = [parameter.ds_numel for parameter in self.parameters if parameter.ds_status != ZeroParamStatus.NOT_AVAILABLE and not parameter.ds_persist]
            self.peak = max(self.peak, sum(here))
            return gather(backend, output_tensor, *arguments, **named)

        def counted_note(profiler, name, numel):
            if name in (Coordinator.FORWARD_PREFETCH_SUBMIT, Coordinator.BACKWARD_PREFETCH_SUBMIT):
                self.prefetched += numel
            return note(profiler, name, numel)

        Coordinator._invalidate_trace, TorchBackend.all_gather_into_tensor, Profiler.stop_event = counted_invalidate, counted_gather, counted_note


class OneByOne(Policy):
    """Names no decoder layers, so that Engine leaves every parameter to be gathered by itself."""

    decoder_layers = ()


def in_one_forward(policy: type[Policy]) -> type[Policy]:
    """Return the same policy, but one forward takes (mismatched micro-batches, matched one): ZeRO-3 starts its trace anew at each forward of the whole."""

    class InOneForward(policy):
        def forward(self, phases: tuple[list[Batch], Batch]) -> Tensor:
            mismatched, matched = phases
            with torch.no_grad():
                for batch in mismatched:
                    super().forward(batch)
            return super().forward(matched)

    return InOneForward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_layers", type=int, default=64, help="decoder layers; Qwen3-32B has 64")
    parser.add_argument("--write", action="store_true", help=f"write the tables to {PAGE.name}, not only to the terminal")
    parser.add_argument("--results", type=Path, default=None, help="set by the command itself for the ranks it starts")
    options = parser.parse_args()
    if options.results:
        measure_on_this_rank(options.num_layers, options.results)
        return
    around = around_markers(PAGE, "zero3") if options.write else None
    text = describe(options.num_layers, measure(options.num_layers))
    print(text)
    if around:
        PAGE.write_text(text.join(around), encoding="utf-8")


def variants() -> list[Variant]:
    """Every combination with one micro-batch in each phase, with and without gradient checkpointing; with several micro-batches only with it."""
    numbers = [(True, 1, 1), (True, 2, 4), (False, 1, 1)]
    return [Variant(*number, *way) for number, *way in itertools.product(numbers, (COLD, WARM, ONE_FORWARD), (False, True), (False, True))]


def measure(num_layers: int) -> list[tuple[Variant, Found]]:
    """Start the ranks, let them measure all variants in one launch, and return what they found."""
    # Gloo on CPUs wherever this runs: a count does not depend on the device, and starting ranks may not need one.
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore::FutureWarning"}
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(NUM_RANKS)]
        subprocess.run([*launcher, __file__, "--num_layers", str(num_layers), "--results", str(results)], env=environment, check=True)
        return [(Variant(*variant), Found(*found)) for variant, found in json.loads(results.read_text(encoding="utf-8"))]


def measure_on_this_rank(num_layers: int, results: Path) -> None:
    world = collectives.start(timeout_seconds=600)
    torch.set_num_threads(1)
    meter = Meter()
    meter.install()
    found = []
    for number, variant in enumerate(variants(), 1):
        found.append((variant, measure_variant(variant, num_layers, meter)))
        if world.is_main:
            print(f"{number} of {len(variants())}: {variant}, {found[-1][1]}", file=sys.stderr, flush=True)  # it takes many minutes
    if found != collectives.gather_objects(found)[0]:
        raise SystemExit("the ranks counted differently")
    if world.is_main:
        results.write_text(json.dumps(found), encoding="utf-8")
    collectives.stop()


def measure_variant(variant: Variant, num_layers: int, meter: Meter) -> Found:
    lm = make_lm(num_layers, variant.checkpointing)
    layer_numel, numel = (sum(parameter.numel() for parameter in module.parameters()) for module in (lm.model.layers[0], lm))
    unit = Policy if variant.by_layer else OneByOne
    policy = (in_one_forward(unit) if variant.order == ONE_FORWARD else unit)(lm).train()
    raw = {"zero_optimization": zero_section(variant, layer_numel)}
    engine = Engine(policy, complete_deepspeed_config(raw, optim=OptimConfig(), dtype="float32", on_cuda=False), OptimConfig(), NUM_STEPS)
    meter.parameters = list(policy.parameters())
    if variant.order == WARM:
        engine.warm_up(make_batch())
    steps = [count_step(engine, variant, meter, layer_numel=layer_numel, numel=numel) for _ in range(NUM_STEPS)]
    engine.deepspeed.destroy()
    if len(set(steps[1:])) != 1:
        raise SystemExit(f"{variant}: the steps after the first differ: {steps[1:]}")
    return steps[-1]


def make_lm(num_layers: int, checkpointing: bool) -> nn.Module:
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(Qwen3Config(**SHAPE, num_hidden_layers=num_layers), dtype=torch.float32, attn_implementation="sdpa")
    if checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return lm


def zero_section(variant: Variant, layer_numel: int) -> dict:
    """Return what a file of ds_configs/ would say for this model, DeepSpeed's defaults reduced by as much as its layers are."""
    live = round(DEFAULT_LIVE * layer_numel / LAYER_32B)
    section = {"stage": 3, "overlap_comm": True, "contiguous_gradients": True, "stage3_param_persistence_threshold": PERSISTENT}
    section |= {"stage3_max_live_parameters": live, "stage3_max_reuse_distance": live}
    if variant.is_ours:
        return section  # Engine decides how far to prefetch
    return {**section, "stage3_prefetch_bucket_size": layer_numel if variant.prefetches_a_layer else round(DEFAULT_PREFETCH * layer_numel / LAYER_32B)}


def make_batch() -> Batch:
    """Return a padded micro-batch of one pair, 3 prompt and 5 completion tokens. What is gathered does not depend on the text."""
    tokens = torch.arange(8)
    return Batch(
        input_ids=tokens[None], position_ids=tokens[None], attention_mask=torch.ones_like(tokens)[None], segments=None,
        predictors=tokens[2:-1], targets=tokens[3:], completion_lengths=torch.tensor([5]), pair_ids=np.zeros(1, dtype=np.int64),
    )  # fmt: skip


def count_step(engine: Engine, variant: Variant, meter: Meter, *, layer_numel: int, numel: int) -> Found:
    """Take one optimizer step in the variant's order. The KL estimate is needed before the first loss, so all mismatched micro-batches come before it."""
    batch, last = make_batch(), variant.matched - 1
    meter.clear()
    if variant.order != ONE_FORWARD:
        with torch.no_grad():
            for _ in range(variant.mismatched):
                engine(batch)
    for position in range(variant.matched):
        if variant.order == ONE_FORWARD:
            logps = engine(([batch] * variant.mismatched if position == 0 else [], batch))
        else:
            logps = engine(batch)
        engine.backward(logps.sum(), is_last=position == last)
    gathers, gathered = meter.gathers, meter.gathered
    engine.step()
    return Found(meter.invalidations, gathers, meter.gathers - gathers, gathered / numel, meter.prefetched / gathered, meter.peak / layer_numel)


def describe(num_layers: int, found: list[tuple[Variant, Found]]) -> str:
    tables = [describe_table(num_layers, list(group)) for _, group in itertools.groupby(found, key=lambda entry: entry[0][:3])]
    [ours] = [result for variant, result in found if variant[:3] == (True, 1, 1) and variant.is_ours]
    per_layer = ours.gathers / num_layers
    met = "met" if ours.model_sizes <= TARGET_MODEL_SIZES and per_layer <= TARGET_GATHERS and not ours.invalidations else "missed"
    return f"""{command_line()}

{NUM_RANKS} gloo ranks on {cores()}. {versions("deepspeed", "torch", "transformers")}.
{num_layers} decoder layers. Update: {", ".join(map(str, sorted({result.update_gathers for _, result in found})))} gathers of persistent parameters a step, not in the tables.

{chr(10).join(tables)}
Targets (checkpointing, one micro-batch in each phase, the default): at most {TARGET_MODEL_SIZES} model sizes, {TARGET_GATHERS} gathers per decoder layer and pair of micro-batches,
no invalidation: {met}, with {ours.model_sizes:.2f}, {per_layer:.2f} and {ours.invalidations}.
"""


def describe_table(num_layers: int, found: list[tuple[Variant, Found]]) -> str:
    checkpointing, mismatched, matched = found[0][0][:3]
    lines = [
        f"### {mismatched} mismatched and {matched} matched, {'gradient checkpointing' if checkpointing else 'no gradient checkpointing'}",
        "",
        "| call order | unit | prefetch, layers | invalidations | gathers | per layer and matched micro-batch | model sizes | prefetched | peak, layers |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for variant, result in found:
        cells = [
            variant.order + (" (default)" if variant.is_ours else ""),
            "layer" if variant.by_layer else "parameter",
            "1" if variant.prefetches_a_layer else f"{DEFAULT_PREFETCH / LAYER_32B:.1f}",
            result.invalidations,
            f"{result.gathers:,}",
            f"{result.gathers / num_layers / matched:.2f}",
            f"{result.model_sizes:.2f}",
            f"{result.prefetched:.0%}",
            f"{result.peak_layers:.2f}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
