"""One run, or several beside each other, as a page of HTML that is whole by itself: no network, no library, and it runs no script but its own."""

import base64
import hashlib
import json
from pathlib import Path

from kto_ds.report.charts import INNER, LEARNING, LENGTH, NUM_COLORS, SPEED, Chart, alt_text, line_chart
from kto_ds.report.distribution_charts import heat_alt_text, heat_maps, length_chart
from kto_ds.report.page_tables import configs, data_reports, escaped, final_numbers, length_table, samples, time_bars
from kto_ds.report.run_files import RunFiles
from kto_ds.report.series import is_number

HEAT_AID = "Each column holds some steps, darker where more answers are; 0 means unchanged, desirable answers should move up, and undesirable ones below them."
LENGTH_AID = "Mean reward by tokens of the answer, last quarter of the log: two flat lines apart mean that the label is learnt, two that rise or fall together that length is."
STYLE, SCRIPT = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))


def page(runs: list[RunFiles], *, made: str) -> str:
    """Return the page of at least one run; `made` says when it was drawn."""
    charts: list[dict] = []
    sections = {
        "What the policy learns": _grid(_line_figures(LEARNING, runs, charts)),
        "Where the log-ratios are": _distributions(runs, charts),
        "Whether it only learns length": _length(runs, charts),
        "Under the hood": _grid(_line_figures(INNER, runs, charts)),
        "Speed and memory": _speed(runs, charts),
        "Data": data_reports(runs),
        "Samples": samples(runs),
        "Config": configs(runs),
        "Final numbers": final_numbers(runs),
    }
    kept = [(title, body, _slug(title)) for title, body in sections.items() if body]
    names = ", ".join(run.name for run in runs)
    embedded = _embedded({"runs": [run.name for run in runs], "charts": charts})
    return "\n".join([
        "<!DOCTYPE html>", '<html lang="en">', "<head>", '<meta charset="utf-8">', '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{_policy()}">', '<meta name="color-scheme" content="light dark">',
        f"<title>{escaped(names)} · kto_ds report</title>", '<link rel="icon" href="data:,">', f"<style>{STYLE}</style>", "</head>", "<body>",
        f'<header class="top"><h1>{escaped(names)}</h1><p class="quiet">kto_ds report, drawn {escaped(made)}</p>',
        "<noscript><p>The curves are drawn by a script in this page, which is switched off here. Numbers, samples and configs are readable without.</p></noscript>",
        f'<ul class="runs">{"".join(_run_card(run, number, len(runs)) for number, run in enumerate(runs))}</ul>',
        _controls(), f'<nav aria-label="sections">{"".join(f"""<a href="#{slug}">{escaped(title)}</a>""" for title, _, slug in kept)}</nav></header>',
        "<main>", *(f'<section id="{slug}" aria-label="{escaped(title)}"><h2>{escaped(title)}</h2>{body}</section>' for title, body, slug in kept), "</main>",
        "<footer>Curves of more than 600 points are drawn as means of neighbouring points, with a band from the lowest to the highest of them. All numbers are in metrics.jsonl.</footer>",
        f'<script type="application/json" id="page-data">{embedded}</script>', f"<script>{SCRIPT}</script>", "</body>", "</html>", "",
    ])  # fmt: skip


def _policy() -> str:
    """Return what the page may do: show its style, run its one script. Nothing is loaded, and a script that got in by a text would not run."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def _embedded(data: dict) -> str:
    """Return data as JSON that no text in it can end, or be read as anything else than data."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _slug(title: str) -> str:
    return title.lower().replace(" ", "-")


def _distributions(runs: list[RunFiles], charts: list[dict]) -> str:
    maps = heat_maps(runs)
    charts += maps
    return _grid([_figure(drawn, HEAT_AID, heat_alt_text(drawn)) for drawn in maps], is_wide=True)


def _length(runs: list[RunFiles], charts: list[dict]) -> str:
    figures = _line_figures(LENGTH, runs, charts)
    if drawn := length_chart(runs):
        charts.append(drawn)
        figures.insert(0, _figure(drawn, LENGTH_AID, alt_text(drawn, [run.name for run in runs])))
    return _grid(figures, is_wide=True) + length_table(runs)


