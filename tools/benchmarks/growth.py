"""What a step of kto_ds costs as sequences, batches and ranks grow, and what shared prompts save."""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.own_train import STATE_BYTES, Trained, base_config, make_artifacts, train_ours
from benchmarks.page import command_line, cores, table, versions
from benchmarks.process import in_fresh_process, in_fresh_ranks
from benchmarks.small_model import distinct_rows, equal_rows, make_model, paired_rows, read_rows, texts_of

FACTORS = (1, 2, 4, 8)
MIB = 1 << 20
TOLERANCE = 1e-5  # of a step's loss, between two ways to the same


class Setup(NamedTuple):
    """A folder with a model, and what makes rows for it."""

    folder: Path
    made: str  # the model in words
    all_rows: list[dict]
    tokenizer: object


def bench(options: argparse.Namespace, measure: Callable) -> str:
    """Make the model in a temporary folder and return `measure(setup, options)` below the lines that say what it was measured with."""
    from transformers import AutoTokenizer

    all_rows = read_rows(options.rows)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        shape = {"hidden_size": options.hidden_size, "num_layers": options.num_layers, "max_length": options.max_length, "vocab_size": options.vocab_size}
        made = make_model(model, texts_of(all_rows), **shape)
        text = measure(Setup(Path(folder), made, all_rows, AutoTokenizer.from_pretrained(model)), options)
    return f"{command_line()}\n\n{cores()}. {versions('torch', 'transformers', 'deepspeed')}.\n{made}\n{text}"


