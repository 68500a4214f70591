"""docs/report.md: its commands run, and it names every chart and every metric that is logged for them."""

import re
import shlex
from pathlib import Path

from kto_ds import cli
from kto_ds.report.charts import INNER, LEARNING, LENGTH, SPEED
from kto_ds.report.distributions import LENGTH_BUCKETS, LOGRATIO_EDGES
from tests.distributed.runs import write_config
from tests.unit.made_up_runs import make_run, records_of

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")


def test_every_command_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "beta01", "beta03"):
        make_run(tmp_path / "runs" / name, records_of(3))
    write_config(tmp_path / "run.yaml", output_dir="runs/mine", model={"path": "m"}, data={"train": [{"path": "rows.jsonl"}]})
    commands = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 6
    for line in commands:
        program, *arguments = [str(found) for word in shlex.split(line, comments=True) for found in (sorted(Path().glob(word)) if "*" in word else [word])]
        assert program == "kto-ds" and cli.run(arguments) == 0, line
    written = {str(path) for path in Path().rglob("*.html")} | {path.name for path in Path("pictures").iterdir()} | {path.name for path in Path("runs/mine").glob("*.png")}
    assert written == {
        "runs/mine/report.html", "runs/beta01/report.html", "compare.html", "one.html", "beta01.png", "beta01-distributions.png", "beta03.png", "beta03-distributions.png", "metrics.png",
        "distributions.png",
    }  # fmt: skip


def test_every_chart_and_metric_is_explained():
    for chart in (*LEARNING, *LENGTH, *INNER, *SPEED):
        assert re.search(rf"^\|.*\b{re.escape(chart.title)}\b", PAGE, re.MULTILINE), chart.title
    for metric in records_of(1)[0]:
        assert metric in ("split", "step", "epoch") or metric.startswith(("count/", "seconds/")) or f"`{metric}`" in PAGE or f"`{metric.split('/')[0]}/*`" in PAGE, metric


def test_the_bins_are_those_of_the_code():
    positive = [0.25 * 2 ** (k / 2) for k in range(21)]
    assert list(LOGRATIO_EDGES) == [*(-edge for edge in positive[::-1]), 0, *positive] and positive[-1] == 256
    assert "44 counts" in PAGE and len(LOGRATIO_EDGES) + 1 == 44 and "1, 2 to 3, 4 to 7, 8 to 15 ... 16384 tokens" in PAGE and (LENGTH_BUCKETS[:5], LENGTH_BUCKETS[-1]) == ((1, 2, 4, 8, 16), 16384)


def test_the_pictures_are_small_and_there():
    for name in re.findall(r"!\[.*?\]\((.*?)\)", PAGE):
        assert (ROOT / "docs" / name).read_bytes().startswith(b"\x89PNG") and (ROOT / "docs" / name).stat().st_size < 150_000, name
