"""A plan for people: tables on the console, and a picture of the memory by part."""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.text import Text

from kto_ds.report.inspection import figures_table, heading, in_one_line, open_console
from kto_ds.report.plots import BLUE, GREEN, GREY, RED, STYLE
from kto_ds.report.throughput import GIB

# Part of the memory -> what the reader calls it, and its colour in the picture.
PARTS = {
    "weights": ("weights", BLUE), "gradients": ("gradients", "#4299e1"), "optimizer": ("master weights and moments", "#90cdf4"), "buckets": ("reduce buckets", "#6b46c1"),
    "gathered": ("gathered weights", "#b794f4"), "activations": ("activations", GREEN), "head": ("head", "#68d391"), "update": ("gradients in reduction, update", "#b7791f"),
    "context": ("CUDA and NCCL", GREY), "fragmentation": ("fragments", "#cbd5e0"),
}  # fmt: skip
UNKNOWN = "-"


def show_plan(plan: dict) -> None:
    """Print the plan; see stages/plan.py for what it holds."""
    console = open_console()
    model, gpu, work = plan["model"], plan["gpu"], plan["work"]
    heading(console, f"plan for {model['path']} on {gpu['name']} ({gpu['memory_bytes'] / GIB:.1f} GiB), deepspeed.config: {plan['deepspeed_config']}")
    shared = f"embedding and head {model['head']:,}, tied" if model["tied"] else f"embedding {model['embedding']:,}, head {model['head']:,}"
    counts = f"parameters {model['parameters']:,}: trainable {model['trainable']:,}, active {model['active']:,}"
    console.print(Text(f"{counts}; {shared}; {model['layers']} layers of {model['layer']:,}"), soft_wrap=True)
    console.print(Text(_work_line(work)), soft_wrap=True)
    heading(console, "memory of a GPU at its highest moment, GiB")
    _print(console, plan["gpus"], {name: lambda entry, part=part: f"{entry['memory_bytes'][part] / GIB:.1f}" for part, (name, _) in PARTS.items()} | {
        "all": lambda entry: f"{entry['total_bytes'] / GIB:.1f}", "fits": lambda entry: "yes" if entry["fits"] else "NO", "highest moment": lambda entry: entry["highest_moment"],
        "first config that fits": lambda entry: entry["smallest_config"] or "none",
    })  # fmt: skip
    heading(console, "host memory of a node, GiB; speed")
    _print(console, plan["gpus"], {
        "offloaded states": lambda entry: f"{entry['host_bytes_of_a_node']['offloaded'] / GIB:.0f}",
        "checkpointed activations, page-locked": lambda entry: f"{entry['host_bytes_of_a_node']['checkpointed_activations'] / GIB:.0f}",
        "while weights are read": lambda entry: f"{entry['host_bytes_of_a_node']['loading'] / GIB:.0f}",
        "tokens of the largest micro-batch": lambda entry: f"{entry['micro_batch_tokens']:,}",
        "PFLOP a step": lambda entry: f"{entry['step_flops'] / 1e15:,.1f}" if entry["step_flops"] else UNKNOWN,
        "policy tokens/s, all GPUs": lambda entry: _range(entry["tokens_per_second"], ",.0f"),
        "hours for the run": lambda entry: _range(entry["hours"], ",.1f"),
    })  # fmt: skip
    heading(console, "disk, GiB")
    disk = plan["disk"]
    console.print(Text(", ".join(f"{name.replace('_', ' ')} {size / GIB:,.1f}" for name, size in disk.items())), soft_wrap=True)
    heading(console, "warnings" if plan["warnings"] else "no warnings")
    for warning in plan["warnings"]:
        console.print(Text(f"- {in_one_line(warning)}"), soft_wrap=True)
    for line in plan["advice"]:
        console.print(Text(in_one_line(line)), soft_wrap=True)


def _work_line(work: dict) -> str:
    if not work["from_dataset"]:
        return ("assumed, as there is no dataset artefact yet: every row has data.max_length tokens, half of them completion, and no prompt is shared. "
                "For figures of your data, run kto-ds prepare first")  # fmt: skip
    steps = f"{work['num_examples']:,} examples, {work['num_steps']:,} steps of {work['step_tokens']:,.0f} tokens"
    return f"from the dataset artefact: {steps}, the longest sequence {work['longest_pair']:,} tokens"


def _print(console: Console, entries: list[dict], rows: dict) -> None:
    table = figures_table("GPUs", [str(entry["num_gpus"]) for entry in entries])
    for name, cell in rows.items():
        table.add_row(name, *(cell(entry) for entry in entries))
    console.print(table)


def _range(ends: list[float] | None, form: str) -> str:
    return f"{ends[0]:{form}} to {ends[1]:{form}}" if ends else UNKNOWN


def plot_plan(plan: dict, out_png: Path) -> None:
    """Draw the memory of a GPU as stacked bars, one for each number of GPUs, and what the GPU has as a line."""
    entries, limit = plan["gpus"], plan["gpu"]["memory_bytes"] / GIB
    places = range(len(entries))
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axis = figure.subplots()
        bottoms = [0.0] * len(entries)
        for part, (name, color) in PARTS.items():
            sizes = [entry["memory_bytes"][part] / GIB for entry in entries]
            axis.bar(places, sizes, bottom=bottoms, color=color, label=name, width=0.6)
            bottoms = [bottom + size for bottom, size in zip(bottoms, sizes)]
        axis.axhline(limit, color=RED, linestyle="--", label=f"{plan['gpu']['name']}, {limit:.0f} GiB")
        for place, top in zip(places, bottoms):
            axis.annotate(f"{top:.0f}", (place, top), ha="center", va="bottom")
        axis.set_xticks(places, [str(entry["num_gpus"]) for entry in entries])
        axis.set_xlabel("GPUs")
        axis.set_ylabel("GiB of a GPU")
        axis.grid(False, axis="x")
        axis.set_axisbelow(True)
        axis.set_title(f"{in_one_line(Path(plan['model']['path']).name)}: {plan['model']['parameters'] / 1e9:.2f} billion parameters, {in_one_line(Path(plan['deepspeed_config']).stem)}")
        figure.legend(*map(lambda found: found[::-1], axis.get_legend_handles_labels()), loc="outside right upper")
        figure.savefig(out_png, dpi=130)
