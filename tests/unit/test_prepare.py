"""prepare as a whole: what lies in the artefact, and that neither workers nor kills change it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from transformers import LlamaConfig

from kto_ds import cli
from kto_ds.artifacts import file_digest
from kto_ds.data.dataset import TokenizedSplit
from tests.distributed.runs import ROOT, conversation, environment, number_tokenizer, write_config, write_rows

VOCAB_SIZE = 60
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tokenizer and a configuration; prepare needs no weights."""
    folder = tmp_path_factory.mktemp("model")
    number_tokenizer(VOCAB_SIZE).save_pretrained(folder)
    LlamaConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=512).save_pretrained(folder)
    return folder


def random_rows(size: int, seed: int = 0, num_prompts: int | None = None) -> list[dict]:
    rng = np.random.default_rng(seed)
    prompts = [[3, *rng.integers(4, VOCAB_SIZE, 6).tolist()] for _ in range(num_prompts or size)]
    return [
        conversation(prompts[number % len(prompts)], rng.integers(4, VOCAB_SIZE, rng.integers(1, 9)).tolist(), bool(rng.random() < 0.5)) for number in range(size)
    ]


def config_of(folder: Path, model: Path, *, name: str = "run", **data) -> Path:
    return write_config(folder / f"{name}.yaml", output_dir=str(folder / name), model={"path": str(model)}, data={"max_length": 64, **data}, batch={"global_batch_size": 8})


def prepare(config: Path) -> Path:
    assert cli.run(["prepare", "--config", str(config)]) == 0
    return config.with_suffix("") / "dataset"


def report_of(dataset: Path) -> dict:
    return json.loads((dataset / "data_report.json").read_text())


def digests(dataset: Path) -> dict[str, str]:
    return {path.relative_to(dataset).as_posix(): file_digest(path) for path in sorted(dataset.rglob("*")) if path.is_file() and path.name != ".lock"}


def prompts_of(dataset: Path, name: str) -> list[tuple[int, ...]]:
    split = TokenizedSplit.load(dataset / name)
    return [tuple(split.prompt(prompt).tolist()) for prompt in split.prompt_of]


def test_the_same_bytes_for_any_number_of_workers(tmp_path, model):
    rows = write_rows(tmp_path / "rows.jsonl", random_rows(6500, num_prompts=4000))
    data = {"train": [{"path": str(rows)}], "held_out_fraction": 0.1}
    one, three = (prepare(config_of(tmp_path, model, name=f"with{number}", dataset_num_proc=number, **data)) for number in (1, 3))
    found = digests(one)
    assert found == {**digests(three), "manifest.json": found["manifest.json"]} and len(found) > 25
    manifests = [json.loads((dataset / "manifest.json").read_text()) for dataset in (one, three)]
    assert manifests[0]["identity"] == manifests[1]["identity"]


def test_a_killed_prepare_goes_on_where_it_was(tmp_path, model):
    rows = write_rows(tmp_path / "rows.jsonl", random_rows(16_000))
    whole = prepare(config_of(tmp_path, model, name="whole", train=[{"path": str(rows)}], dataset_num_proc=1))
    config = config_of(tmp_path, model, name="killed", train=[{"path": str(rows)}], dataset_num_proc=2)
    segments = tmp_path / "killed" / "dataset.incomplete" / "segments" / "train"
    kill_when(["prepare", "--config", str(config)], lambda: len(list(segments.glob("*.npz"))) >= 4)
    left = {path.name: path.stat().st_mtime_ns for path in segments.glob("*.npz")}
    assert 4 <= len(left) < 16
    damaged = segments / sorted(left)[0]
    damaged.write_bytes(damaged.read_bytes()[:-100])

    # Renaming keeps the times of the segments that are made now from being mixed up with those that were there.
    seen = watch_while_preparing(config, segments)
    assert {name: seen[name] for name in left if name != damaged.name} == {name: left[name] for name in left if name != damaged.name}
    assert seen[damaged.name] != left[damaged.name]
    found, expected = digests(tmp_path / "killed" / "dataset"), digests(whole)
    assert found == {**expected, "manifest.json": found["manifest.json"]}


