"""Every kind of bad input, through the command line: exit code 2 and one message that names the place, the field or key, and the remedy."""

import gzip
import io
import json
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import LlamaConfig

from kto_ds import cli
from kto_ds.data.dataset import TokenizedSplit
from tests.distributed.runs import number_tokenizer, write_config
from tests.faults.ledger import tally

VOCAB_SIZE = 40
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ message['content'] }} {% endfor %}"
)


def plain(number: int, **changes) -> dict:
    return {"prompt": f"t3 t{4 + number}", "completion": f" t7 t{8 + number}", "label": number % 2 == 0, **changes}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def chat(*messages, **fields) -> dict:
    return {"messages": [*messages], "label": True, **fields}


def pair(chosen, rejected, **fields) -> dict:
    return {"chosen": chosen, "rejected": rejected, **fields}


GOOD = [plain(number) for number in range(8)]
ASK, ANSWER, OTHER = user("t9 t8"), assistant("t5"), assistant("t6")
CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}


class Case(NamedTuple):
    name: str
    saying: list[str]
    rows: bytes | None = None  # of the training file; None for good ones
    file: str = "rows.jsonl"
    data: dict = {}
    sections: dict = {}
    source: dict = {}  # keys beside the path of the source
    others: dict = {}  # further files
    model: str = "model"


def json_lines(rows: list) -> bytes:
    return b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)


def bad_row(name: str, row: dict | bytes, *saying: str, **more) -> Case:
    """One bad row, in the third line among good ones."""
    return Case(name, ["rows.jsonl:3", *saying], json_lines([*GOOD[:2], row, *GOOD[2:]]), **more)


def bad_file(name: str, content: bytes, *saying: str, file: str = "rows.jsonl", **more) -> Case:
    return Case(name, [file, *saying], content, file, **more)


def bad_key(name: str, *saying: str, **more) -> Case:
    return Case(name, list(saying), **more)


def csv(*lines: str) -> bytes:
    return "\n".join(["prompt,completion,label", "t3 t4,t5,true", *lines, "t3 t6,t5,false", ""]).encode()


def table(**columns) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["t3 t4", "t3 t5"], "completion": ["t6", "t7"], "label": [True, False], **columns}), stream)
    return stream.getvalue()


def repeated_column() -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["prompt", "prompt"]), stream)
    return stream.getvalue()


LABELS = [
    bad_row("label 1", plain(1, label=1), "label: expected true or false, found 1", "label_map: {1: true, 0: false}"),
    bad_row("label 0", plain(1, label=0), "label: expected true or false, found 0", "label_map: {1: true, 0: false}"),
    bad_row("label 0.5", plain(1, label=0.5), "label: expected true or false, found 0.5"),
    bad_row("label yes", plain(1, label="yes"), "label: expected true or false, found 'yes'", "label_map"),
    bad_row("label as text", plain(1, label="true"), "label: expected true or false, found 'true'", "write it without quotes"),
    bad_row("label null", plain(1, label=None), "label: expected true or false, found null"),
    bad_row("label missing", {"prompt": "t3 t5", "completion": "t6"}, "label: expected true or false, the field is missing"),
    bad_row("label empty list", plain(1, label=[]), "label: expected true or false, found []"),
    bad_row("label object", plain(1, label={"a": True}), "label: expected true or false, found {'a': True}"),
    bad_row("label with control codes", plain(1, label="\x1b[2J"), "label: expected true or false, found '\\x1b[2J'"),
    bad_row("kto_tag as number", {"instruction": "t3", "output": "t4", "kto_tag": 1}, "kto_tag: expected true or false, found 1"),
    bad_row("label and kto_tag", plain(1, kto_tag=True), "label and kto_tag", "keep label or kto_tag"),
    bad_row(
        "label not in the map", plain(1, label="up"), "label: expected one of label_map's keys 'false', 'true', found 'up'", source={"label_map": {True: True, False: False}},
    ),
    bad_row("HALOs' number as the label of a pair", {"prompt": "t3", "output_A": "t4", "output_B": "t5", "label": 1}, "label: expected true or false, found 1"),
    bad_row("turn labels of another number", chat(ASK, ANSWER, label=[True, False]), "label:", "entries: 2, assistant turns: 1"),
    bad_row("no turn rated", chat(ASK, ANSWER, label=[None]), "label: no turn is rated, found [None]"),
    bad_row("turn label of a wrong kind", {"messages": [ASK, {**ANSWER, "label": "up"}]}, "messages[1].label: expected true or false, found 'up'"),
    bad_row("labels of row and turn", chat(ASK, {**ANSWER, "label": True}), "label: the row has a label and messages[1] one of its own"),
    bad_row("label of the user's turn", {"messages": [{**ASK, "label": False}, ANSWER]}, "messages[0]: only assistant turns can have a label"),
]

