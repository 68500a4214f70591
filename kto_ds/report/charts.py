"""The charts of a report page as data: which metrics they show, how they are read, and the curves of one run or of several. page.js draws them."""

from typing import NamedTuple

from kto_ds.report.run_files import RunFiles
from kto_ds.report.series import Series, column, series

NUM_COLORS = 7  # of page.css
GREY = 6  # among them
DASHES = ("", "6 4", "2 3", "9 3 2 3")
MARKERS = ("circle", "square", "triangle", "diamond")


class Line(NamedTuple):
    metric: str
    words: str = ""  # where a chart has several
    error: str = ""  # the metric that is its standard error
    is_shared: bool = True  # whether it is drawn where several runs are


class Chart(NamedTuple):
    name: str
    title: str
    aid: str  # how to read it, in one sentence
    lines: tuple[Line, ...]
    guide: tuple[float, str] | None = None  # a level to compare with, and what it means
    unit: str = ""
    from_zero: bool = False
    is_noisy: bool = True  # so that smoothing shows more than it hides


LABELS = (("chosen", "desirable"), ("rejected", "undesirable"))
LEARNING = (
    Chart("loss", "Loss", "Lower is better; at the start it is half the mean weight, 0.5 with weights of 1, because the policy still is the reference.", (Line("loss"),)),
    Chart(
        "z", "Reference point z", "z = 0 means that the policy gives mismatched answers no more probability than the reference does, which is normal early on; a z that keeps growing means that it drifts away as a whole.",
        (Line("kl", "z"), Line("kl_raw", "before the clamp at 0, ± standard error", error="kl_stderr", is_shared=False)), unit="nats",
    ),
    Chart(
        "rewards", "Rewards by label", "A reward is β · (policy − reference): above 0 the policy finds an answer likelier than the reference did; both labels may fall, their gap is what counts.",
        tuple(Line(f"rewards/{label}", words) for label, words in LABELS), guide=(0, "as the reference"),
    ),
    Chart("margins", "Reward margin", "The mean reward of desirable answers minus that of undesirable ones: 0 means that nothing has been learnt.", (Line("rewards/margins"),), guide=(0, "nothing learnt")),
    Chart("auc", "Reward AUC", "The chance that a desirable answer has the higher reward of the two: 0.5 is a coin toss, 1 is perfect; believe held-out rows, and single steps little.", (Line("rewards/auc"),), guide=(0.5, "chance")),
)  # fmt: skip
LENGTH = (
    Chart(
        "length_correlation", "Reward against length, over time", "The correlation of reward and completion length among answers of one label: near 0 means that length decides nothing, and two lines of the same sign far from 0 that it does.",
        tuple(Line(f"length_correlation/{label}", words) for label, words in LABELS), guide=(0, "no relation"),
    ),
)  # fmt: skip
INNER = (
    Chart("logps", "Log-probs of the policy", "The mean log-probability of whole completions; a fall for both labels is common, a collapse of the desirable ones is not.", tuple(Line(f"logps/{label}", words) for label, words in LABELS), unit="nats"),
    Chart("grad_norm", "Gradient norm", "Before clipping, so it may exceed max_grad_norm; lasting growth or spikes ask for a lower learning rate.", (Line("grad_norm"),), from_zero=True),
    Chart("learning_rate", "Learning rate", "What the schedule gave each step.", (Line("learning_rate"),), from_zero=True, is_noisy=False),
    Chart("aux_loss", "Load-balancing loss", "Of a mixture of experts: it equals the experts of a token when all are used alike.", (Line("aux_loss"),)),
    Chart("load_max", "Busiest expert", "Tokens of the busiest expert over the mean of its layer: 1 is even, much more leaves experts idle.", (Line("router/load_max"),), guide=(1, "even")),
)  # fmt: skip
SPEED = (
    Chart("tokens_per_second", "Throughput", "Tokens of prompts and completions a second, over all ranks; steady is good, and a first step is always slow.", (Line("tokens_per_second"),), unit="tokens/s", from_zero=True, is_noisy=False),
    Chart("seconds", "Seconds a step", "Without evaluation and saving; lone peaks are longer rows, or a machine that was busy.", (Line("seconds"),), unit="s", from_zero=True, is_noisy=False),
    Chart("mfu", "MFU", "The share of the GPU's bfloat16 rate that the model's own arithmetic took: 0.3 to 0.5 is good.", (Line("mfu"),), from_zero=True, is_noisy=False),
    Chart("memory", "Peak memory", "The most that rank 0 has held so far; a late rise comes from the longest rows.", (Line("peak_memory_gib"),), unit="GiB", from_zero=True, is_noisy=False),
)  # fmt: skip


def line_chart(chart: Chart, runs: list[RunFiles]) -> dict | None:
    """Return what page.js draws of a chart; None where no run has its metrics."""
    curves = [curve for number, run in enumerate(runs) for curve in _curves(chart, run, number, len(runs))]
    if not curves:
        return None
    return {
        "kind": "lines", "name": chart.name, "title": chart.title, "unit": chart.unit, "from_zero": chart.from_zero, "is_noisy": chart.is_noisy, "curves": curves,
        "guide": chart.guide and {"value": chart.guide[0], "words": chart.guide[1]},
    }  # fmt: skip


def _curves(chart: Chart, run: RunFiles, number: int, num_runs: int) -> list[dict]:
    """Return the curves of a run: one run has a colour for each line or split, each of several runs has one for all; markers tell evaluation splits."""
    found = []
    lines = [line for line in chart.lines if line.is_shared or num_runs == 1]
    for place, line in enumerate(lines):
        for split_number, (split, records) in enumerate(run.records.items()):
            is_train = split == "train"
            if line.error and not is_train:
                continue
            steps, values, *errors = column(records, line.metric, *([line.error] if line.error else []))
            if not len(steps):
                continue
            color = number if num_runs > 1 else GREY if line.error else place if len(lines) > 1 else split_number
            words = " · ".join(filter(None, [line.words, split if len(run.records) > 1 or not line.words else ""]))
            look = {"color": color % NUM_COLORS, "dash": DASHES[place % len(DASHES)] if is_train else "", "marker": "" if is_train else MARKERS[(split_number - 1) % len(MARKERS)]}
            found.append(curve(words, series(steps, values, *errors), run=number, split=split, metric=line.metric, **look))
    return found


def curve(label: str, points: Series, **about: object) -> dict:
    """Return a curve as page.js takes it; its label is told from those of the same run."""
    return {"label": label, "x": points.steps, "y": points.values, "low": points.low, "high": points.high, **about}


def alt_text(chart: dict, names: list[str]) -> str:
    """Return a chart of lines in words, for those who cannot see it; `names` are those of the runs."""
    lines = []
    for shown in chart["curves"]:
        low, high = (function(shown[side] or shown["y"]) for function, side in ((min, "low"), (max, "high")))
        first, last = shown["x"][0], shown["x"][-1]
        where = f"from {shown['y'][0]:.4g} at {first:g} to {shown['y'][-1]:.4g} at {last:g}, between {low:.4g} and {high:.4g}" if len(shown["x"]) > 1 else f"{shown['y'][0]:.4g} at {first:g}"
        lines.append(f"{names[shown['run']] + ', ' if len(names) > 1 else ''}{shown['label']}: {where}")
    return f"{chart['title']}. " + "; ".join(lines) + "."
