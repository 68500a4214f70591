"""One picture of a split: how long its prompts and completions are, for desirable and undesirable examples apart, and how many there are of each."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter

from kto_ds.report.plots import GREEN, GREY, RED, STYLE

MAX_BINS = 40
# A limit further away than this many times the longest example is told in words: drawn, it would squeeze the bars.
LIMIT_IN_SIGHT = 1.6
LABELS = (("desirable", GREEN, "-"), ("undesirable", RED, "--"))


class Lengths(NamedTuple):
    """Tokens of E examples, after truncation."""

    prompt: np.ndarray  # [E]
    completion: np.ndarray  # [E]
    desirable: np.ndarray  # [E] bool


class LengthLimits(NamedTuple):
    """Where truncation sets in, in tokens; None for no limit."""

    prompt: int | None
    completion: int | None
    total: int | None


def plot_lengths(split: str, lengths: Lengths, limits: LengthLimits, label_counts: dict[str, tuple[int, int]], out_png: Path) -> None:
    """Draw the lengths of `split`, which has at least one example, and `label_counts`: (desirable, undesirable) of every split."""
    panels = (
        ("prompt tokens", lengths.prompt, limits.prompt, "max_prompt_length"),
        ("completion tokens", lengths.completion, limits.completion, "max_completion_length"),
        ("prompt and completion together, tokens", lengths.prompt + lengths.completion, limits.total, "max_length"),
    )
    with rc_context(STYLE):
        figure = Figure(figsize=(13, 7), layout="constrained")  # not pyplot: nothing global, no window
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        *axes, last = figure.subplots(2, 2).flat
        for axis, (title, tokens, limit, limit_name) in zip(axes, panels, strict=True):
            axis.set_title(f"{split}: {title}")
            _draw_lengths(axis, np.asarray(tokens), np.asarray(lengths.desirable))
            _mark_limit(axis, np.asarray(tokens), limit, limit_name)
            axis.legend(loc="upper right")
        last.set_title("examples of each label")
        _draw_labels(last, label_counts)
        figure.savefig(out_png, dpi=130)


def _draw_lengths(axis: Axes, tokens: np.ndarray, desirable: np.ndarray) -> None:
    """Shares of each label rather than counts, so that the shapes can be compared when one label is rare."""
    edges = _edges(tokens)
    for (label, color, linestyle), chosen in zip(LABELS, (desirable, ~desirable)):
        if chosen.any():
            shares = 100 * np.histogram(tokens[chosen], edges)[0] / chosen.sum()
            axis.stairs(shares, edges, fill=True, color=color, alpha=0.22)
            axis.stairs(shares, edges, color=color, linestyle=linestyle, linewidth=1.3, label=f"{label}, median {np.median(tokens[chosen]):,.0f}")
    axis.set_ylabel("share of the label's examples")
    axis.margins(x=0.02, y=0.35)  # the legend stands above the bars
    axis.set_ylim(bottom=0)
    axis.set_axisbelow(True)
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:.3g}%"))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _edges(tokens: np.ndarray) -> np.ndarray:
    """Return bin edges half-way between whole numbers, so that every bin holds equally many lengths."""
    low, high = int(tokens.min()), int(tokens.max())
    width = -(-(high - low + 1) // MAX_BINS)
    return np.arange(low, high + width + 1, width) - 0.5


def _mark_limit(axis: Axes, tokens: np.ndarray, limit: int | None, name: str) -> None:
    if limit is None:
        return
    full = (tokens >= limit).mean()
    label = f"{name} {limit:,}, filled by {f'{full:.2%}' if full else 'none'}"
    if limit <= LIMIT_IN_SIGHT * tokens.max():
        axis.axvline(limit, ymax=0.72, color=GREY, linestyle=":", linewidth=1.6, label=label)
    else:
        axis.plot([], [], color=GREY, linestyle=":", linewidth=1.6, label=f"{label}, beyond the right edge")


def _draw_labels(axis: Axes, label_counts: dict[str, tuple[int, int]]) -> None:
    """One pair of bars a split, the first split on top, with the numbers written out."""
    places = np.arange(len(label_counts))
    longest = max(max(counts) for counts in label_counts.values())
    for (label, color, _), counts, offset in zip(LABELS, zip(*label_counts.values()), (-0.2, 0.2)):
        bars = axis.barh(places + offset, counts, height=0.36, color=color, alpha=0.75, label=label)
        shares = [count / max(sum(both), 1) for count, both in zip(counts, label_counts.values())]
        axis.bar_label(bars, [f"{count:,} ({share:.0%})" for count, share in zip(counts, shares)], padding=4, fontsize=8, color=GREY)
    axis.set_yticks(places, list(label_counts))
    axis.set_ylim(max(len(label_counts), 3) - 0.5, -0.5)  # a single split does not fill the panel
    axis.set_xlim(0, 1.25 * longest)  # room for the numbers
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.grid(False, axis="y")
    axis.set_axisbelow(True)
    axis.tick_params(axis="y", length=0)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, -0.2), ncols=2)
