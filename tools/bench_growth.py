"""Measure what the training loop of kto_ds costs as its work grows, on a CPU, and write the tables of docs/benchmarks.

    python tools/bench_growth.py growth      # longer rows, more rows in a step: growth.md and growth.png
    python tools/bench_growth.py ranks       # one rank and two, ZeRO-0 and ZeRO-3: growth.md
    python tools/bench_growth.py layouts     # packed and prefix_shared on paired rows: cpu.md

Every run trains a random-init Qwen3 model through `kto-ds train` in processes of its own, one thread each. It needs Linux. What is timed is told on the pages.
"""

import argparse
import os
from pathlib import Path

from benchmarks.growth import bench, growth, layouts, ranks
from benchmarks.page import PAGES, ROOT, around_markers
from benchmarks.process import ENVIRONMENT
from benchmarks.small_model import VOCAB_SIZE

DATA = ROOT.parent / "shared" / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    settings = {
        growth: ("longer rows, larger steps", "kto_en_demo.json", "growth.md", 16),
        ranks: ("one rank and two", "kto_en_demo.json", "growth.md", 16),
        layouts: ("packed and prefix_shared", "dpo_en_demo.json", "cpu.md", 16),
    }
    for measure, (summary, rows, page, batch_size) in settings.items():
        command = commands.add_parser(measure.__name__, help=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.add_argument("--rows", type=Path, default=DATA / rows, help="JSON array of rows")
        command.add_argument("--global_batch_size", type=int, default=batch_size, help="rows of a step")
        command.add_argument("--repeats", type=int, default=3)
        command.add_argument("--max_length", type=int, default=4096 if measure is growth else 2048, help="tokens of prompt and completion together")
        command.add_argument("--hidden_size", type=int, default=256)
        command.add_argument("--num_layers", type=int, default=6)
        command.add_argument("--vocab_size", type=int, default=VOCAB_SIZE, help="rows of the head; the tokenizer has at most so many tokens")
        command.add_argument("--output", type=Path, default=PAGES / page, help="Markdown file with the two markers")
        command.add_argument("--marker", default=measure.__name__, help="their name")
        command.add_argument("--print_only", action="store_true", help="leave the file as it is")
        command.set_defaults(measure=measure)
        if measure is growth:
            command.add_argument("--tokens", type=int, default=128, help="of a row at 1x, half of them in the answer")
            command.add_argument("--max_tokens_per_microbatch", type=int, default=1152, help="small, so that the step of 1x fills it; a row of 8x must fit")
        else:
            command.add_argument("--num_rows", type=int, default=48 if measure is ranks else 24, help="rows, or pairs, of the run")
        if measure is layouts:
            command.add_argument("--ratio", type=float, nargs=2, default=[0.8, 1.25], help="tokens of a prompt over the mean of its two completions, at least and at most")
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    around = None if options.print_only else around_markers(options.output, options.marker)
    text = bench(options, options.measure)
    print(text)
    if around:
        options.output.write_text(text.join(around), encoding="utf-8")


if __name__ == "__main__":
    main()
