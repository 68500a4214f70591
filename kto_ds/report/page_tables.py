"""The parts of a report page that are text: final numbers, where the time goes, the data, samples, configs. Whatever comes from files is escaped here."""

import html
from collections.abc import Iterable, Sequence
from statistics import fmean

from kto_ds.report.charts import LABELS, NUM_COLORS
from kto_ds.report.distribution_charts import by_length, margins
from kto_ds.report.run_files import RunFiles, flat
from kto_ds.report.series import column, is_number

PHASES = (("kl", "mismatched pairs"), ("policy", "matched pairs"), ("update", "optimizer"), ("host", "host"))
MOST_SAMPLES = 24  # prompts that are shown of all runs
MOST_EARLIER = 6  # of the earlier answers to a prompt
MOST_CHARACTERS = 2000  # of a text
MOST_SOURCES = 50


def escaped(value: object) -> str:
    return html.escape(str(value), quote=True)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: Iterable[int] = ()) -> str:
    """Return a table of escaped cells; a row of a single cell heads the rows below it."""
    text, width = set(text_columns), len(head)
    titles = "".join(f'<th scope="col"{_text_class(place in text)}>{escaped(name)}</th>' for place, name in enumerate(head))
    body = []
    for row in rows:
        if len(row) == 1:
            body.append(f'<tr class="group"><th colspan="{width}" scope="rowgroup">{escaped(row[0])}</th></tr>')
        else:
            cells = "".join(f"<td{_text_class(place in text)}>{escaped(cell)}</td>" for place, cell in enumerate(row[1:], start=1))
            body.append(f'<tr><th scope="row">{escaped(row[0])}</th>{cells}</tr>')
    return f'<div class="table"><table><thead><tr>{titles}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _text_class(is_text: bool) -> str:
    return ' class="text"' if is_text else ""


def number(value: object) -> str:
    if not is_number(value):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


# final numbers


def final_numbers(runs: list[RunFiles]) -> str:
    """Return the last value of every metric, of one run beside the first, the least and the largest."""
    rows: list[list[str]] = []
    for split in dict.fromkeys(split for run in runs for split in run.records):
        logged = [run.records.get(split, []) for run in runs]
        names = dict.fromkeys(name for records in logged for record in records for name, value in record.items() if is_number(value) and name != "step")
        if names:
            rows.append([split])
        for name in names:
            found = [column(records, name) for records in logged]
            rows.append([name, *(_of_one(*found[0]) if len(runs) == 1 else [number(_plain(values[-1])) if len(values) else "–" for _, values in found])])
    head = ["metric", "first", "last", "lowest, at step", "highest, at step"] if len(runs) == 1 else ["metric, last value", *(run.name for run in runs)]
    return table(head, rows) if rows else '<p class="quiet">No metrics yet.</p>'


def _of_one(steps: Sequence[float], values: Sequence[float]) -> list[str]:
    ends = [number(_plain(values[place])) for place in (0, -1)]
    return [*ends, *(f"{number(_plain(values[place]))}, {steps[place]:,.0f}" for place in (values.argmin(), values.argmax()))]


