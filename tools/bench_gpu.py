"""Measure kto_ds on one CUDA device, on models of public shapes with random weights, and write the tables of docs/benchmarks/h200.md and memory.md.

    python tools/bench_gpu.py precompute --shape qwen3-4b qwen3-32b --write
    python tools/bench_gpu.py train --write
    python tools/bench_gpu.py train --shape qwen3-4b --trl --write
    python tools/bench_gpu.py memory --write

`precompute` times the scoring of reference log-probs, `train` whole steps; `memory` compares the peak of a step with the formula of `kto-ds plan`. The model
is made on the device itself, without files; everything else is the library's own: tokens go through its dataset artefact (mismatched pairs, limits), its plans,
its batches, its Policy and Engine. With `--trl` the same rows also go through TRL's KTOTrainer, which then has to be installed. What is timed is told in docs/benchmarks/h200.md.

The smoke form, `--smoke` or wherever there is no CUDA device, does a little of the same with a tiny float32 model on the CPU. It gives no figures.
What is timed is preceded by a check that a model made in this way gives the log-probs of one that transformers makes itself.
"""

import argparse
from typing import get_args

import torch
from benchmarks.gpu_memory import bench_memory
from benchmarks.gpu_model import SHAPES
from benchmarks.gpu_precompute import bench_precompute
from benchmarks.gpu_train import bench_train
from benchmarks.page import PAGES, around_markers

from kto_ds.config import ReferenceConfig
from kto_ds.data.packing import Layout
from kto_ds.errors import UserError
from kto_ds.model.attention import KERNELS

PAGE, MEMORY_PAGE = PAGES / "h200.md", PAGES / "memory.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    precompute = commands.add_parser("precompute", help="reference log-probs", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    precompute.add_argument("--shape", nargs="+", choices=["qwen3-4b", "qwen3-32b"], default=["qwen3-4b", "qwen3-32b"], help="one after the other")
    precompute.add_argument("--max_tokens_per_microbatch", type=int, default=ReferenceConfig().max_tokens_per_microbatch)
    precompute.add_argument("--seconds", type=float, default=30, help="to measure each shape for; the shard that is being scored then is finished")
    precompute.add_argument("--num_prompts", type=int, default=8192, help="distinct prompts of the synthetic rows, more than can be scored meanwhile")
    precompute.set_defaults(bench=bench_precompute, marker="precompute-ref")
    train = commands.add_parser("train", help="whole steps", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    train.add_argument("--shape", nargs="+", choices=SHAPES, default=["qwen3-4b", "qwen3-32b-8layers"], help="one after the other")
    train.add_argument("--max_tokens_per_microbatch", type=int, default=16_384)
    train.add_argument("--global_batch_size", type=int, default=128, help="rows of a step")
    train.add_argument("--steps", type=int, default=4, help="to measure, after one to warm up")
    train.add_argument("--trl", action="store_true", help="measure TRL besides, with a precomputed reference and with one in memory")
    train.add_argument("--trl_batch_sizes", type=int, nargs="+", default=[8, 32], help="TRL's per_device_train_batch_size, each by itself")
    train.set_defaults(bench=bench_train, marker="train")
    train.add_argument("--gradient_checkpointing_every", type=int, nargs="+", default=[1], help="as model.gradient_checkpointing_every, of kto_ds, a column each")
    train.add_argument("--gradient_checkpointing_offload", action="store_true", help="as model.gradient_checkpointing_offload, of kto_ds")
    memory = commands.add_parser("memory", help="the peak of a step", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    memory.add_argument("--shape", nargs="+", choices=SHAPES, default=["qwen3-0.6b", "qwen3-4b", "qwen3-32b-8layers"], help="one after the other")
    memory.add_argument("--max_tokens_per_microbatch", type=int, default=8192)
    memory.add_argument("--gradient_checkpointing_every", type=int, nargs="+", default=[1, 0], help="a column each; 0: no layer is checkpointed")
    memory.add_argument("--gradient_checkpointing_offload", action="store_true", help="as model.gradient_checkpointing_offload")
    memory.set_defaults(bench=bench_memory, marker="memory")
    for command in (precompute, train, memory):
        command.add_argument("--attention", default="auto", choices=["auto", *KERNELS], help="as model.attention")
        command.add_argument("--kernels", default="auto", choices=["auto", "liger", "torch"], help="as model.kernels")
        command.add_argument("--layout", default="prefix_shared", choices=get_args(Layout), help="as model.layout")
        command.add_argument("--smoke", action="store_true", help="a tiny float32 model on the CPU, to see that all of this runs")
        command.add_argument("--write", action="store_true", help="write the table to its page of docs/benchmarks")
    options = parser.parse_args()
    smoke = options.smoke or not torch.cuda.is_available()
    if smoke and options.write:
        raise SystemExit("--write: the smoke form gives no figures; leave it out, or run this where there is a CUDA device, without --smoke")
    page = MEMORY_PAGE if options.command == "memory" else PAGE
    around = around_markers(page, "train-trl" if options.command == "train" and options.trl else options.marker) if options.write else None
    if smoke:
        print(f"{'smoke form' if options.smoke else 'no CUDA device, hence the smoke form'}: a tiny float32 model on the CPU; its speeds say nothing", flush=True)
    try:
        text = options.bench(options, smoke)
    except UserError as error:
        raise SystemExit(str(error)) from None
    print(text)
    if around:
        page.write_text(text.join(around), encoding="utf-8")


if __name__ == "__main__":
    main()