def kill_when(arguments: list[str], condition) -> None:
    """Start kto-ds, kill its main process with -9 once the condition holds, and see that no worker outlives it."""
    with subprocess.Popen([sys.executable, "-m", "kto_ds", *arguments], env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not condition():
            assert process.poll() is None and time.monotonic() < deadline, "it ended, or did not come so far"
            time.sleep(0.01)
        workers = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
    assert len(workers) >= 2
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive


def watch_while_preparing(config: Path, segments: Path) -> dict[str, int]:
    """Run prepare to its end and return when each segment was written, seen just before they were removed."""
    seen: dict[str, int] = {}
    with subprocess.Popen([sys.executable, "-m", "kto_ds", "prepare", "--config", str(config)], env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            for path in segments.glob("*.npz"):
                try:
                    seen[path.name] = path.stat().st_mtime_ns
                except FileNotFoundError:
                    pass
            time.sleep(0.02)
    assert process.returncode == 0
    return seen


def test_bad_rows_are_skipped_up_to_the_cap_and_written_down(tmp_path, model, capsys):
    rows = [json.dumps(row) for row in random_rows(40)]
    rows[4], rows[30] = '{"prompt": "t4", "completion": "t5", "label": 1}', "not json \x1b[31m"
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows))
    data = {"train": [{"path": str(path)}], "on_bad_row": "skip"}
    dataset = prepare(config_of(tmp_path, model, max_bad_fraction=0.05, **data))
    report = report_of(dataset)["train"]
    assert (report["rows"], report["rejected_rows"], report["examples"]) == (40, 2, 38)
    rejected = [json.loads(line) for line in (dataset / "rejected_rows.jsonl").read_text().splitlines()]
    assert [row["where"] for row in rejected] == [f"{path}:5", f"{path}:31"]
    assert "label" in rejected[0]["reason"] and rejected[0]["row"] == rows[4] and rejected[1]["row"] == rows[30]
    assert "rejected rows: 2 (" in capsys.readouterr().out

    assert cli.run(["prepare", "--config", str(config_of(tmp_path, model, name="strict", max_bad_fraction=0.04, **data))]) == 2
    message = capsys.readouterr().err
    assert f"{path}:5: label" in message and f"{path}:31" in message and "2 of 40" in message and "data.max_bad_fraction" in message
    assert "\x1b" not in message


def test_named_evaluation_splits_and_held_out_prompts(tmp_path, model, capsys):
    train = write_rows(tmp_path / "train.jsonl", random_rows(300, num_prompts=100))
    first, second = (write_rows(tmp_path / f"{name}.jsonl", random_rows(12, seed)) for name, seed in (("first", 5), ("second", 6)))
    leaking = write_rows(tmp_path / "leaking.jsonl", random_rows(300, num_prompts=100)[:10])
    evals = {"first": [{"path": str(first)}], "both": [{"path": str(first)}, {"path": str(second)}], "leaking": [{"path": str(leaking)}]}
    dataset = prepare(config_of(tmp_path, model, train=[{"path": str(train)}], eval=evals, held_out_fraction=0.2))
    report = report_of(dataset)
    assert {name: counts["examples"] for name, counts in report.items()} == {
        "train": 240, "eval/first": 12, "eval/both": 24, "eval/leaking": 10, "eval/held_out": 60
    }  # fmt: skip
    held_out, trained = set(prompts_of(dataset, "eval/held_out")), set(prompts_of(dataset, "train"))
    assert len(held_out) == 20 and len(trained) == 80 and not held_out & trained
    leaked = sum(prompt in trained for prompt in prompts_of(dataset, "eval/leaking"))
    assert report["eval/leaking"]["examples_with_training_prompts"] == leaked > 0
    assert f"warning: examples whose prompt is trained on too: {leaked}" in capsys.readouterr().out
    assert [source["path"] for source in report["eval/both"]["sources"]] == [str(first), str(second)]