def _plain(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(value)


# rewards and length


def length_table(runs: list[RunFiles]) -> str:
    """Return each run's margin beside that among completions of similar length; nothing where no run has them."""
    found = [(run, margins(by_length(run.train))) for run in runs]
    rows = [[run.name, *(f"{value:.4g}" for value in both)] for run, both in found if both]
    if not rows:
        return ""
    note = "Both are of the last quarter of the training log. Where the second is close to the first, length is not what the labels are told apart by; where it is near 0, it is all."
    return f'<div class="card"><h3>Reward margin, with and without the help of length</h3><p class="aid">{note}</p>{table(["run", "margin", "margin among answers of similar length"], rows)}</div>'


# time


def time_bars(runs: list[RunFiles]) -> str:
    """Return, for each run, a bar of the mean seconds of a step by phase; nothing where no run has them."""
    bars = []
    for run in runs:
        means = {phase: fmean(column(run.train, f"seconds/{phase}")[1]) for phase, _ in PHASES if len(column(run.train, f"seconds/{phase}")[1])}
        total = sum(means.values())
        if total > 0:
            words = {phase: f"{name} {means[phase]:.3g} s ({means[phase] / total:.0%})" for phase, name in PHASES if phase in means}
            parts = "".join(f'<span style="width:{100 * means[phase] / total:.2f}%;background:var(--c{place})" title="{escaped(words[phase])}"></span>' for place, (phase, _) in enumerate(PHASES) if phase in means)
            key = "".join(f'<li><span class="dot" style="background:var(--c{place})"></span>{escaped(words[phase])}</li>' for place, (phase, _) in enumerate(PHASES) if phase in means)
            bars.append(f'<div class="name">{escaped(run.name)}</div><div><div class="bar" role="img" aria-label="{escaped(", ".join(words.values()))}">{parts}</div><ul class="key">{key}</ul></div>')
    if not bars:
        return ""
    note = "Mean seconds of a step: scoring mismatched pairs for z, forward and backward of the matched pairs, clipping and optimizer, and the host alone, which should be next to nothing."
    return f'<div class="card"><h3>Where the time goes</h3><p class="aid">{note}</p><div class="time">{"".join(bars)}</div></div>'


# data


def data_reports(runs: list[RunFiles]) -> str:
    """Return what prepare reported on the data, runs of the same data together."""
    reports: list[tuple[dict, list[str]]] = []
    for run in runs:
        same = next((names for report, names in reports if report == run.data_report), None)
        if same is not None:
            same.append(run.name)
        elif run.data_report:
            reports.append((run.data_report, [run.name]))
    parts = []
    for report, names in reports:
        counts = {split: flat({key: value for key, value in found.items() if key != "sources"}) for split, found in report.items() if isinstance(found, dict)}
        keys = dict.fromkeys(key for found in counts.values() for key in found)
        rows = [[key.replace(".", ": ").replace("_", " "), *(_cell(found.get(key)) for found in counts.values())] for key in keys]
        sources = [(split, source) for split, found in report.items() if isinstance(found, dict) for source in found.get("sources") or [] if isinstance(source, dict)]
        lines = "".join(f'<p class="quiet">{escaped(split)}: {escaped(source.get("path"))}, {escaped(_cell(source.get("examples")))} examples</p>' for split, source in sources[:MOST_SOURCES])
        more = f'<p class="quiet">and {len(sources) - MOST_SOURCES} more sources</p>' if len(sources) > MOST_SOURCES else ""
        title = f"<h3>{escaped(', '.join(names))}</h3>" if len(runs) > 1 else ""
        parts.append(f'<div class="card">{title}{table(["", *counts], rows)}{lines}{more}</div>')
    return "".join(parts)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


# samples


def samples(runs: list[RunFiles]) -> str:
    """Return, for each sampled prompt, what the dataset has, the answer before training, and the newest answer of every run with those before it."""
    found: dict[tuple[str, str], dict[int, dict[int, dict]]] = {}  # by split and prompt, run, step: after a resume the later of two counts
    for place, run in enumerate(runs):
        for sample in run.samples:
            key = str(sample.get("split", "")), str(sample.get("prompt", sample.get("row", "")))
            found.setdefault(key, {}).setdefault(place, {})[_step(sample)] = sample
    shown = list(found.items())[:MOST_SAMPLES]
    cards = [_sample_card(split, prompt, of_run, runs) for (split, prompt), of_run in shown]
    more = f'<p class="quiet">{len(found) - MOST_SAMPLES} more prompts are in samples.jsonl.</p>' if len(found) > MOST_SAMPLES else ""
    return "".join(cards) + more


def _sample_card(split: str, prompt: str, of_run: dict[int, dict[int, dict]], runs: list[RunFiles]) -> str:
    sorted_of_run = {place: [entries[step] for step in sorted(entries)] for place, entries in of_run.items()}
    every = [entry for entries in sorted_of_run.values() for entry in entries]
    label = next((LABELS[0][1] if entry["label"] else LABELS[1][1] for entry in every if isinstance(entry.get("label"), bool)), None)
    row = next((entry["row"] for entry in every if "row" in entry), None)
    parts = [_text("prompt", prompt)]
    if dataset := next((entry["dataset_completion"] for entry in every if entry.get("dataset_completion")), None):
        parts.append(_text(f"in the data{f', {label}' if label else ''}", dataset))
    parts += [_text(words, text) for words, text in _befores(sorted_of_run, runs)]
    for place, entries in sorted_of_run.items():
        newest = entries[-1]
        name = f"{runs[place].name}, " if len(runs) > 1 else ""
        earlier = _spread(entries[:-1], MOST_EARLIER)
        texts = "".join(_text(_when(entry), entry.get("completion", "")) for entry in earlier)
        history = f"<details><summary>{len(earlier)} of {len(entries) - 1} earlier</summary>{texts}</details>" if earlier else ""
        parts.append(_text(f"{name}{_when(newest)}", newest.get("completion", ""), color=place % NUM_COLORS, after=history))
    return f'<div class="card"><h3>{escaped(split)}{f", row {escaped(row)}" if row is not None else ""}</h3><div class="sample">{"".join(parts)}</div></div>'


def _spread(entries: list[dict], most: int) -> list[dict]:
    """Return up to `most` entries, evenly over all, with the first and the last."""
    if len(entries) <= most:
        return entries
    return [entries[round(place * (len(entries) - 1) / (most - 1))] for place in range(most)]


def _befores(sorted_of_run: dict[int, list[dict]], runs: list[RunFiles]) -> list[tuple[str, str]]:
    """Return what the policy answered before training: once where all runs began alike."""
    found = {place: str(entry["before"]) for place, entries in sorted_of_run.items() for entry in entries if entry.get("before") is not None}
    if len(set(found.values())) == 1:
        return [("before training", next(iter(found.values())))]
    return [(f"{runs[place].name}, before training", text) for place, text in found.items()]


def _step(sample: dict) -> int:
    return sample["step"] if isinstance(sample.get("step"), int) else 0


def _when(sample: dict) -> str:
    reward = f", reward of the answer in the data {sample['dataset_reward']:.3g}" if is_number(sample.get("dataset_reward")) else ""
    return f"step {_step(sample):,}{reward}"


def _text(head: str, text: object, *, color: int | None = None, after: str = "") -> str:
    shown = str(text)
    cut = f"{shown[:MOST_CHARACTERS]} … ({len(shown) - MOST_CHARACTERS:,} more characters)" if len(shown) > MOST_CHARACTERS else shown
    style = "" if color is None else f' style="border-color:var(--c{color})"'
    return f"<section{style}><h4>{escaped(head)}</h4><pre>{escaped(cut)}</pre>{after}</section>"


# config


def configs(runs: list[RunFiles]) -> str:
    """Return the keys in which the runs differ, of one run those that are not at their default, and below them all keys."""
    known = [run for run in runs if run.config]
    if not known:
        return ""
    keys = list(dict.fromkeys(key for run in known for key in run.config))
    if len(known) > 1:
        differing = [key for key in keys if len({_shown(run.config.get(key)) for run in known}) > 1]
        head, rows = ["key", *(run.name for run in known)], [[key, *(_shown(run.config.get(key)) for run in known)] for key in differing]
        words = f"{len(differing)} of {len(keys)} keys differ between the runs." if differing else "The runs have the same config."
    else:
        [run] = known
        changed = [key for key in keys if key not in run.defaults or run.defaults[key] != run.config[key]]
        head, rows = ["key", "value", "default"], [[key, _shown(run.config[key]), _shown(run.defaults[key]) if key in run.defaults else "none"] for key in changed]
        words = f"{len(changed)} of {len(keys)} keys are not at their default."
    every = [[key, *(_shown(run.config.get(key)) for run in known)] for key in keys]
    columns = range(1, len(head))
    difference = table(head, rows, text_columns=columns) if rows else ""
    everything = table(["key", *(run.name for run in known)], every, text_columns=range(1, len(known) + 1))
    return f'<div class="card" id="config-diff"><p class="aid">{words}</p>{difference}<details><summary>all {len(keys)} keys</summary>{everything}</details></div>'


def _shown(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