SHAPES = [
    bad_row("no field", {}, "fields of no known shape: found []", "prompt, completion, label"),
    bad_row("unknown fields", {"question": "t3", "answer": "t4", "label": True}, "found ['question', 'answer', 'label']", "columns"),
    bad_row("half a pair", {"prompt": "t3", "chosen": "t4"}, "found ['prompt', 'chosen']", "prompt, chosen, rejected"),
    bad_row("two shapes", plain(1, messages=[ASK, ANSWER]), "fields of more than one shape", "keep the fields of one shape"),
    bad_file(
        "columns that the rows lack", json_lines(GOOD), "rows.jsonl:1", "columns names ['question'], which the row lacks", source={"columns": {"prompt": "question"}},
    ),
    bad_row("prompt empty", plain(1, prompt=" \n"), "prompt: the prompt is empty, found ' \\n'"),
    bad_row("prompt a number", plain(1, prompt=3), "prompt: expected text or a list of messages, found 3"),
    bad_row("completion empty", plain(1, completion=""), "completion: the completion is empty, found ''"),
    bad_row("completion white space", plain(1, completion=" \n\t"), "completion: the completion is empty"),
    bad_row("completion an object", plain(1, completion={"a": 1}), "completion: expected text or a list of messages, found {'a': 1}"),
    bad_row("text and messages", plain(1, completion=[ANSWER]), "prompt and completion: expected both as text or both as messages"),
    bad_row("no prompt in messages", chat(ANSWER), "messages: the prompt is empty"),
    bad_row("no turn at all", chat(), "messages: the prompt is empty"),
    bad_row("last turn is the user's", chat(ASK, ANSWER, ASK), "messages: expected an assistant turn as the completion"),
    bad_row("messages are text", chat() | {"messages": "t3"}, "messages: expected a list of messages, found 't3'"),
    bad_row("same answers", pair("t4", "t4", prompt="t3"), "chosen and rejected are the same, found 't4'"),
    bad_row("answers that share nothing", pair("t4", "x5"), "chosen and rejected", "must start alike and then differ"),
    bad_row("pair of text and messages", pair("t4", [ANSWER], prompt="t3"), "chosen and rejected: expected both as text or both as messages"),
    bad_row(
        "prompt of another conversation", pair([ASK, ANSWER], [ASK, OTHER], prompt="t1"), "prompt: not a message that both chosen and rejected start with, found 't1'",
    ),
    bad_row("empty output_B", {"prompt": "t3", "output_A": "t4", "output_B": "", "label": True}, "output_B: the completion is empty"),
    bad_row("history of text", {"instruction": "t3", "output": "t4", "history": ["t5"], "label": True}, "history: expected a list of [question, answer], found ['t5']"),
    bad_row("system with plain text", plain(1, system="t4"), "system: only rows of messages have it, found 't4'"),
]