def test_sources_with_weights_columns_and_labels_of_their_own(tmp_path, model):
    (tmp_path / "parts").mkdir()
    for number in range(3):
        write_rows(tmp_path / "parts" / f"{number}.jsonl", random_rows(10, seed=number))
    table = tmp_path / "thumbs.csv"
    table.write_text("question,answer,thumb\n" + "".join(f"t{number + 4} t5, t6 t7,{'up' if number % 2 else 'down'}\n" for number in range(20)))
    sources = [
        {"path": str(tmp_path / "parts" / "*.jsonl"), "weight": 2},
        {"path": str(table), "columns": {"prompt": "question", "completion": "answer", "label": "thumb"}, "label_map": {"up": True, "down": False}, "weight": 0.5},
    ]
    dataset = prepare(config_of(tmp_path, model, train=sources))
    by_source = report_of(dataset)["train"]["sources"]
    assert [(source["rows"], source["usable_examples"], source["examples"]) for source in by_source] == [(30, 30, 60), (20, 20, 10)]
    split = TokenizedSplit.load(dataset / "train")
    names = [split.row_name(example) for example in range(split.num_examples)]
    assert names[10] == f"{tmp_path}/parts/1.jsonl:1" and names.count(names[10]) == 2
    thumbs = [example for example, name in enumerate(names) if name.startswith(f"{table}:row ")]
    assert len(thumbs) == 10
    for example in thumbs:
        number = int(names[example].rpartition(" ")[2]) - 1
        assert split.prompt(split.prompt_of[example]).tolist() == [number + 4, 5] and split.completion(example).tolist() == [6, 7, 2]
        assert split.desirable[example] == (number % 2 == 1)


@pytest.mark.parametrize(
    ("mode", "more", "expected"),
    [
        ("keep_start", {}, (2, 1)),  # the row that fits, and the one whose completion is cut; the long prompt is dropped
        ("keep_start", {"max_prompt_length": 6}, (3, 1)),
        ("keep_end", {"max_prompt_length": 6}, (3, 1)),
        ("drop", {}, (1, 0)),
        ("drop", {"max_completion_length": 2, "allow_one_label": True}, (0, 0)),
    ],
)
def test_truncation(tmp_path, model, mode, more, expected):
    rows = [conversation([4, 5], [7, 8, 9], True), conversation(list(range(10, 40)), [7, 8], True), conversation([5, 6], [9] * 30, True)]
    others = [conversation([20, number], [30], False) for number in range(20, 26)]
    path = write_rows(tmp_path / "rows.jsonl", rows + others)
    dataset = prepare(config_of(tmp_path, model, train=[{"path": str(path)}], truncation_mode=mode, **{"max_length": 12, **more}))
    report = report_of(dataset)["train"]
    assert (report["desirable"], report["truncated_completions"]) == expected and report["undesirable"] == 6
    assert report["dropped_examples"] == 3 - expected[0]
    dropped = [json.loads(line)["where"] for line in (dataset / "rejected_rows.jsonl").read_text().splitlines()]
    assert len(dropped) == 3 - expected[0] and all(where.startswith(f"{path}:") for where in dropped)
    if more.get("max_prompt_length"):
        kept = list(range(34, 40)) if mode == "keep_end" else list(range(10, 16))
        if mode != "drop":
            assert tuple(kept) in prompts_of(dataset, "train")


def test_a_pair_is_refused_as_a_whole(tmp_path, model):
    pairs = [{"prompt": f"t{number}", "chosen": " t20", "rejected": " t21" * (80 if number == 6 else 1)} for number in range(4, 10)]
    path = write_rows(tmp_path / "rows.jsonl", pairs)
    dataset = prepare(config_of(tmp_path, model, train=[{"path": str(path)}], truncation_mode="error", on_bad_row="skip", max_bad_fraction=0.5))
    report, split = report_of(dataset)["train"], TokenizedSplit.load(dataset / "train")
    assert (report["rejected_rows"], report["examples"], report["desirable"]) == (1, 10, 5)
    assert f"{path}:3" not in [split.row_name(example) for example in range(split.num_examples)]


def test_a_glob_leaves_out_what_the_run_writes(tmp_path, model):
    write_rows(tmp_path / "rows.jsonl", random_rows(8))
    config = config_of(tmp_path, model, train=[{"path": f"{tmp_path}/**/*.jsonl"}])
    before = report_of(prepare(config))
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    assert report_of(prepare(config)) == before and before["train"]["rows"] == 8


def test_a_row_too_long_is_an_error_when_asked_for(tmp_path, model, capsys):
    path = write_rows(tmp_path / "rows.jsonl", [*random_rows(8), conversation([4, 5], [9] * 80, True)])
    config = config_of(tmp_path, model, train=[{"path": str(path)}], truncation_mode="error")
    assert cli.run(["prepare", "--config", str(config)]) == 2
    assert f"{path}:9: prompt and completion have 82 tokens, data.max_length is 64" in capsys.readouterr().err


