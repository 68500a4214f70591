"""report.html, without a browser: the numbers in it are those of metrics.jsonl, whatever of a run there is, and no text of a file is more than text."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from kto_ds import cli
from kto_ds.report.charts import INNER, LEARNING, LENGTH, SPEED
from kto_ds.report.distribution_charts import LAST_SHARE, by_length, margins
from kto_ds.report.distributions import LENGTH_BUCKETS, LOGRATIO_EDGES
from kto_ds.report.page import page
from kto_ds.report.run_files import RunFiles, by_split, distinct_names
from kto_ds.report.samples_file import Sample
from kto_ds.report.series import MOST_POINTS, SHORT_POINTS, series
from tests.unit.made_up_runs import make_run, records_of, write_metrics

CHARTS = {chart.name: chart for chart in (*LEARNING, *LENGTH, *INNER, *SPEED)}
SAMPLE = {"split": "eval", "step": 20, "row": 3, "prompt": "2+2?", "completion": "four", "before": "fish", "label": True, "dataset_completion": "4", "dataset_reward": 0.25}


class Parsed(HTMLParser):
    """The rows of all tables, all text, and the tags of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.rows, self.words, self.tags, self._in = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._in = tag
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self._in = ""

    def handle_data(self, data):
        if self._in not in ("script", "style"):
            self.words.append(data)
        if self._in in ("td", "th"):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return "\n".join(self.words)


def embedded(text: str) -> dict[str, dict]:
    """Return the charts in a page by name."""
    return {chart["name"]: chart for chart in json.loads(re.search(r'<script type="application/json" id="page-data">(.*?)</script>', text, re.DOTALL)[1])["charts"]}


def a_run(records: list[dict], name: str = "a", **more: object) -> RunFiles:
    return RunFiles(name, by_split(records), **more)


def drawn(*runs: RunFiles) -> str:
    return page(list(runs), made="today")


def report(*arguments: object) -> int:
    return cli.run(["report", *map(str, arguments)])


# numbers


def test_every_curve_has_the_numbers_of_the_record():
    records = records_of(25, splits=("eval/maths", "eval/chat"))
    charts = embedded(drawn(a_run(records)))
    assert {"loss", "z", "rewards", "margins", "auc", "logps", "grad_norm", "learning_rate", "tokens_per_second", "seconds", "memory", "length_correlation"} <= charts.keys()
    compared = 0
    for name in charts.keys() & CHARTS.keys():
        for line in CHARTS[name].lines:
            for split in ("train", "eval/maths", "eval/chat"):
                expected = [(record["step"], record[line.metric]) for record in records if record["split"] == split and line.metric in record]
                found = [curve for curve in charts[name]["curves"] if (curve["metric"], curve["split"]) == (line.metric, split)]
                if expected and not (line.error and split != "train"):
                    [curve] = found
                    assert curve["x"] == [step for step, _ in expected]
                    assert curve["y"] == pytest.approx([value for _, value in expected], rel=1e-6)
                    compared += 1
                else:
                    assert found == []
    assert compared > 25


def test_the_band_of_z_is_the_mean_before_the_clamp_and_its_error():
    records = records_of(5)
    [raw] = [curve for curve in embedded(drawn(a_run(records)))["z"]["curves"] if curve["metric"] == "kl_raw"]
    train = [record for record in records if record["split"] == "train"]
    for side, sign in (("low", -1), ("high", 1)):
        assert raw[side] == pytest.approx([record["kl_raw"] + sign * record["kl_stderr"] for record in train], rel=1e-6)


def test_final_numbers_are_the_first_the_last_and_the_extremes():
    records = records_of(30)
    rows = {row[0]: row[1:] for row in Parsed(drawn(a_run(records))).rows if len(row) == 5}
    losses = [record["loss"] for record in records if record["split"] == "eval"]  # the split that stands last
    number = lambda text: float(text.replace(",", ""))  # noqa: E731
    assert [number(cell) for cell in rows["loss"][:2]] == pytest.approx([losses[0], losses[-1]], rel=1e-3)
    for cell, pick in zip(rows["loss"][2:], (min, max)):
        value, step = cell.split(", ")
        assert float(value) == pytest.approx(pick(losses), rel=1e-3) and int(step) == 10 * (1 + losses.index(pick(losses)))
    assert rows["peak_memory_gib"][:2] == ["40.5", "40.5"]


