"""The pages that show rows and configs: every row is read with the rules shown, every config loads, every file is prepared, every key is explained.

A block that stands for a file has the file's name after its language; a source of that name in a YAML block of the page says how it is read.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from ruamel.yaml import YAML
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from kto_ds import cli
from kto_ds.config import RunConfig
from kto_ds.config_data import DataConfig, SourceConfig
from kto_ds.rows.records import RowRules, to_records
from kto_ds.rows.shapes import SHAPES
from kto_ds.rows.sources import read_blocks
from tests.distributed.runs import ROOT, write_config

DATA, README, QUICKSTART = ROOT / "docs" / "data.md", ROOT / "README.md", ROOT / "docs" / "quickstart.md"
LEFT_OUT = {"output_dir": "run", "model": {"path": "model"}, "data": {"train": [{"path": "rows.jsonl"}]}}  # what a block need not repeat


class Block(NamedTuple):
    language: str
    file: str  # "" for one that is no file
    text: str


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w*) ?(\S*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(found) * 2 == page.read_text(encoding="utf-8").count("```")
    return [Block(*block) for block in found]


def configs(page: Path) -> list[dict]:
    return [LEFT_OUT | YAML(typ="safe").load(block.text) for block in blocks(page) if block.language == "yaml" and not block.file]


def load(values: dict, folder: Path) -> RunConfig:
    config, _ = cli.read_config("prepare", ["--config", str(write_config(folder / "run.yaml", **values))])
    return config


def sources_of(page: Path, folder: Path) -> dict[str, SourceConfig]:
    """Every file shown on the page as the page's configs read it, written to `folder`."""
    found = {}
    for block in blocks(page):
        if block.file:
            (folder / block.file).write_text(block.text, encoding="utf-8")
            found[block.file] = SourceConfig(path=block.file)
    for values in configs(page):
        found |= {source.path: source for source in load(values, folder).data.train if source.path in found}
    return found


def rows_of(page: Path, folder: Path) -> Iterator[tuple[dict, str, RowRules]]:
    for name, source in sources_of(page, folder).items():
        rules = RowRules(source.columns, source.label_map)
        for block in read_blocks(str(folder / name), None, label_fields=rules.boolean_columns):
            for number, row in block.rows():
                yield row, f"{name}:{number}", rules


@pytest.mark.parametrize("page", [DATA, README, QUICKSTART], ids=lambda page: page.name)
def test_every_row_shown_is_read(page, tmp_path):
    records = {where: to_records(row, where, rules) for row, where, rules in rows_of(page, tmp_path)}
    assert len(records) >= (15 if page == DATA else 2)
    assert {record.desirable for found in records.values() for record in found} == {True, False}


def test_every_shape_is_shown(tmp_path):
    shown = [frozenset({"conversations": "messages"}.get(name, name) for name in row) for row, where, _ in rows_of(DATA, tmp_path) if where.startswith("rows.jsonl")]
    assert len(shown) == len(SHAPES)
    for shape, fields in zip(SHAPES, shown):
        assert shape.needs <= fields <= shape.needs | shape.may_have
        assert f"| `{'`, `'.join(shape.text.split(', '))}` |" in DATA.read_text(encoding="utf-8")


def test_two_files_say_what_the_page_says(tmp_path):
    found = {}
    for row, where, rules in rows_of(DATA, tmp_path):
        found.setdefault(where.split(":")[0], []).extend(to_records(row, where, rules))
    assert [(record.prompt, record.completion, record.desirable) for record in found["thumbs.csv"]] == [
        ("What is the capital of France?", "Paris.", True), ("Hello, who are you?", "I am a teapot.", False),
    ]  # fmt: skip
    assert [(len(record.prompt), record.desirable) for record in found["turns.jsonl"]] == [(1, True), (3, False), (3, True)]


@pytest.mark.parametrize("values", [values for page in [README, *sorted((ROOT / "docs").glob("*.md"))] for values in configs(page)])
def test_every_config_shown_loads(values, tmp_path):
    config = load(values, tmp_path)
    shown = {key for source in values["data"]["train"] for key in source}
    assert shown <= {key for source in config.data.train for key in source.model_fields_set}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token: whatever a page says, its words differ."""
    alphabet = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({byte: number for number, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.chat_template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] or message['tool_calls'] }}\n{% endfor %}"
    return fast


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A model without weights."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 512}
    LlamaConfig(vocab_size=len(tokenizer), **shape).save_pretrained(folder)
    return str(folder)


def prepare(folder: Path, model: str, sources: list[dict], **data) -> int:
    data = {"train": sources, "max_length": 512, "dataset_num_proc": 1, **data}
    config = write_config(folder / "run.yaml", output_dir=str(folder / "run"), model={"path": model, "dtype": "float32"}, data=data)
    return cli.run(["prepare", "--config", str(config)])


@pytest.fixture(scope="module")
def report(tmp_path_factory, model) -> dict:
    """What prepare reports about all files of the page together, with a held-out split."""
    folder = tmp_path_factory.mktemp("page")
    listed = [{**source.model_dump(exclude_defaults=True), "path": str(folder / name)} for name, source in sources_of(DATA, folder).items()]
    assert prepare(folder, model, listed, held_out_fraction=0.1) == 0
    return json.loads((folder / "run" / "dataset" / "data_report.json").read_text())


def test_every_file_shown_is_prepared(report):
    rows = {Path(source["path"]).name: source["rows"] for source in report["train"]["sources"]}
    assert rows == {"rows.jsonl": len(SHAPES), "turns.jsonl": 2, "tools.jsonl": 2, "thumbs.csv": 2}
    assert (report["train"]["rejected_rows"], report["train"]["dropped_examples"], report["train"]["unused_fields"]) == (0, 0, [])


def test_the_report_is_explained_key_by_key(report):
    section = DATA.read_text(encoding="utf-8").split("data_report.json` holds\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    assert [name for names, _ in rows for name in re.findall(r"`(\w+)`", names)] == [*list(report["train"])[:-2], "examples_with_training_prompts", *list(report["train"])[-2:]]
    explained = dict(rows)
    for key, inner in ((" `kl_group_examples` ", report["train"]["kl_group_examples"]), (" `sources` ", report["train"]["sources"][0])):
        told = set(re.findall(r"`(\w+)`", explained[key]))
        assert told | {"rows", "rejected_rows", "dropped_examples"} >= inner.keys() >= told
    assert report["eval/held_out"].keys() - report["train"].keys() == {"examples_with_training_prompts"}


def test_the_error_shown_is_what_prepare_says(tmp_path, model, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answers = [(" Paris.", True), (" Milan.", 1), (" Madrid.", True), (" ", False)]
    rows = [json.dumps({"prompt": f"Capital {number}:", "completion": text, "label": label}) for number, (text, label) in enumerate(answers)]
    Path("ratings.jsonl").write_text("\n".join(rows))
    assert prepare(tmp_path, model, [{"path": "ratings.jsonl"}]) == 2
    [shown] = [block.text for block in blocks(DATA) if block.language == "text"]
    assert capsys.readouterr().err.endswith(shown)


def test_every_key_of_the_data_is_named():
    text = DATA.read_text(encoding="utf-8")
    for name in (*DataConfig.model_fields, *SourceConfig.model_fields):
        assert re.search(rf"\b{name}\b", text), name