def _speed(runs: list[RunFiles], charts: list[dict]) -> str:
    return _grid(_line_figures(SPEED, runs, charts), is_wide=True) + time_bars(runs)


def _line_figures(found: tuple[Chart, ...], runs: list[RunFiles], charts: list[dict]) -> list[str]:
    """Return the figures of those charts that have anything to show, and add to `charts` what is to be drawn in them."""
    figures = []
    for chart in found:
        if drawn := line_chart(chart, runs):
            charts.append(drawn)
            figures.append(_figure(drawn, chart.aid, alt_text(drawn, [run.name for run in runs])))
    return figures


def _grid(figures: list[str], *, is_wide: bool = False) -> str:
    return f'<div class="charts{" wide" if is_wide else ""}">{"".join(figures)}</div>' if figures else ""


def _figure(drawn: dict, aid: str, alt: str) -> str:
    name = f"chart-{escaped(drawn['name'])}"
    unit = f' <span class="unit">({escaped(drawn["unit"])})</span>' if drawn.get("unit") else ""
    return (
        f'<figure id="{name}" aria-labelledby="{name}-title" aria-describedby="{name}-alt"><figcaption><h3 id="{name}-title">{escaped(drawn["title"])}{unit}</h3><p>{escaped(aid)}</p></figcaption>'
        f'<div class="plot"></div><ul class="key" aria-hidden="true"></ul><p class="readout" aria-live="polite"></p><p id="{name}-alt" hidden>{escaped(alt)}</p></figure>'
    )


def _run_card(run: RunFiles, number: int, num_runs: int) -> str:
    """Return what there is to say of a run in a few lines."""
    state = str(run.status.get("state", "")) or "unknown"
    step = max((record["step"] for records in run.records.values() for record in records), default=0)
    skipped = sum(int(record["skipped_steps"]) for record in run.train if is_number(record.get("skipped_steps")))
    epoch = next((record["epoch"] for record in reversed(run.train) if is_number(record.get("epoch"))), None)
    known = {name: run.config.get(key) for name, key in (("model", "model.path"), ("loss", "loss.loss_type"), ("beta", "loss.beta"), ("learning rate", "optim.learning_rate"), ("batch", "batch.global_batch_size"))}
    facts = [f"{name} {value}" for name, value in known.items() if value is not None]
    lines = [f'<p><span class="state {escaped(state)}">{escaped(_state_words(state, run.status))}</span>, step {step:,}{f", epoch {epoch:.2f}" if epoch is not None else ""}</p>']
    if run.status.get("reason"):
        lines.append(f"<p>{escaped(run.status['reason'])}</p>")
    if skipped:
        lines.append(f"<p>{skipped:,} step{'s' if skipped > 1 else ''} left out, see numerics.jsonl</p>")
    lines += [f"<p>{escaped(', '.join(facts))}</p>"] if facts else []
    lines += [f"<p>newest log line: {escaped(run.updated)}</p>"] if run.updated else []
    dot = f'<span class="dot" style="background:var(--c{number % NUM_COLORS})"></span>{escaped(run.name)}'
    name = f'<label><input type="checkbox" data-choose-run="{number}" checked>{dot}</label>' if num_runs > 1 else ""
    return f"<li>{name}{''.join(lines)}</li>"


def _state_words(state: str, status: dict) -> str:
    words = {"unknown": "no status.json", "running": "still running, or killed without a word"}.get(state, state)
    return f"{words}, exit code {status['exit_code']}" if status.get("exit_code") else words


def _controls() -> str:
    options = "".join(f'<option value="{weight}"{" selected" if words == "light" else ""}>{words}</option>' for weight, words in ((0, "none"), (0.8, "light"), (0.95, "strong")))
    return f'<div class="controls"><label>smoothing of training curves, whose own values stay as faint lines: <select id="smoothing">{options}</select></label></div>'
