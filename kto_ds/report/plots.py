"""One picture of a run, from its metrics.jsonl."""

from functools import partial
from itertools import cycle
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter

from kto_ds.report.metrics_file import read_records
from kto_ds.report.run_files import by_split

BLUE, RED, GREEN, GREY = "#2b6cb0", "#c05621", "#2f855a", "#718096"
# Colour and marker of each evaluation split, so that it can be told without colour too.
SPLIT_STYLES = ((RED, "o"), ("#6b46c1", "s"), (GREEN, "^"), ("#b7791f", "D"), ("#b83280", "v"), ("#2c7a7b", "P"))

Splits = dict[str, list[dict]]  # records of each evaluation split by name
STYLE = {
    "font.size": 9,
    **{"axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left"},
    "axes.grid": True,
    "grid.color": "#e2e8f0",
    "axes.edgecolor": GREY,
    **{f"axes.spines.{side}": False for side in ("top", "right")},
    **{"legend.frameon": False, "legend.fontsize": 8},
    "lines.linewidth": 1.1,
}
MARKED_BELOW_POINTS = 30  # a line through few points hides where they are


def points(records: list[dict], *metrics: str) -> list[tuple]:
    """Return [steps, values of each metric] over the records that have them all; nothing if none has."""
    names = ("step", *metrics)
    return list(zip(*[[record[name] for name in names] for record in records if all(name in record for name in names)], strict=True))


def plot_metrics(metrics_file: Path, out_png: Path) -> None:
    """Draw what `metrics_file` holds; a metric that was not logged is left out."""
    evals: Splits = by_split(read_records(metrics_file))
    train = evals.pop("train", [])
    with rc_context(STYLE):
        figure = Figure(figsize=(13, 7), layout="constrained")  # not pyplot: nothing global, no window
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        for axis, (title, draw) in zip(figure.subplots(2, 3, sharex=True).flat, PANELS.items(), strict=True):
            axis.set_title(title)
            draw(axis, train, evals)
            _finish(axis)
        figure.supxlabel("step", fontsize=9)
        figure.savefig(out_png, dpi=130)


def _train_and_eval(axis: Axes, train: list[dict], evals: Splits, metric: str) -> None:
    _line(axis, train, metric, BLUE, "train")
    for (name, records), (color, marker) in zip(evals.items(), cycle(SPLIT_STYLES)):
        _dots(axis, records, metric, color, marker, name)


def _draw_kl(axis: Axes, train: list[dict], evals: Splits) -> None:
    # The error belongs to the mean before the clamp; z itself has none where it is held at 0.
    if found := points(train, "kl_raw", "kl_stderr"):
        steps, raw, stderr = found
        low, high = ([mean + sign * error for mean, error in zip(raw, stderr, strict=True)] for sign in (-1, 1))
        axis.fill_between(steps, low, high, color=GREY, alpha=0.25, linewidth=0)
        _line(axis, train, "kl_raw", GREY, "before the clamp, ± standard error", linestyle="--")
    _train_and_eval(axis, train, evals, "kl")


def _draw_rewards(axis: Axes, train: list[dict], evals: Splits) -> None:
    sides = {"chosen": GREEN, "rejected": RED}
    for side, color in sides.items():
        _line(axis, train, f"rewards/{side}", color, side)
    for (name, records), (_, marker) in zip(evals.items(), cycle(SPLIT_STYLES)):
        for side, color in sides.items():
            _dots(axis, records, f"rewards/{side}", color, marker, label=None)
        if any(points(records, f"rewards/{side}") for side in sides):
            axis.plot([], [], marker, color=GREY, markersize=5, label=name)


def _draw_gradient(axis: Axes, train: list[dict], evals: Splits) -> None:
    _line(axis, train, "grad_norm", BLUE, "gradient norm, before clipping")
    _from_zero(axis, headroom=1.25)
    if not points(train, "learning_rate"):
        return
    right = axis.twinx()
    _line(right, train, "learning_rate", GREY, "learning rate (right)", linestyle="--")
    _from_zero(right, headroom=1.25)
    right.grid(False)
    right.yaxis.set_major_formatter(StrMethodFormatter("{x:.1e}"))
    axis.plot([], [], color=GREY, linestyle="--", label="learning rate (right)")  # one legend for both axes


def _draw_speed(axis: Axes, train: list[dict], evals: Splits) -> None:
    _line(axis, train, "tokens_per_second", BLUE, "train")
    _from_zero(axis, headroom=1.1)
    axis.yaxis.set_major_formatter(EngFormatter(sep=""))


PANELS = {
    "loss": partial(_train_and_eval, metric="loss"),
    "reference point z (nats)": _draw_kl,
    "rewards": _draw_rewards,
    "reward margin": partial(_train_and_eval, metric="rewards/margins"),
    "gradient norm and learning rate": _draw_gradient,
    "tokens per second": _draw_speed,
}


def _line(axis: Axes, records: list[dict], metric: str, color: str, label: str, linestyle: str = "-") -> None:
    if found := points(records, metric):
        axis.plot(*found, color=color, linestyle=linestyle, label=label, marker="." if len(found[0]) < MARKED_BELOW_POINTS else "")


def _dots(axis: Axes, records: list[dict], metric: str, color: str, marker: str, label: str | None) -> None:
    if found := points(records, metric):
        axis.plot(*found, color=color, linestyle="", marker=marker, markersize=7, markeredgecolor="white", label=label, zorder=3)


def _from_zero(axis: Axes, headroom: float) -> None:
    axis.set_ylim(0, max((max(line.get_ydata()) for line in axis.lines), default=1) * headroom or 1)


def _finish(axis: Axes) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.margins(x=0.02)
    shown = axis.get_legend_handles_labels()[0]
    if len(shown) > 1:
        axis.legend()
    elif not shown:
        axis.set_axis_off()
        axis.text(0.5, 0.5, "not logged", transform=axis.transAxes, ha="center", va="center", color=GREY)
