"""Measure kto_ds beside TRL on one CPU thread, and write the tables of docs/benchmarks/cpu.md.

    python tools/bench_vs_trl.py precompute
    python tools/bench_vs_trl.py train

It needs Linux and `pip install trl==1.16.0` besides kto_ds. `precompute` compares the reference log-probs, `train` the training loop: the same random-init
Qwen3 model, tokenizer, rows and length limit on both sides, float32, CPU time, every repeat in a process of its own, the sides in turn. What is timed is
told in docs/benchmarks/cpu.md. The log-probs, or the losses, of both sides must agree before a speed is written down.
"""

import argparse
import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from benchmarks.page import PAGES, ROOT, around_markers
from benchmarks.process import ENVIRONMENT
from benchmarks.trl_precompute import bench_precompute
from benchmarks.trl_train import bench_train

TRL_VERSION = "1.16.0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    precompute = commands.add_parser("precompute", help="reference log-probs", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    precompute.add_argument("--num_rows", type=int, default=None, help="the first so many rows; default all")
    precompute.add_argument("--trl_batch_size", type=int, default=8, help="TRL's per_device_train_batch_size; 8 is its default")
    precompute.add_argument("--trl_ref_batch_sizes", type=int, nargs="*", default=[], help="values of TRL's precompute_ref_batch_size to measure besides")
    precompute.set_defaults(bench=bench_precompute)
    train = commands.add_parser("train", help="the training loop", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    train.add_argument("--num_rows", type=int, default=64, help="the first so many rows with prompts of their own, in whole batches")
    train.add_argument("--equal_tokens", type=int, default=None, help="cut the texts into rows of so many tokens of question and of answer each; default as they are")
    train.add_argument("--batch_size", type=int, default=8, help="rows of a step on both sides, one batch of TRL's; 8 is its default")
    train.set_defaults(bench=bench_train)
    for command, marker in ((precompute, "precompute-ref"), (train, "train")):
        command.add_argument("--rows", type=Path, default=ROOT.parent / "shared" / "data" / "kto_en_demo.json", help="JSON array of rows with messages and label")
        command.add_argument("--repeats", type=int, default=3)
        command.add_argument("--max_length", type=int, default=2048, help="tokens of prompt and completion together")
        command.add_argument("--hidden_size", type=int, default=256)
        command.add_argument("--num_layers", type=int, default=6)
        command.add_argument("--output", type=Path, default=PAGES / "cpu.md", help="Markdown file with the two markers")
        command.add_argument("--marker", default=marker, help="their name")
        command.add_argument("--print_only", action="store_true", help="leave the file as it is")
    options = parser.parse_args()
    if not find_spec("trl") or version("trl") != TRL_VERSION:
        raise SystemExit(f"this compares with TRL {TRL_VERSION}: pip install trl=={TRL_VERSION}")
    os.environ.update(ENVIRONMENT)
    around = None if options.print_only else around_markers(options.output, options.marker)
    text = options.bench(options)
    print(text)
    if around:
        options.output.write_text(text.join(around), encoding="utf-8")


if __name__ == "__main__":
    main()
