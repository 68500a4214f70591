"""report.html in a real browser: it draws everything, complains of nothing, asks for nothing, and runs nothing that is not its own."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from kto_ds import cli
from tests.browser import Browser, Tab, find_browser
from tests.unit.made_up_runs import make_run, records_of
from tests.unit.test_report_page import HOSTILE, SAMPLE, hostile_run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_browser() is None, reason="no Chromium or Chrome is installed")]
DESKTOP, PHONE = 1280, 390
# Figures that show less than they hold, curves that leave their picture, and texts that leave the page.
DRAWN = """[...document.querySelectorAll('figure:not([hidden])')].map(figure => ({
    name: figure.id.slice(6), metrics: [...figure.querySelectorAll('g.drawn')].filter(g => g.querySelector('path, rect')).map(g => g.dataset.metric).sort(),
    empty: [...figure.querySelectorAll('path')].some(path => /NaN|undefined/.test(path.getAttribute('d'))),
    outside: [...figure.querySelectorAll('.curve, .band, .mark, rect')].some(shape => {
        const [box, plot] = [shape.getBoundingClientRect(), figure.querySelector('.plot svg').getBoundingClientRect()];
        return shape.closest('.plot') && (box.left < plot.left - 1 || box.right > plot.right + 1 || box.top < plot.top - 1 || box.bottom > plot.bottom + 1);
    }),
    texts: [...figure.querySelectorAll('.plot text')].filter(text => text.getBoundingClientRect().right > document.documentElement.clientWidth).length,
    key: figure.querySelectorAll('.key li').length, named: document.getElementById(figure.querySelector('.plot svg').getAttribute('aria-labelledby')).textContent.length > 20,
}))"""
CHARTS = "JSON.parse(document.getElementById('page-data').textContent).charts"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


def page_of(out: Path, *runs: Path) -> Path:
    assert cli.run(["report", *map(str, runs), "--out", str(out)]) == 0
    return out


def require_drawn(tab: Tab) -> None:
    """Every figure shows all that is in the page's data, within its picture, and the page is no wider than the screen."""
    expected = {chart["name"]: sorted(curve["metric"] for curve in chart["curves"]) if chart["kind"] == "lines" else ["logratios"] for chart in tab.value(CHARTS)}
    figures = {figure["name"]: figure for figure in tab.value(DRAWN)}
    assert {name: figure["metrics"] for name, figure in figures.items()} == expected and expected
    for name, figure in figures.items():
        assert not figure["empty"] and not figure["outside"] and not figure["texts"] and figure["named"], figure
        assert figure["key"] or name.startswith("logratios")
    assert tab.value("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert tab.complaints() == [] and len(tab.requests()) == 1


@pytest.mark.parametrize("num_steps", [1, 3, 80, 1500])
def test_a_run_of_any_length_is_drawn_whole(browser, tmp_path, num_steps):
    records = [record for record in records_of(num_steps, splits=("eval/maths", "eval/chat"), eval_steps=max(1, num_steps // 6)) if record["step"] != 40 or record["split"] != "train"]
    run = make_run(tmp_path / "run", [*records, {"split": "train", "step": 40, "skipped_steps": 1}], samples=[SAMPLE], data_report={"train": {"examples": 5}})
    page = page_of(tmp_path / "page.html", run)
    for width, dark in ((DESKTOP, False), (PHONE, True)):
        tab = Tab(browser, page, width=width, dark=dark)
        require_drawn(tab)
        assert tab.value("[...document.querySelectorAll('main > section')].map(s => s.id)") == [
            "what-the-policy-learns", "where-the-log-ratios-are", "whether-it-only-learns-length", "under-the-hood", "speed-and-memory", "data", "samples", "config", "final-numbers",
        ]  # fmt: skip
        picture = Image.open(tab.photograph(tmp_path / f"{width}.png"))
        assert picture.width == width and len(picture.convert("RGB").getcolors(1 << 24)) > 200
        assert (picture.convert("L").getpixel((2, 2)) < 80) == dark, "the page follows the colour scheme"


def test_a_pointer_and_the_arrow_keys_read_values(browser, tmp_path):
    records = [record for record in records_of(60) if record["split"] == "train"]
    tab = Tab(browser, page_of(tmp_path / "page.html", make_run(tmp_path / "run", records)), width=DESKTOP)
    readout = "document.querySelector('#chart-loss .readout').textContent"
    assert tab.value(readout) == ""
    left, right, top = tab.value("(() => { const box = document.querySelector('#chart-loss .plot').getBoundingClientRect(); return [box.left, box.right, box.top] })()")
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=right - 14, y=top + 60)
    assert tab.value(readout).startswith("step 60  ·  train 0.")
    tab.value("document.querySelector('#chart-loss .plot svg').focus()")
    tab.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowLeft")
    told = tab.value(readout)
    assert told.startswith("step 59  ·  train ") and float(told.split()[-1]) == pytest.approx(records[58]["loss"], rel=1e-3)
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=left + 57, y=top + 60)
    assert tab.value(readout).startswith("step 1  ·  ")
    assert tab.complaints() == []


def test_runs_are_compared_chosen_and_smoothed(browser, tmp_path):
    runs = [make_run(tmp_path / name, records_of(num_steps, seed=num_steps), beta=beta) for name, num_steps, beta in (("first", 90, 0.1), ("second", 50, 0.3))]
    page = page_of(tmp_path / "page.html", *runs)
    for width in (DESKTOP, PHONE):
        tab = Tab(browser, page, width=width)
        require_drawn(tab)
        assert tab.value("document.getElementById('config-diff').textContent").startswith("2 of 6 keys differ between the runs.")
        shown = "[...new Set([...document.querySelectorAll('figure:not([hidden]) g.drawn')].map(g => g.dataset.run))].sort().join()"
        path_of = "document.querySelector('#chart-loss g[data-run=\"1\"][data-split=train] .curve').getAttribute('d')"
        assert tab.value(shown) == "0,1"
        tab.value("document.querySelector('[data-choose-run=\"0\"]').click()")
        assert tab.value(shown) == "1"
        alone = tab.value(path_of)
        tab.value("(() => { const chooser = document.getElementById('smoothing'); chooser.value = '0'; chooser.dispatchEvent(new Event('change')) })()")
        assert tab.value(path_of) != alone and tab.value("document.querySelector('#chart-loss .raw')") is None
        tab.value("document.querySelector('[data-choose-run=\"1\"]').click()")
        assert "no run is chosen" in tab.value("document.querySelector('#chart-loss .plot').textContent")
        assert tab.complaints() == []


def test_curves_of_more_points_than_a_call_takes_arguments(browser, tmp_path):
    page = page_of(tmp_path / "page.html", make_run(tmp_path / "run", records_of(2)))
    before, data, after = re.split(r'(?<=<script type="application/json" id="page-data">)(.*?)(?=</script>)', page.read_text(), flags=re.DOTALL)
    content = json.loads(data)
    content["charts"][0]["curves"][0].update(x=list(range(300_000)), y=[number % 7 for number in range(300_000)])
    page.write_text(before + json.dumps(content) + after)
    tab = Tab(browser, page, width=DESKTOP)
    assert tab.complaints() == [] and tab.value("document.documentElement.dataset.drawn") == "1"


def test_hostile_texts_are_shown_and_do_nothing(browser, tmp_path):
    page = page_of(tmp_path / "page.html", hostile_run(tmp_path / "<img src=x onerror=alert(1)>"), hostile_run(tmp_path / "b"))
    tab = Tab(browser, page, width=PHONE)
    require_drawn(tab)
    assert tab.value("document.title").endswith("kto_ds report") and tab.value("document.images.length") == 0 and tab.value("document.scripts.length") == 2
    shown = tab.value("document.querySelector('.sample pre').textContent")
    assert shown == HOSTILE
    assert HOSTILE in tab.value("document.querySelector('#chart-loss .key').textContent")