MESSAGES = [
    bad_row("unknown role", chat({"role": "bot", "content": "t3"}, ANSWER), "messages[0]: unknown role 'bot'", "system, developer, user"),
    bad_row("unknown speaker", {"conversations": [{"from": "bot", "value": "t3"}, ANSWER], "label": True}, "conversations[0]: unknown from 'bot'"),
    bad_row("message is text", chat("t3", ANSWER), "messages[0]: expected a message with role and content, found 't3'"),
    bad_row("content missing", chat(ASK, {"role": "assistant"}), "messages[1]: expected content to be text, found None"),
    bad_row("an image", chat(user([{"type": "image", "url": "x"}]), ANSWER), "messages[0]", "text only"),
    bad_row("tool calls of the user", chat({**ASK, "tool_calls": [CALL]}, ANSWER), "messages[0]: tool_calls in a message of role user"),
    bad_row(
        "function call that is no JSON", {"conversations": [ASK, {"from": "function_call", "value": "f()"}], "label": True}, "conversations[1]: value: not valid JSON",
    ),
    bad_row("two system messages", chat({"role": "system", "content": "t3"}, ASK, ANSWER, system="t4"), "system: the messages begin with a system message already"),
    bad_row("system message only", chat({"role": "system", "content": "t3"}, ANSWER), "messages: the prompt is nothing but a system message"),
    bad_row("tools with plain text", plain(1, tools=[{"name": "f"}]), "tools: only rows of messages have it"),
    bad_row("tools that are no list", chat(ASK, ANSWER, tools={"name": "f"}), "tools: expected a list of objects, found {'name': 'f'}"),
    bad_row("a reserved option", chat(ASK, ANSWER, chat_template_kwargs={"tokenize": True}), "chat_template_kwargs: tokenize cannot be set by a row"),
]

TEMPLATES = [
    bad_row("a role that the template refuses", chat({"role": "system", "content": "t3"}, ASK, ANSWER), "the chat template refuses the row", "System role not supported"),
    bad_row("no chat template", chat(ASK, ANSWER), "chat template", "has none", model="no_template"),
    bad_row(
        "a turn that the template leaves out", chat(ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]}), "no token of the completion is left after the prompt",
    ),
    bad_row("the text of a special token", plain(1, completion=" t5 <eos> t6"), "<eos>", data={"special_tokens_in_text": "error"}),
]