def make_run(setup: Setup, name: str, rows: list[dict], *, max_length: int, global_batch_size: int) -> dict:
    """Write the rows and make their artefacts in a folder of their own; return the config of a run on them."""
    work = setup.folder / name
    work.mkdir()
    (work / "model").symlink_to(setup.folder / "model")
    (work / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    config = base_config(work, max_length=max_length, global_batch_size=global_batch_size)
    in_fresh_process(make_artifacts, {**config, "output_dir": str(work / "artefacts")})
    return config


def in_turn(setup: Setup, configs: dict, repeats: int, ranks_of: Callable[..., int] = lambda key: 1) -> dict[object, list[list[Trained]]]:
    """Train every config `repeats` times, one after the other; return for each the repeats, and in each the ranks."""
    found: dict[object, list[list[Trained]]] = {key: [] for key in configs}
    for number, (repeat, key) in enumerate(itertools.product(range(repeats), configs)):
        trained = in_fresh_ranks(ranks_of(key), train_ours, {**configs[key], "output_dir": str(setup.folder / f"run{number}")})
        found[key].append(trained)
        print(f"repeat {repeat + 1}, {key}: {trained[0].spent.cpu_seconds:.1f} s of CPU, {trained[0].spent.wall_seconds:.1f} s", file=sys.stderr, flush=True)
    return found


def require_same_losses(found: dict[object, list[list[Trained]]]) -> float:
    """Return the largest relative difference of a step's loss; SystemExit where the ways do not come to the same."""
    losses = np.array([ranks[0].losses for repeats in found.values() for ranks in repeats])
    largest = float(np.abs(losses / losses[0] - 1).max())
    if not largest <= TOLERANCE:
        raise SystemExit(f"the losses differ by {largest:.1e} of their value, more than {TOLERANCE:.0e}")
    return largest


def median_of(repeats: list[list[Trained]], read: Callable[[Trained], float]) -> float:
    """The median over the repeats of the mean over the ranks."""
    return statistics.median(statistics.fmean(read(trained) for trained in ranks) for ranks in repeats)


def layouts(setup: Setup, options: argparse.Namespace) -> str:
    low, high = options.ratio
    rows = paired_rows(setup.all_rows, setup.tokenizer, options.num_rows, low=low, high=high, max_length=options.max_length)
    config = make_run(setup, "pairs", rows, max_length=options.max_length, global_batch_size=options.global_batch_size)
    found = in_turn(setup, {layout: {**config, "model": {**config["model"], "layout": layout}} for layout in ("packed", "prefix_shared")}, options.repeats)
    difference, first = require_same_losses(found), found["packed"][0][0]
    seconds = {layout: median_of(repeats, lambda one: one.spent.cpu_seconds) for layout, repeats in found.items()}
    text = table(found.items(), str, {
        "CPU seconds, every repeat": lambda layout, repeats: ", ".join(f"{ranks[0].spent.cpu_seconds:.1f}" for ranks in repeats),
        "CPU seconds, median": lambda layout, repeats: f"{seconds[layout]:.1f}",
        "**policy tokens per second of CPU**": lambda layout, repeats: f"**{first.policy_tokens / seconds[layout]:,.0f}**",
        "faster than packed by": lambda layout, repeats: f"**{seconds['packed'] / seconds[layout]:.2f}x**" if layout != "packed" else "",
        "tokens put through the model": lambda layout, repeats: f"{repeats[0][0].spent.tokens_processed:,}",
    })  # fmt: skip
    prompts = first.policy_tokens - first.completion_tokens
    return f"""{len(rows)} pairs of `{options.rows.name}` whose prompt has {low:g} to {high:g} times the tokens of its mean completion, {prompts / first.completion_tokens:.2f} times over all: {len(first.losses)} steps of {options.global_batch_size}
rows, {first.policy_tokens:,} policy tokens. One thread. {options.repeats} repeats, in turn.

{text}

The loss of a step differs by at most {difference:.1e} of its value between all of these runs.
"""


def ranks(setup: Setup, options: argparse.Namespace) -> str:
    rows = distinct_rows(setup.all_rows, setup.tokenizer, options.num_rows, options.max_length)
    config = make_run(setup, "ranks", rows, max_length=options.max_length, global_batch_size=options.global_batch_size)
    columns = {(stage, number): {**config, "deepspeed": {"config": stage}} for stage in ("zero0", "zero3") for number in (1, 2)}
    found = in_turn(setup, columns, options.repeats, ranks_of=lambda column: column[1])
    difference, first = require_same_losses(found), found["zero0", 1][0][0]
    wall = {column: median_of(repeats, lambda one: one.spent.wall_seconds) for column, repeats in found.items()}

    def phases(column: tuple[str, int], repeats: list[list[Trained]]) -> str:
        return ", ".join(f"{statistics.median(ranks[0].phases[name] for ranks in repeats):.1f}" for name in first.phases)

    text = table(found.items(), lambda column: f"{column[0]}, {column[1]} rank{'s' if column[1] > 1 else ''}", {
        "wall seconds, every repeat": lambda column, repeats: ", ".join(f"{ranks[0].spent.wall_seconds:.1f}" for ranks in repeats),
        "wall seconds a step, median": lambda column, repeats: f"{wall[column] / len(first.losses):.2f}",
        "**policy tokens/s**": lambda column, repeats: f"**{first.policy_tokens / wall[column]:,.0f}**",
        "efficiency": lambda column, repeats: f"**{wall[column[0], 1] / wall[column] / column[1]:.0%}**" if column[1] > 1 else "",
        "CPU seconds of a rank": lambda column, repeats: f"{median_of(repeats, lambda one: one.spent.cpu_seconds):.1f}",
        "of these in the kernel": lambda column, repeats: f"{median_of(repeats, lambda one: one.spent.system_seconds):.1f}",
        "seconds without CPU, a rank's mean: it waits": lambda column, repeats: f"{median_of(repeats, lambda one: one.spent.wall_seconds - one.spent.cpu_seconds):.1f}",
        f"rank 0, wall seconds: {', '.join(first.phases)}": phases,
        "tokens put through the model, each rank": lambda column, repeats: ", ".join(f"{trained.spent.tokens_processed:,}" for trained in repeats[0]),
        "MiB above imports at the peak, the rank with most": lambda column, repeats: f"{max(one.spent.peak_bytes - one.idle_bytes for ranks in repeats for one in ranks) / MIB:,.0f}",
    })  # fmt: skip
    return f"""{len(rows)} rows of `{options.rows.name}`: {len(first.losses)} steps of at most {options.global_batch_size} rows, {first.policy_tokens:,} policy tokens. One thread a rank. {options.repeats} repeats, in turn.

{text}

The loss of a step differs by at most {difference:.1e} of its value between all of these runs.
"""


class Point(NamedTuple):
    what: str  # the axis that grows
    factor: int
    tokens: int  # of a row, without the template's
    global_batch_size: int


def growth(setup: Setup, options: argparse.Namespace) -> str:
    points = [Point("row", factor, options.tokens * factor, options.global_batch_size) for factor in FACTORS]
    points += [Point("step", factor, options.tokens, options.global_batch_size * factor) for factor in FACTORS]
    configs = {}
    for point in points:
        rows = equal_rows(setup.all_rows, setup.tokenizer, 2 * point.global_batch_size, point.tokens // 2)
        config = make_run(setup, f"{point.what}{point.factor}", rows, max_length=options.max_length, global_batch_size=point.global_batch_size)
        configs[point] = {**config, "batch": {**config["batch"], "max_tokens_per_microbatch": options.max_tokens_per_microbatch}}
    found = in_turn(setup, configs, options.repeats)
    speed = {point: repeats[0][0].policy_tokens / median_of(repeats, lambda one: one.spent.cpu_seconds) for point, repeats in found.items()}
    memory = {point: max(ranks[0].working_bytes for ranks in repeats) / MIB for point, repeats in found.items()}
    if not options.print_only:
        draw(points, speed, memory, options.output.with_name("growth.png"))
    sections = []
    for what, title in (("row", "Longer rows"), ("step", "More rows in a step")):
        chosen = [(point, found[point]) for point in points if point.what == what]
        text = table(chosen, lambda point: f"{point.factor}x", {
            "tokens of a row": lambda point, repeats: f"{point.tokens:,}",
            "rows of a step": lambda point, repeats: f"{point.global_batch_size}",
            "**policy tokens per second of CPU**": lambda point, repeats: f"**{speed[point]:,.0f}**",
            "CPU seconds a step": lambda point, repeats: f"{median_of(repeats, lambda one: one.spent.cpu_seconds) / len(repeats[0][0].losses):.1f}",
            "**MiB above imports and states**": lambda point, repeats: f"**{memory[point]:,.0f}**",
        })  # fmt: skip
        sections.append(f"{title}:\n\n{text}\n")
    states = STATE_BYTES * found[points[0]][0][0].num_weights / MIB
    sections.append("![tokens per second and memory at 1x to 8x](growth.png)\n")
    return f"Two steps a run, micro-batches of at most {options.max_tokens_per_microbatch:,} tokens, one thread, {options.repeats} repeats, in turn; medians, of memory the largest. States: {states:,.0f} MiB.\n\n" + "\n".join(sections)


def draw(points: list[Point], speed: dict[Point, float], memory: dict[Point, float], path: Path) -> None:
    """Draw speed above memory, longer rows beside larger steps, each over the factor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 5.5), sharex="col", sharey="row", layout="constrained")
    for column, (what, label) in enumerate((("row", "tokens of a row"), ("step", "rows of a step"))):
        chosen = [point for point in points if point.what == what]
        places = range(len(chosen))
        for line, (values, name, color) in enumerate(((speed, "policy tokens/s of CPU", "#1f5fa8"), (memory, "MiB above the states", "#b0562a"))):
            axis = axes[line, column]
            axis.plot(places, [values[point] for point in chosen], "o-", color=color, linewidth=2)
            for place, point in zip(places, chosen):
                axis.annotate(f"{values[point]:,.0f}", (place, values[point]), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=9)
            axis.set_xlim(-0.4, len(chosen) - 0.6)
            axis.set_ylim(0, 1.2 * max(values.values()))
            axis.yaxis.set_major_formatter("{x:,.0f}")
            axis.grid(axis="y", color="#dddddd")
            axis.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axis.set_ylabel(name)
        axes[1, column].set_xlabel(label)
        axes[1, column].set_xticks(places, [f"{point.tokens if what == 'row' else point.global_batch_size:,}\n{point.factor}x" for point in chosen])
    axes[0, 0].set_title("longer rows")
    axes[0, 1].set_title("more rows in a step")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
