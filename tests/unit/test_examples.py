"""The files of examples/: each loads, says why, fits the GPUs it is for by `kto-ds plan`, and `kto-ds prepare` takes rows of the columns of its data."""

import json
import re
from pathlib import Path

import pytest
from transformers import LlamaConfig

from kto_ds import cli
from kto_ds.stages.advising import advice_lines
from tests.distributed.runs import ROOT
from tests.unit.test_docs_data import byte_tokenizer
from tests.unit.test_plan import PUBLISHED

EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
QWEN3 = {"model_type": "qwen3", "vocab_size": 151_936, "head_dim": 128, "num_key_value_heads": 8, "tie_word_embeddings": True, "max_position_embeddings": 40_960}
SHAPES = {
    "Qwen/Qwen3-32B": PUBLISHED["Qwen3-32B"], "Qwen/Qwen3-30B-A3B": PUBLISHED["Qwen3-30B-A3B"],
    "Qwen/Qwen3-0.6B": {**QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "Qwen/Qwen3-4B": {**QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
}  # fmt: skip


def turns(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[place % 2], "content": content} for place, content in enumerate(contents)]


# Rows with the columns of the hub's datasets, by name and split.
ROWS = {
    "trl-lib/kto-mix-14k": lambda number: {"prompt": turns(f"{number}?"), "completion": [{"role": "assistant", "content": f"yes {number}"}], "label": number % 2 == 0},
    "trl-lib/ultrafeedback_binarized": lambda number: {"chosen": turns(f"{number}?", f"yes {number}"), "rejected": turns(f"{number}?", "no"), "score_chosen": 8.0, "score_rejected": 2.0},
}  # fmt: skip


def config_of(example: Path, *options: str):
    return cli.read_config("train", ["--config", str(example), *options])[0]


def test_there_are_as_many_as_the_page_lists():
    text = (ROOT / "examples" / "README.md").read_text()
    assert {path.name for path in EXAMPLES} == set(re.findall(r"\]\((\w+\.yaml)\)", text)) and len(EXAMPLES) == 6


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_loads_fits_and_follows_the_advice(example, tmp_path, capsys):
    config = config_of(example)
    assert advice_lines(config) == []
    lines = (ROOT / "examples" / "README.md").read_text().splitlines()
    [gpus] = [re.search(r"(\d+|one) (?:H100|GPU)", line)[1].replace("one", "1") for line in lines if f"({example.name})" in line]
    (tmp_path / "config.json").write_text(json.dumps(SHAPES[config.model.path]))
    assert cli.run(["plan", "--config", str(example), "--model.path", str(tmp_path), "--gpu", "H100", "--num_gpus", gpus, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["gpus"][0]["fits"] and not [warning for warning in plan["warnings"] if "ranks are left" in warning or "longest sequence" in warning], plan["warnings"]
    comments = [line for line in example.read_text().splitlines() if "#" in line]
    assert len(comments) >= 6


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_prepare_takes_rows_of_these_columns(example, tmp_path, monkeypatch):
    config = config_of(example)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 4096}
    LlamaConfig(vocab_size=len(tokenizer), **shape).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(ROOT)
    options = ["--model.path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "run"), "--data.dataset_num_proc", "1"]
    for key, sources in (("train", config.data.train), ("eval", config.data.eval)):
        local = []
        for source in sources:
            if source.path in ROWS:
                file = tmp_path / f"{key}.jsonl"
                file.write_text("".join(json.dumps(ROWS[source.path](number)) + "\n" for number in range(24)))
                local.append({**source.model_dump(exclude_defaults=True, exclude={"split"}), "path": str(file)})
        options += [f"--data.{key}", json.dumps(local)] if local else []
    assert cli.run(["prepare", "--config", str(example), *options]) == 0
    report = json.loads((tmp_path / "run" / "dataset" / "data_report.json").read_text())
    assert report["train"]["desirable"] and report["train"]["undesirable"] and not report["train"]["rejected_rows"] and len(report) == 2