def test_per_turn_thumbs_share_the_prompt_before_them(tmp_path, model):
    turns = [("user", "t4", None), ("assistant", "t5", True), ("user", "t6", None), ("assistant", "t7", None), ("user", "t8", None), ("assistant", "t9", False)]
    rated = [{"role": role, "content": text, **({} if label is None else {"label": label})} for role, text, label in turns]
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": rated}, *random_rows(6)])
    split = TokenizedSplit.load(prepare(config_of(tmp_path, model, train=[{"path": str(path)}])) / "train")
    found = [(split.prompt(split.prompt_of[e]).tolist(), split.completion(e).tolist(), bool(split.desirable[e]), split.row_name(e)) for e in (0, 1)]
    assert found == [([4], [5], True, f"{path}:1"), ([4, 5, 6, 7, 8], [9], False, f"{path}:1")]


def test_repeats_and_contradictions_are_told(tmp_path, model, capsys):
    rows = [conversation([4, 5], [7], True), conversation([4, 5], [7], True), conversation([4, 5], [7], False), conversation([8, 9], [7], False)]
    path = write_rows(tmp_path / "rows.jsonl", [{**row, "id": "x"} for row in rows])
    report = report_of(prepare(config_of(tmp_path, model, train=[{"path": str(path)}], kl_group_size=2)))["train"]
    assert (report["duplicates"], report["contradictions"], report["unused_fields"]) == (1, 3, ["id"])
    out = capsys.readouterr().out
    assert "warning: repeated examples: 1 (" in out and "occur with both labels: 3" in out and "unused: fields id" in out


@pytest.mark.skipif(not (SHARED / "golden" / "kto.json").exists(), reason="the shared files are not here")
def test_real_rows_with_a_config_of_a_few_lines_have_the_ids_of_trl(tmp_path):
    golden = json.loads((SHARED / "golden" / "kto.json").read_text())
    (tmp_path / "model").mkdir()
    for path in [*(SHARED / "golden" / "tokenizer").iterdir(), SHARED / "golden" / "model" / "config.json"]:
        shutil.copy(path, tmp_path / "model")
    for name in ("kto_en_demo", "dpo_en_demo"):  # labelled conversations, and ShareGPT pairs
        (tmp_path / f"{name}.yaml").write_text(f"""\
output_dir: {tmp_path / name}
model: {{path: {tmp_path / "model"}}}
data:
  train: [{{path: {SHARED / "data" / name}.json}}]
  max_length: {golden["max_length"]}
  shuffle: false
""")
    split = TokenizedSplit.load(prepare(tmp_path / "kto_en_demo.yaml") / "train")
    for example, expected in enumerate(golden["examples"]):
        assert split.prompt(split.prompt_of[example]).tolist() == expected["prompt_ids"]
        assert split.completion(example).tolist() == expected["completion_ids"][: golden["max_length"] - len(expected["prompt_ids"])]
        assert split.desirable[example] == expected["label"]

    dataset = prepare(tmp_path / "dpo_en_demo.yaml")
    report, pairs = report_of(dataset)["train"], TokenizedSplit.load(dataset / "train")
    rows = json.loads((SHARED / "data" / "dpo_en_demo.json").read_text())
    assert report["rows"] == len(rows) and report["examples"] + report["dropped_examples"] == 2 * len(rows) and report["desirable"] == report["undesirable"]
    assert (pairs.prompt_of[::2] == pairs.prompt_of[1::2]).all() and pairs.desirable[::2].all() and not pairs.desirable[1::2].any()


@pytest.mark.parametrize(
    ("num_desirable", "loss", "expected"),
    [
        (20, {}, ""),
        (30, {}, "count 3 times as much as undesirable ones"),
        (30, {}, "desirable_weight 1 and undesirable_weight 2.25 would balance them, and so would auto"),
        (30, {"undesirable_weight": "auto"}, ""),
        (30, {"undesirable_weight": 2.5}, ""),
        (10, {"desirable_weight": 2}, "count 0.667 times as much as undesirable ones"),
    ],
)
def test_labels_out_of_balance_are_told_unless_the_loss_balances_them(tmp_path, model, capsys, num_desirable, loss, expected):
    rows = [{**row, "label": number < num_desirable} for number, row in enumerate(random_rows(40))]
    config = config_of(tmp_path, model, train=[{"path": str(write_rows(tmp_path / "rows.jsonl", rows))}])
    assert cli.run(["prepare", "--config", str(config), *(part for name, value in loss.items() for part in (f"--loss.{name}", str(value)))]) == 0
    out = capsys.readouterr().out
    assert expected in out and ("Eq. 8" in out) is bool(expected)