FILES = [
    bad_row("not JSON", b'{"prompt": "t3", \n', "not valid JSON", "column"),
    bad_row("a quote missing", b'{"prompt": "t3}\n', "not valid JSON"),
    bad_row("two objects in a line", b'{"prompt": "t3"} {"prompt": "t4"}\n', "not valid JSON", "after the object"),
    bad_row("no object", b'["t3", "t4"]\n', "expected an object with fields"),
    bad_row("not UTF-8", b'{"prompt": "\xff"}\n', "not valid UTF-8: byte 0xff", "save the file as UTF-8"),
    bad_row("a field twice", b'{"prompt": "t3", "prompt": "t4"}\n', "field 'prompt' occurs twice"),
    bad_row("NaN", b'{"prompt": "t3", "completion": "t4", "label": NaN}\n', "NaN is not a JSON number"),
    bad_row("Infinity", b'{"prompt": "t3", "completion": "t4", "label": true, "score": -Infinity}\n', "-Infinity is not a JSON number"),
    bad_row("half of a surrogate pair", b'{"prompt": "\\ud800", "completion": "t4", "label": true}\n', "not valid JSON", "surrogate"),
    bad_row("nested beyond all depth", b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "not valid JSON"),
    bad_row("nested too deeply", b'{"messages": [{"role": "user", "content": "t3", "x": ' + b"[" * 800 + b"]" * 800 + b'}], "label": true}\n', "nested too deeply"),
    bad_row("a number of 5,000 digits", b'{"prompt": ' + b"9" * 5000 + b"}\n", "not valid JSON"),
    bad_file("an array that ends too soon", b'[{"prompt": "t3", "completion": "t4", "label": true},\n', "rows.jsonl:", "not valid JSON"),
    bad_file("an array without a comma", b'[{"prompt": "t3"}\n{"prompt": "t4"}]', "rows.jsonl:1", "expected , or ]"),
    bad_row("a row over 64 MiB", b'{"prompt": "t3", "completion": "' + b"t" * (64 * 2**20) + b'"}\n', "64 MiB"),
    bad_file("an empty file", b"", "no rows"),
    bad_file("blank lines only", b"\n \n\n", "no rows"),
    bad_file("UTF-16", "".join(map(chr, range(65, 90))).encode("utf-16"), "UTF-16", "UTF-8"),
    bad_file("a gzip file cut short", gzip.compress(json_lines(GOOD * 50))[:-20], "cannot be read", file="rows.jsonl.gz"),
    bad_file("no gzip file", json_lines(GOOD), "cannot be read", file="rows.jsonl.gz"),
    bad_file("no zstd file", json_lines(GOOD), "cannot be read", file="rows.jsonl.zst"),
    bad_file("CSV with a cell too few", csv("t3 t5,t6"), "rows.csv:row 2", "expected 3 cells", file="rows.csv"),
    bad_file("CSV with a cell too many", csv("t3 t5,t6,false,x"), "rows.csv:row 2", "expected 3 cells", file="rows.csv"),
    bad_file(
        "CSV with a label that is a number", csv("t3 t5,t6,0"), "rows.csv:row 2", "label: expected true or false, found '0'", "label_map: {1: true, 0: false}", file="rows.csv",
    ),
    bad_file("CSV without a completion", csv("t3 t5,,false"), "rows.csv:row 2", "completion: expected a value", file="rows.csv"),
    bad_file("CSV with a column twice", b"prompt,prompt\na,b\n", "column name", "twice", file="rows.csv"),
    bad_file("CSV with semicolons", b"prompt;completion;label\nt3;t4;true\n", "separated by ';'", file="rows.csv"),
    bad_file("Parquet with a null prompt", table(prompt=pa.array(["t3", None])), "rows.parquet:row 2", "prompt: expected a value, found null", file="rows.parquet"),
    bad_file("Parquet with numbers as labels", table(label=[1, 0]), "rows.parquet:row 1", "label: expected true or false, found 1", file="rows.parquet"),
    bad_file("Parquet with a column twice", repeated_column(), "twice", file="rows.parquet"),
    bad_file("no Parquet file", b"PAR1 and then nothing", "cannot be read", file="rows.parquet"),
    bad_file("an unknown kind of file", b"t3\n", "unknown kind of file", file="rows.txt"),
    bad_file("a split of a file", json_lines(GOOD), "a file has no splits", "remove split", source={"split": "train"}),
]