def test_time_is_shared_out_as_it_was_spent():
    text = drawn(a_run(records_of(4)))
    assert [float(share) for share in re.findall(r"width:([\d.]+)%", text)] == pytest.approx([25, 58.33, 12.5, 4.17], abs=0.01)


# long curves


def test_a_long_curve_keeps_its_extremes_and_its_mean():
    generator = np.random.default_rng(0)
    steps, values = np.arange(1, 20_001.0), generator.standard_normal(20_000)
    values[[777, 15_001]] = 1e4, -1e4
    short = series(steps, values)
    assert len(short.steps) == len(short.values) == len(short.low) == len(short.high) == SHORT_POINTS
    assert (max(short.high), min(short.low)) == (1e4, -1e4) and short.steps == sorted(short.steps)
    assert all(low <= value <= high for low, value, high in zip(short.low, short.values, short.high))
    for place, part in enumerate(np.array_split(np.arange(20_000), SHORT_POINTS)):
        assert short.values[place] == pytest.approx(values[part].mean(), rel=1e-6) and (short.low[place], short.high[place]) == pytest.approx((values[part].min(), values[part].max()), rel=1e-6)
    assert sum(low <= 1e4 <= high for low, high in zip(short.low, short.high)) == 1, "a peak is in one place"


def test_a_curve_that_fits_is_left_as_it_is():
    values = np.linspace(0, 1, MOST_POINTS)
    short = series(np.arange(MOST_POINTS), values)
    assert len(short.values) == MOST_POINTS and short.low is None


