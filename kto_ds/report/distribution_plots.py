"""One picture of what lies behind the means of a run: log-ratios of each label over time, and rewards by length of completion."""

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from kto_ds.report.distribution_charts import heat_maps, length_chart
from kto_ds.report.plots import GREEN, GREY, RED, STYLE
from kto_ds.report.run_files import RunFiles

COLORS = {"chosen": GREEN, "rejected": RED}
LINESTYLES = {"chosen": "-", "rejected": "--"}
WRITTEN_EDGES = (0, 1, 4, 16, 64, 256)  # nats, on both sides


def plot_distributions(run: RunFiles, out_png: Path) -> bool:
    """Draw them; return whether there was anything to draw, as records of older runs have no histograms."""
    maps, lengths = heat_maps([run]), length_chart([run])
    if not maps or lengths is None:
        return False
    with rc_context(STYLE):
        figure = Figure(figsize=(13, 4), layout="constrained")  # not pyplot: nothing global, no window
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        *axes, last = figure.subplots(1, len(maps) + 1)
        for axis, chart in zip(axes, maps, strict=True):
            _draw_heat_map(axis, chart)
        _draw_lengths(last, lengths)
        figure.savefig(out_png, dpi=130)
    return True


def _draw_heat_map(axis: Axes, chart: dict) -> None:
    counts = np.array(chart["counts"], dtype=float).T  # bins upwards, steps to the right
    colors = LinearSegmentedColormap.from_list("shares", ["white", COLORS[chart["name"].rpartition("-")[2]]])
    steps = [chart["columns"][0][0] - 0.5, *(last + 0.5 for _, last in chart["columns"])]
    axis.pcolormesh(steps, np.arange(len(chart["edges"])), counts / counts.sum(axis=0), cmap=colors, rasterized=True)
    written = [(place, edge) for place, edge in enumerate(chart["edges"]) if edge is not None and abs(edge) in WRITTEN_EDGES]
    axis.set_yticks([place for place, _ in written], [f"{edge:g}" for _, edge in written])
    for place, edge in written:
        if edge == 0:
            axis.axhline(place, color=GREY, linewidth=0.8, linestyle=":")
    axis.grid(False)
    axis.set_title(f"{chart['title']}, nats")
    axis.set_xlabel("step")


def _draw_lengths(axis: Axes, chart: dict) -> None:
    for curve in chart["curves"]:
        label = curve["metric"].rpartition("/")[2]
        axis.plot(curve["x"], curve["y"], color=COLORS[label], linestyle=LINESTYLES[label], marker="o", markersize=4, label=label)
    axis.axhline(0, color=GREY, linewidth=0.8, linestyle=":")
    axis.set_xticks(range(len(chart["ticks"])), chart["ticks"], rotation=30)
    axis.set_title("reward by completion tokens, last quarter")
    axis.legend()