ONE_LABEL = json_lines([plain(number, label=True) for number in range(8)])
ONE_PROMPT = json_lines([plain(number, prompt="t3") for number in range(8)])
LONG_PROMPTS = json_lines([plain(number, prompt=f"t{number} " * 30) for number in range(8)])
CONFIG = [
    bad_key("a file that is not there", "none.jsonl", "no such file", data={"train": [{"path": "none.jsonl"}]}),
    bad_key("a pattern that nothing fits", "none-*.jsonl", "no file fits", data={"train": [{"path": "./none-*.jsonl"}]}),
    bad_key("no training source", "data.train", data={"train": []}),
    bad_key("no data section entry", "data.trian", "did you mean data.train", data={"trian": []}),
    bad_key("keep_end without a prompt length", "data.truncation_mode", "max_prompt_length", data={"truncation_mode": "keep_end"}),
    bad_key("a prompt length above the length", "data.max_prompt_length", "max_length", data={"max_prompt_length": 16}),
    bad_key("an unknown truncation mode", "data.truncation_mode", "keep_start", data={"truncation_mode": "keep_middle"}),
    bad_key("skip without a limit", "data.on_bad_row", "max_bad_fraction", data={"on_bad_row": "skip"}),
    bad_key("a limit without skip", "max_bad_fraction", "on_bad_row", data={"max_bad_fraction": 0.1}),
    bad_key("a fraction above 1", "data.max_bad_fraction", data={"on_bad_row": "skip", "max_bad_fraction": 1.5}),
    bad_key("an unknown field in columns", "columns", "'promt'", "prompt", source={"columns": {"promt": "q"}}),
    bad_key("one column for two fields", "columns", "'q'", source={"columns": {"prompt": "q", "completion": "q"}}),
    bad_key("a label map to numbers", "label_map", "true", source={"label_map": {"good": 1, "bad": 0}}),
    bad_key("two names of one field", "columns", "kto_tag and label are two names of one field", source={"columns": {"label": "thumb", "kto_tag": "vote"}}),
    bad_key("an empty label map", "label_map", source={"label_map": {}}),
    bad_key("held out 0", "data.held_out_fraction", data={"held_out_fraction": 0}),
    bad_key("held out 1", "data.held_out_fraction", data={"held_out_fraction": 1}),
    bad_key("an evaluation split with a slash", "data.eval", "'a/b'", data={"eval": {"a/b": [{"path": "rows.jsonl"}]}}),
    bad_key("an evaluation split called held_out", "data.eval", "held_out", data={"eval": {"held_out": [{"path": "rows.jsonl"}]}}),
    bad_key("a weight on evaluation rows", "data.eval", "weight", data={"eval": [{"path": "rows.jsonl", "weight": 2}]}),
    bad_key("weight 0", "weight", source={"weight": 0}),
    bad_key("a negative weight", "weight", source={"weight": -1}),
    bad_key("a reserved option of the template", "data.chat_template_kwargs", "tokenize", data={"chat_template_kwargs": {"tokenize": True}}),
    bad_key("a length of true", "data.max_length", data={"max_length": True}),
    bad_key("one label only", "data.train", "8 examples are desirable", "allow_one_label", rows=ONE_LABEL),
    bad_key("one prompt only", "data.train", "at least two distinct prompts", "found 1", rows=ONE_PROMPT),
    bad_key("no prompt fits", "data.train", "data.max_length", rows=LONG_PROMPTS),
    bad_file(
        "no row but rejected ones", json_lines([plain(0, label=3), plain(1, label=4)]), ":1", "label", "1 further row of 2 cannot be used",
        data={"on_bad_row": "skip", "max_bad_fraction": 1.0, "held_out_fraction": 0.5},
    ),
    bad_row("more bad rows than are allowed", plain(1, label=3), "label", "max_bad_fraction", data={"on_bad_row": "skip", "max_bad_fraction": 0.1}),
    bad_key("too few prompts to hold some out", "data.held_out_fraction", rows=json_lines(GOOD[:2]), data={"held_out_fraction": 0.5}),
    bad_row("a completion that does not fit", plain(1, completion=" t5" * 30), "completion", data={"truncation_mode": "error"}),
    bad_key("bad evaluation rows", "other.jsonl:1", "label", data={"eval": [{"path": "other.jsonl"}]}, others={"other.jsonl": json_lines([plain(1, label=3)])}),
    bad_key("a model that is not there", "model.path", sections={"model": {"path": "./no_such_model"}}),
    bad_key("more ids than the model has", "model.path", "12 embeddings", model="small"),
]  # fmt: skip
CASES = [*LABELS, *SHAPES, *MESSAGES, *TEMPLATES, *FILES, *CONFIG]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Models without weights: preparing data must not need them."""
    folder = tmp_path_factory.mktemp("models")
    for name, vocab_size, template in (("model", VOCAB_SIZE, TEMPLATE), ("no_template", VOCAB_SIZE, None), ("small", 12, TEMPLATE)):
        shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
        LlamaConfig(vocab_size=vocab_size, **shape, bos_token_id=1, eos_token_id=2, pad_token_id=0).save_pretrained(folder / name)
        tokenizer = number_tokenizer(VOCAB_SIZE)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder / name)
    assert not list(folder.rglob("*.safetensors")) + list(folder.rglob("*.bin"))
    return folder


def prepare(case: Case, folder: Path, models: Path) -> int:
    for name, content in {case.file: json_lines(GOOD) if case.rows is None else case.rows, **case.others}.items():
        (folder / name).write_bytes(content)
    sections = {
        "output_dir": "run",
        "model": {"path": str(models / case.model), "dtype": "float32"},
        "data": {"train": [{"path": case.file, **case.source}], "max_length": 16, "dataset_num_proc": 1, **case.data},
        "batch": {"global_batch_size": 8, "max_tokens_per_microbatch": 64},
    }
    write_config(folder / "run.yaml", **sections | case.sections)
    return cli.run(["prepare", "--config", "run.yaml"])


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_bad_input_is_refused_with_one_message(case, tmp_path, models, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with tally("R19", "`prepare` with a bad row, file or key: exit code 2, one message with its place and a remedy") as counts:
        counts.injected += 1
        exit_code = prepare(case, tmp_path, models)
        printed = capsys.readouterr()
        assert exit_code == 2, printed.err
        assert printed.err.count("kto-ds: error:") == 1 and "Traceback" not in printed.out + printed.err
        message = printed.err[printed.err.index("kto-ds: error:") :]
        for text in case.saying:
            assert text in message, message
        assert message.count("  remedy: ") == 1, message
        assert "\x1b" not in message and len(message) < 2000
        assert not (tmp_path / "run" / "dataset").exists()
        counts.survived += 1


def test_there_are_enough_of_them():
    assert len(CASES) >= 75 and len({case.name for case in CASES}) == len(CASES)


def label_csv(name: str, labels: list[str]) -> bytes:
    rows = "".join(f"t3 t{number}, t{number},{labels[number % 2]}\n" for number in range(4, 8))
    return f"prompt,completion,{name}\n{rows}".encode()


def picture_table() -> bytes:
    """Pictures as the hub has them, in a column that no rule reads: one is the path of a file that is there, one is no picture."""
    pictures = [{"bytes": None, "path": "run.yaml"}, {"bytes": b"none", "path": None}] * 4
    features = datasets.Features(prompt=datasets.Value("string"), completion=datasets.Value("string"), label=datasets.Value("bool"), picture=datasets.Image())
    rows = pa.Table.from_pylist([row | {"picture": picture} for row, picture in zip(GOOD, pictures)], schema=features.arrow_schema)
    sink = io.BytesIO()
    pq.write_table(rows, sink)
    return sink.getvalue()


GOOD_FILES = [
    Case("labels of a spreadsheet", [], label_csv("label", ["TRUE", "FALSE"]), "rows.csv"),
    Case("kto_tag", [], label_csv("kto_tag", ["true", "False"]), "rows.csv"),
    Case("a mapped column", [], label_csv("good", ["true", "false"]), "rows.csv", source={"columns": {"label": "good"}}),
    Case("a column mapped to kto_tag", [], label_csv("good", ["True", "FALSE"]), "rows.csv", source={"columns": {"kto_tag": "good"}}),
    Case("true and false in a map", [], label_csv("label", ["true", "false"]), "rows.csv", source={"label_map": {True: True, False: False}}),
    Case("texts in a map", [], label_csv("label", ["True", "FALSE"]), "rows.csv", source={"label_map": {"True": True, "FALSE": False, "true": False}}),
    Case("texts in a map for a column", [], label_csv("up", ["TRUE", "no"]), "rows.csv", source={"columns": {"kto_tag": "up"}, "label_map": {"TRUE": True, "no": False}}),
    Case("pictures that nothing reads", [], picture_table(), "rows.parquet"),
]


@pytest.mark.parametrize("case", GOOD_FILES, ids=[case.name for case in GOOD_FILES])
def test_files_that_look_odd_and_are_not_are_prepared(case, tmp_path, models, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert prepare(case, tmp_path, models) == 0
    desirable = TokenizedSplit.load(tmp_path / "run" / "dataset" / "train").desirable
    assert desirable.tolist() == [True, False] * (len(desirable) // 2) and len(desirable) >= 4


def test_without_a_mistake_the_same_files_are_prepared(tmp_path, models, monkeypatch):
    """Or the cases above would be refused for another reason."""
    monkeypatch.chdir(tmp_path)
    good = [chat(user(f"t3 t{number}"), ANSWER, label=number % 2 == 0) for number in range(4, 8)]
    assert prepare(Case("good", [], json_lines([*GOOD, *good])), tmp_path, models) == 0
    assert (tmp_path / "run" / "dataset" / "manifest.json").exists()