def test_many_long_runs_make_a_page_of_less_than_three_megabytes():
    records = records_of(MOST_POINTS + 50, eval_steps=5)
    text = drawn(*(a_run(records, name=f"run {number}") for number in range(8)))
    assert len(text.encode()) < 3e6
    assert {len(curve["y"]) for curve in embedded(text)["loss"]["curves"]} == {SHORT_POINTS, (MOST_POINTS + 50) // 5}


# distributions


@pytest.mark.parametrize("num_steps", [1, 7, 130])
def test_heat_maps_hold_every_count_once(num_steps):
    records = records_of(num_steps)
    charts = embedded(drawn(a_run(records)))
    for label in ("chosen", "rejected"):
        chart = charts[f"logratios-0-{label}"]
        train = [record for record in records if record["split"] == "train"]
        total = np.sum([record[f"logratios/{label}"] for record in train], axis=0)
        assert len(chart["counts"]) == len(chart["columns"]) == min(num_steps, 40)
        first = chart["edges"].index(0.0)
        middle = LOGRATIO_EDGES.index(0.0) + 1
        shown = np.sum(chart["counts"], axis=0).tolist()
        assert shown == total[middle - first : middle - first + len(shown)].tolist() and sum(shown) == total.sum() == sum(record[f"count/{label}"] for record in train)
        assert chart["columns"][0][0] == 1 and chart["columns"][-1][1] == num_steps
        assert [last + 1 for _, last in chart["columns"][:-1]] == [first for first, _ in chart["columns"][1:]]


def test_histograms_that_count_nothing_have_no_chart():
    empty = [0] * (len(LOGRATIO_EDGES) + 1)
    records = [{**record, "logratios/chosen": empty} for record in records_of(3, splits=())]
    assert "logratios-0-chosen" not in (charts := embedded(drawn(a_run(records)))) and "logratios-0-rejected" in charts
    assert "logratios-0-rejected" not in embedded(drawn(a_run([{**record, "logratios/rejected": empty} for record in records])))
    [_, *counts] = embedded(drawn(a_run([{**record, "logratios/chosen": empty} if record["step"] == 1 else record for record in records_of(3, splits=())])))["logratios-0-chosen"]["columns"]
    assert counts == [[3, 3]], "a step that counts nothing is no column"


def naive_by_length(records: list[dict], label: str) -> dict[int, list[float]]:
    sums: dict[int, list[float]] = {}
    for record in records:
        for least, count, mean in record[f"rewards_by_length/{label}"]:
            entry = sums.setdefault(least, [0, 0.0])
            entry[0] += count
            entry[1] += count * mean
    return {least: [count, total / count] for least, (count, total) in sums.items()}


def test_rewards_by_length_are_means_over_the_last_quarter():
    records = records_of(60)
    train = [record for record in records if record["split"] == "train"]
    last = train[-(60 // LAST_SHARE) :]
    chart = embedded(drawn(a_run(records)))["by_length"]
    for curve, label in zip(chart["curves"], ("chosen", "rejected"), strict=True):
        expected = naive_by_length(last, label)
        assert [int(chart["ticks"][place].split("–")[0].rstrip("+")) for place in curve["x"]] == sorted(expected)
        assert curve["counts"] == [expected[least][0] for least in sorted(expected)]
        assert curve["y"] == pytest.approx([expected[least][1] for least in sorted(expected)], rel=1e-5)


def test_the_margin_among_similar_lengths_is_a_weighted_mean_of_margins():
    records = records_of(60)
    last = [record for record in records if record["split"] == "train"][-15:]
    found = [naive_by_length(last, label) for label in ("chosen", "rejected")]
    weighted, weights = 0.0, 0.0
    for least in found[0].keys() & found[1].keys():
        (n, one), (m, other) = found[0][least], found[1][least]
        weighted, weights = weighted + n * m / (n + m) * (one - other), weights + n * m / (n + m)
    overall = [sum(count * mean for count, mean in label.values()) / sum(count for count, _ in label.values()) for label in found]
    margin, matched = margins(by_length([record for record in records if record["split"] == "train"]))
    assert margin == pytest.approx(overall[0] - overall[1]) and matched == pytest.approx(weighted / weights)


def test_a_policy_that_only_learnt_length_has_no_margin_among_similar_lengths():
    """Rewards are minus the length; undesirable answers are longer. A policy that learnt the label keeps its margin."""
    by_size = {"rewards_by_length/chosen": [[16, 90, -0.2], [256, 10, -3.0]], "rewards_by_length/rejected": [[16, 10, -0.2], [256, 90, -3.0]]}
    margin, matched = margins(by_length([by_size]))
    assert margin == pytest.approx(0.8 * 2.8) and matched == pytest.approx(0, abs=1e-12)
    by_label = {"rewards_by_length/chosen": [[16, 90, 0.5], [256, 10, 0.5]], "rewards_by_length/rejected": [[16, 10, -0.5], [256, 90, -0.5]]}
    assert margins(by_length([by_label])) == pytest.approx((1.0, 1.0))
    assert margins(by_length([{"rewards_by_length/chosen": [[16, 5, 0.5]], "rewards_by_length/rejected": [[LENGTH_BUCKETS[-1], 5, 0.5]]}])) is None


# what is there, and what is not


def test_a_bare_metrics_file_is_enough(tmp_path, capsys):
    path = write_metrics(tmp_path / "m.jsonl", records_of(3))
    assert report(path, "--out", tmp_path / "out.html") == 0
    text = (tmp_path / "out.html").read_text()
    assert "<h1>m.jsonl</h1>" in text and "loss" in embedded(text) and 'id="config"' not in text and 'id="samples"' not in text and "no status.json" in text
    assert capsys.readouterr().out == f"report: {tmp_path / 'out.html'}\n"


@pytest.mark.parametrize("records", [
    [{"split": "train", "step": 1, "loss": 0.5}],
    [{"split": "eval", "step": 4, "rewards/auc": 0.7}],
    [{"split": "train", "step": 1, "skipped_steps": 1}],
    [{"split": "train", "step": 1, "loss": True, "kl": None, "logratios/chosen": [1, 2], "rewards_by_length/chosen": [[3, 1, 0.5], "x", [16, 1]]}],
])  # fmt: skip
def test_whatever_was_logged_makes_a_page(records):
    text = drawn(a_run(records))
    shown = {curve["metric"] for chart in embedded(text).values() for curve in chart["curves"]}
    assert shown == {name for record in records for name, value in record.items() if type(value) is float}
    assert "mfu" not in embedded(text) and "Where the time goes" not in text


def test_lines_that_are_no_records_are_passed_over(tmp_path):
    """A run that was killed, one that was resumed by hand, and values that are no numbers."""
    lines = ['{"split": "train", "step": 2, "loss": 0.4}', "[1, 2]", "nonsense", '{"split": "train", "step": 1, "loss": 0.5}', '{"split": "train", "step": 2, "loss": 0.3}',
             '{"split": "train", "step": 3, "loss": NaN}', '{"split": "train", "step": "4", "loss": 1.0}', '{"split": "train", "step": 5, "loss": 0.1']  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert report(tmp_path, "--png", tmp_path / "pictures") == 0
    [curve] = embedded((tmp_path / "report.html").read_text())["loss"]["curves"]
    assert (curve["x"], curve["y"]) == ([1, 2], [0.5, 0.3])


@pytest.mark.parametrize("state, words", [
    ({"state": "running", "step": 3, "exit_code": None, "reason": ""}, "still running"),
    ({"state": "failed", "step": 3, "exit_code": 3, "reason": "NumericsError: step 3"}, "failed, exit code 3"),
    ({"state": "preempted", "step": 3, "exit_code": 75, "reason": "Preempted: SIGTERM"}, "preempted, exit code 75"),
])  # fmt: skip
def test_the_page_says_how_the_run_stands(tmp_path, state, words):
    make_run(tmp_path / "run", [*records_of(3), {"split": "train", "step": 4, "epoch": 1.0, "skipped_steps": 2}], status=state)
    assert report(tmp_path / "run") == 0
    shown = Parsed((tmp_path / "run" / "report.html").read_text()).text
    assert words in shown and state["reason"] in shown and "2 steps left out" in shown and "step 4" in shown


def test_damaged_files_beside_the_metrics_are_left_out(tmp_path):
    run = make_run(tmp_path / "run", records_of(2), samples=[SAMPLE], data_report={"train": {"rows": 5}})
    for name, content in (("config.yaml", "a: [1"), ("status.json", "{"), ("samples.jsonl", "7\n{\n"), ("dataset/data_report.json", "[]")):
        (run / name).write_text(content)
    assert report(run) == 0
    text = (run / "report.html").read_text()
    assert "loss" in embedded(text) and all(f'id="{part}"' not in text for part in ("config", "samples", "data"))


# several runs


def test_runs_are_laid_over_each_other_and_their_configs_compared(tmp_path):
    runs = [make_run(tmp_path / name / "kto", records_of(num_steps, seed=seed), beta=beta) for name, num_steps, seed, beta in (("a", 20, 1, 0.1), ("b", 12, 2, 0.3))]
    assert report(*runs, "--out", tmp_path / "both.html") == 0
    text = (tmp_path / "both.html").read_text()
    charts = embedded(text)
    losses = [curve for curve in charts["loss"]["curves"] if curve["split"] == "train"]
    assert [(curve["run"], curve["color"], len(curve["x"])) for curve in losses] == [(0, 0, 20), (1, 1, 12)]
    assert {f"logratios-{run}-{label}" for run in (0, 1) for label in ("chosen", "rejected")} <= charts.keys()
    parsed = Parsed(text)
    assert "<h1>a/kto, b/kto</h1>" in text and "2 of 6 keys differ between the runs." in parsed.text
    head = parsed.rows.index(["key", "a/kto", "b/kto"])
    assert parsed.rows[head + 1 : head + 3] == [["output_dir", str(runs[0]), str(runs[1])], ["loss.beta", "0.1", "0.3"]]
    final = {row[0]: row[1:] for row in parsed.rows[parsed.rows.index(["metric, last value", "a/kto", "b/kto"]) :] if len(row) == 3}
    for cell, run in zip(final["grad_norm"], runs, strict=True):
        assert float(cell) == pytest.approx([json.loads(line).get("grad_norm") for line in (run / "metrics.jsonl").read_text().splitlines() if '"train"' in line][-1], rel=1e-3)


def test_one_run_is_compared_with_the_defaults(tmp_path):
    assert report(make_run(tmp_path / "run", records_of(2), beta=0.3)) == 0
    parsed = Parsed((tmp_path / "run" / "report.html").read_text())
    rows = parsed.rows[parsed.rows.index(["key", "value", "default"]) + 1 :][:6]
    assert ["loss.beta", "0.3", "0.1"] in rows and ["data.max_length", "1024", "2048"] in rows and ["model.path", "some/model", "none"] in rows


def test_names_tell_runs_apart():
    assert distinct_names([("r", "a", "x"), ("r", "b", "x"), ("r", "y")]) == ["a/x", "b/x", "y"]
    assert distinct_names([("r", "x"), ("r", "x")]) == ["x", "x (2)"]


# data and samples


def test_data_report_and_samples_are_shown(tmp_path):
    assert SAMPLE.keys() < Sample.__annotations__.keys()
    later = {**SAMPLE, "step": 40, "completion": "4 it is", "dataset_reward": 0.75}
    bare = {"split": "eval", "step": 40, "row": 9, "prompt": "and 3+3?", "completion": "six"}
    counts = {"train": {"examples": 1234, "completion_tokens": {"mean": 17.5}, "sources": [{"path": "rows.jsonl", "examples": 1234}]}}
    run = make_run(tmp_path / "run", records_of(2), samples=[{**later, "completion": "from before a resume"}, later, SAMPLE, bare], data_report=counts)
    assert report(run) == 0
    parsed = Parsed((run / "report.html").read_text())
    assert ["examples", "1,234"] in parsed.rows and ["completion tokens: mean", "17.5"] in parsed.rows and "train: rows.jsonl, 1,234 examples" in parsed.text
    words = [word for word in parsed.words if word.strip()]
    start = words.index("2+2?")
    assert words[start - 1 : start + 12] == ["prompt", "2+2?", "in the data, desirable", "4", "before training", "fish", "step 40, reward of the answer in the data 0.75", "4 it is", "1 of 1 earlier", "step 20, reward of the answer in the data 0.25", "four", "eval, row 9", "prompt"]
    assert "six" in words


def test_many_long_samples_stay_few_and_short(tmp_path):
    many = [{**SAMPLE, "step": step, "prompt": f"question {row}", "completion": "x" * 9000} for row in range(60) for step in range(1, 31)]
    run = make_run(tmp_path / "run", records_of(2), samples=many)
    assert report(run) == 0
    page_file = run / "report.html"
    assert page_file.stat().st_size < 600_000
    words = Parsed(page_file.read_text()).words
    assert words.count("6 of 29 earlier") == 24 and "36 more prompts are in samples.jsonl." in words
    steps = [int(word.split()[1].rstrip(",")) for word in words if word.startswith("step ")][:7]
    assert steps[0] == 30 and (steps[1], steps[-1]) == (1, 29) and steps[1:] == sorted(steps[1:])


# safety

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>\"'&\u2028"


def hostile_run(folder: Path) -> Path:
    """A run in which every text that a page shows is an attack."""
    records = [{**record, "split": record["split"] if record["split"] == "train" else HOSTILE, HOSTILE: 0.5} for record in records_of(12)]
    samples = [{**SAMPLE, **dict.fromkeys(("split", "prompt", "completion", "before", "dataset_completion", "row"), HOSTILE)}]
    report = {HOSTILE: {HOSTILE: HOSTILE, "sources": [{"path": HOSTILE, "examples": HOSTILE}]}}
    run = make_run(folder, records, samples=samples, data_report=report, status={"state": HOSTILE, "reason": HOSTILE, "exit_code": HOSTILE, "step": HOSTILE})
    (run / "config.yaml").write_text(json.dumps({"model": {"path": HOSTILE}, HOSTILE: HOSTILE}), encoding="utf-8")
    return run


def test_no_text_of_a_file_becomes_part_of_the_page(tmp_path):
    run = hostile_run(tmp_path / "<script>alert(2)<")
    other = hostile_run(tmp_path / "<img src=x>")
    for runs in ([run], [run, other]):
        assert report(*runs, "--out", tmp_path / "out.html") == 0
        text = (tmp_path / "out.html").read_text(encoding="utf-8")
        parsed = Parsed(text)
        assert [attributes.get("type") for tag, attributes in parsed.tags if tag == "script"] == ["application/json", None]
        assert not [tag for tag, attributes in parsed.tags if tag == "img" or any(name.startswith("on") for name in attributes)]
        assert parsed.text.count("document.title='owned'") > 8, "the texts are there, as text"
        assert not re.search("[<>&]", re.search(r'id="page-data">(.*?)</script>', text)[1]), "nothing in the data can end it"
        assert any(curve["split"] == HOSTILE for curve in embedded(text)["loss"]["curves"])


def test_the_page_allows_its_own_script_and_nothing_else():
    text = drawn(a_run(records_of(2)))
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)[1]
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none';") and re.findall(r"script-src ([^;]+);", policy) == [f"'sha256-{digest}'"]
    assert re.findall(r"(?:https?:)?//[a-z]+\.", text.replace("http://www.w3.org/2000/svg", "")) == []


def test_secrets_are_taken_out(tmp_path, monkeypatch):
    monkeypatch.setenv("SERVICE_API_KEY", "opensesame42")
    status = {"state": "failed", "step": 2, "exit_code": 1, "reason": "no luck with opensesame42"}
    run = make_run(tmp_path / "opensesame42", records_of(2), samples=[{**SAMPLE, "completion": "opensesame42"}], status=status, data_report={"train": {"path": "https://u:pw123456@host/x"}})
    (run / "config.yaml").write_text("model: {path: /opensesame42/m}\n")
    assert report(run) == 0
    text = (run / "report.html").read_text()
    assert "opensesame42" not in text and "pw123456" not in text and text.count("[redacted]") >= 5


# command line


def test_pictures_go_to_a_folder_of_their_own(tmp_path, capsys):
    runs = [make_run(tmp_path / name / "kto", records_of(12)) for name in ("a", "b")]
    old = write_metrics(tmp_path / "old" / "metrics.jsonl", [{"split": "train", "step": 1, "loss": 0.5}])
    assert report(*runs, old, "--png", tmp_path / "pictures") == 0
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [picture.name for picture in pictures] == ["a-kto-distributions.png", "a-kto.png", "b-kto-distributions.png", "b-kto.png", "old.png"]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert capsys.readouterr().out.splitlines() == [f"report: {runs[0] / 'report.html'}", f"pictures: {tmp_path / 'pictures'}"]


def test_a_run_that_has_just_begun_is_left_out_beside_others(tmp_path, capsys):
    folders = [tmp_path / name for name in ("a", "b", "c", "d")]
    folders[0].mkdir()
    for folder, records in zip(folders[1:], (records_of(3), [], records_of(3))):
        write_metrics(folder / "metrics.jsonl", records)
    assert report(*folders, "--png", tmp_path / "pictures") == 0
    notices = [f"notice: {folder} has no metrics yet, left out" for folder in (folders[0], folders[2])]
    assert capsys.readouterr().out.splitlines() == [*notices, f"report: {folders[1] / 'report.html'}", f"pictures: {tmp_path / 'pictures'}"]
    assert {path.name for path in (tmp_path / "pictures").iterdir()} >= {"b.png", "d.png"} and not list((tmp_path / "pictures").glob("[ac]*"))


@pytest.mark.parametrize("arguments, found", [
    (["nowhere"], "nowhere: there is no such folder or file\n  remedy: name the output_dir of a run, or a metrics.jsonl"),
    (["empty"], "empty: there is no whole line of metrics"),
    (["empty", "blank.jsonl"], "empty: there is no whole line of metrics"),
    (["blank.jsonl"], "blank.jsonl: there is no whole line of metrics"),
    (["run", "--out", "run/metrics.jsonl"], "--out: expected a name that ends in .html, found 'metrics.jsonl'"),
    (["run", "--out", "run/status.json/x.html"], "cannot write"),
    ([], "--config"),
    (["run", "--wandb-sync"], "--wandb-sync"),
])  # fmt: skip
def test_a_mistake_is_one_message(tmp_path, monkeypatch, capsys, arguments, found):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", records_of(2))
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.jsonl").write_text("{\n")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert report(*arguments) == 2
    error = capsys.readouterr().err
    assert found in error and "Traceback" not in error
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_other_commands_take_no_runs(tmp_path, capsys):
    assert cli.run(["train", "some/run"]) == 2
    assert "command line" in capsys.readouterr().err
