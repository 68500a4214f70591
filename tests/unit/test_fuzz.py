"""Rows and configs that nobody would write, searched by hypothesis: they end in data or in one message, and no label is accepted that nobody gave.

The oracles are naive on purpose. A few hundred cases run always, 10,000 in the slow tests; the search is seeded, so that a run is like the next.
"""

import contextlib
import copy
import csv
import gzip
import io
import json
import math
import pickle
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from kto_ds import cli
from kto_ds.config import FIELDS
from kto_ds.data import blocks, json_rows
from kto_ds.data.ingest import check_block, tokenize_block
from kto_ds.data.records import RowRules
from kto_ds.data.segments import Limits, Segment, load_arrays, load_notes
from kto_ds.data.sources import read_blocks
from kto_ds.data.tokenization import RowTokenizer
from kto_ds.errors import UserError

CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # a message may have several lines
SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CSV_LABELS = {"true": True, "True": True, "false": False, "False": False}
GENEROUS = Limits(max_length=10**9)


def searched(max_examples: int):
    return settings(max_examples=max_examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


# rows of every shape, and what may happen to them

TEXTS = st.one_of(
    st.sampled_from(["ask", "more of it", " good", "bad", "é 漢 🙂", "true", "1", "a\x00b", "\x1b[2J", "\u2028", "a\r\nb", 'say "x", {y}', "tail\\", "<|im_end|>", "<|end|>"]),
    st.text(min_size=1, max_size=8),
)
LABELS = st.booleans()
SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}


def said(role: str, **more):
    """Return a strategy of messages of one role, in either spelling."""
    openai = st.fixed_dictionaries({"role": st.just(role), "content": TEXTS}, optional=more)
    return openai | st.fixed_dictionaries({"from": st.just(SPEAKERS[role]), "value": TEXTS}, optional=more)


def in_turn(*turns):
    return st.tuples(*turns).map(list)


CALL = st.fixed_dictionaries({"name": TEXTS, "arguments": st.dictionaries(TEXTS, TEXTS, max_size=1)})
CALLS = st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": CALL}), max_size=2)
ANSWER = said("assistant", tool_calls=CALLS, weight=st.just(1))
ASK = in_turn(said("user")) | in_turn(said("system"), said("user", name=TEXTS)) | in_turn(said("user"), ANSWER, said("user"))
TALK = st.tuples(ASK, ANSWER).map(lambda parts: [*parts[0], parts[1]])
RATED = st.tuples(ASK, said("assistant", label=LABELS), ASK, said("assistant", label=LABELS)).map(lambda parts: [*parts[0], parts[1], *parts[2], parts[3]])
HISTORY = st.lists(st.lists(TEXTS, min_size=2, max_size=2), max_size=2)
TOOLS = st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": CALL}), max_size=1)
OPTIONS = {
    "system": TEXTS, "tools": TOOLS | TOOLS.map(json.dumps), "chat_template_kwargs": st.dictionaries(st.sampled_from(["think", "record", "self", "messages"]), LABELS, max_size=1),
}  # fmt: skip


def rows_of(options=None, **fields):
    return st.fixed_dictionaries(fields, optional={**(options or {}), "id": TEXTS})


LABELLED = st.one_of(
    rows_of(prompt=TEXTS, completion=TEXTS, label=LABELS),
    rows_of(prompt=TEXTS, completion=TEXTS, kto_tag=LABELS),
    rows_of(prompt=ASK, completion=in_turn(ANSWER), label=LABELS, options=OPTIONS),
    rows_of(messages=TALK, label=LABELS, options=OPTIONS),
    rows_of(conversations=TALK, kto_tag=LABELS, options=OPTIONS),
    rows_of(messages=RATED),
    rows_of(messages=TALK, label=st.lists(LABELS, min_size=1, max_size=2)),
    rows_of(instruction=TEXTS, output=TEXTS, label=LABELS, options={**OPTIONS, "input": TEXTS, "history": HISTORY}),
    rows_of(prompt=ASK, output=TEXTS | in_turn(ANSWER), label=LABELS),
    rows_of(prompt=ASK | TEXTS, output_A=TEXTS, output_B=TEXTS, label=LABELS),
)
PAIRS = st.one_of(
    rows_of(prompt=TEXTS, chosen=TEXTS, rejected=TEXTS),
    rows_of(prompt=ASK, chosen=in_turn(ANSWER), rejected=in_turn(ANSWER)),
    rows_of(prompt=ASK, chosen=ANSWER, rejected=ANSWER),
    st.tuples(ASK, ANSWER, ANSWER).map(lambda parts: {"chosen": [*parts[0], parts[1]], "rejected": [*parts[0], parts[2]]}),
    st.tuples(TEXTS, TEXTS, TEXTS).map(lambda parts: {"chosen": parts[0] + parts[1], "rejected": parts[0] + parts[2]}),
    rows_of(conversations=ASK, chosen=ANSWER, rejected=ANSWER),
    rows_of(instruction=TEXTS, chosen=TEXTS, rejected=TEXTS, options={"history": HISTORY}),
)


def nested(depth: int):
    value = None
    for _ in range(depth):
        value = [value]
    return value


ODD = st.sampled_from(
    [None, True, False, 0, 1, -1, 1.0, 0.0, 0.5, math.nan, math.inf, 10**30, "", " \n", "true", "True", "False", "yes", "good", "bad", "\ud800", "x\udfffy", "\x07", "\x9b2J",
     [], {}, [[]], [None], {"": None}, [True], [None, True], {"label": True}, {"role": None}, {"role": "user"}, {"role": "oracle", "content": "x"}, {"from": "gpt", "value": None},
     {"type": "text", "text": "part"}, [{"type": "image"}], {"name": "f", "arguments": "{"}, '{"name": "f", "arguments": {}}', "[{}]", nested(60), {"a": {"b": nested(400)}}]
)  # fmt: skip
JSON = st.recursive(ODD | TEXTS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS) | TEXTS, inner, max_size=4), max_leaves=8)
NAMES = st.sampled_from([*FIELDS, "conversation", "role", "content", "from", "value", "Label", "label ", "", "\x1b]0;", "tool_calls"])


def places(value: object) -> list[tuple]:
    """Return (holder, key) of everything inside a value, in order."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [place for key in keys for place in ((value, key), *places(value[key]))]


@st.composite
def mutated(draw, values, odd=ODD, names=NAMES):
    value = copy.deepcopy(draw(values))
    for _ in range(draw(st.sampled_from([0, 1, 1, 2, 3]))):
        found = places(value)
        if not found:
            break
        holder, key = found[draw(st.integers(0, len(found) - 1))]
        change = draw(st.sampled_from(["drop", "odd", "odd", "wrap", "copy", "name"]))
        if change == "drop":
            del holder[key]
        elif change == "odd":
            holder[key] = copy.deepcopy(draw(odd))
        elif change == "wrap":
            holder[key] = draw(st.sampled_from([[holder[key]], {"label": holder[key]}]))
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        else:
            holder[draw(names)] = holder.pop(key) if change == "name" else copy.deepcopy(holder[key])
    return value


# files


class Case(NamedTuple):
    name: str
    content: bytes
    rules: RowRules


RULES = [
    RowRules(), RowRules(), RowRules(label_map={"good": True, "bad": False, "1": True, "0": False}), RowRules(label_map={"true": False, "false": True}),
    RowRules(columns={"label": "score", "prompt": "question"}), RowRules(columns={"kto_tag": "score"}, label_map={"true": True, "0.5": False}),
]  # fmt: skip


def csv_of(rows: list, has_true: bool) -> bytes:
    rows = [row for row in rows if isinstance(row, dict)] or [{"label": True}]
    names = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(names)
    for row in rows:
        cells = (row.get(name) for name in names)
        writer.writerow(["" if cell is None else cell if isinstance(cell, str) else str(cell) if has_true else json.dumps(cell) for cell in cells])
    return stream.getvalue().encode(errors="surrogatepass")


def parquet_of(rows: list) -> bytes:
    """A column whose values are of several types is written as text, like tables that were made from JSON."""
    rows = [row for row in rows if isinstance(row, dict)] or [{"label": True}]
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        try:
            columns[ascii(name)[1:-1]] = pyarrow.array(values)
        except (pyarrow.ArrowException, OverflowError, UnicodeError, TypeError, ValueError):
            columns[ascii(name)[1:-1]] = pyarrow.array([None if value is None else json.dumps(value) for value in values])
    stream = io.BytesIO()
    try:
        pyarrow.parquet.write_table(pyarrow.table(columns), stream)
    except pyarrow.ArrowException:  # Parquet has no empty structs
        pyarrow.parquet.write_table(pyarrow.table({"label": [True], "prompt": ["q"], "completion": ["a"]}), stream)
    return stream.getvalue()


def lines_of(draw, rows: list) -> list[str]:
    lines = [json.dumps(row, ensure_ascii=draw(st.booleans())) for row in rows]
    twice = draw(st.sampled_from(["", "", "", '{"label": false, ']))
    return [line.replace("{", twice, 1) if twice and line[1:2] == '"' else line for line in lines]


def damaged(draw, content: bytes) -> bytes:
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        at = draw(st.integers(0, len(content)))
        change = draw(st.sampled_from(["cut", "insert", "insert", "drop", "mark", "line ends", "blank"]))
        if change == "cut":
            content = content[:at]
        elif change == "insert":
            content = content[:at] + draw(st.sampled_from([b"\0", b"\xff", b"\xed\xa0\x80", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b"\n", b"\r", b"\x1b", b"NaN", b"\xc2\x85"])) + content[at:]
        elif change == "drop":
            content = content[:at] + content[at + 1 :]
        elif change == "mark":
            content = b"\xef\xbb\xbf" + content
        else:
            content = content.replace(b"\n", b"\r\n" if change == "line ends" else b"\n \n")
    return content


@st.composite
def cases(draw):
    kind = draw(st.sampled_from([".jsonl", ".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz"]))
    shape = draw(st.sampled_from([LABELLED, LABELLED, PAIRS, LABELLED | PAIRS | JSON]))
    rows = draw(st.lists(mutated(shape), min_size=1, max_size=4))
    rules = draw(st.sampled_from(RULES))
    for row in rows:
        for ours, column in rules.columns.items():
            if isinstance(row, dict) and ours in row and draw(st.booleans()):
                row[column] = row.pop(ours)
        if isinstance(row, dict) and rules.label_map and "label" in row and draw(st.booleans()):
            row["label"] = draw(st.sampled_from(["good", "bad", 1, 0, 1.0, "1", 2, "true", "Good"]))
    if kind == ".parquet":
        content = parquet_of(rows)
        return Case("rows" + kind, content if draw(st.integers(0, 9)) else damaged(draw, content), rules)
    if kind == ".csv":
        return Case("rows" + kind, damaged(draw, csv_of(rows, draw(st.booleans()))), rules)
    lines = lines_of(draw, rows)
    if kind == ".json":
        lines = [draw(st.sampled_from(["[", "[\n"])) + draw(st.sampled_from([",", ",\n", ", \n\n"])).join(lines) + "]"]
    content = damaged(draw, ("\n".join(lines) + draw(st.sampled_from(["\n", ""]))).encode(errors="surrogatepass"))
    return Case("rows" + kind, gzip.compress(content, mtime=0) if kind == ".jsonl.gz" else content, rules)


# the naive reading of a file, and of a row's labels


def strictly(pairs: list) -> dict:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError
    return dict(pairs)


def refuse(text: str):
    raise ValueError


def parsed(text: str) -> object:
    return json.loads(text, object_pairs_hook=strictly, parse_constant=refuse)


def naive_row(line: bytes) -> dict | None:
    """Return the row in a line, or None for one that has to be refused."""
    try:
        row = parsed(line.decode().strip())
        json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def naive_rows(case: Case) -> list[dict | None] | None:
    """Return every row of a file, or None where that takes more than a few lines of code."""
    content = gzip.decompress(case.content) if case.name.endswith(".gz") else case.content
    if case.name.endswith(".parquet"):
        with contextlib.suppress(pyarrow.ArrowException, OSError, ValueError):
            return pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
        return None
    content = content.removeprefix(b"\xef\xbb\xbf")
    if case.name.endswith(".csv"):
        with contextlib.suppress(UnicodeDecodeError, csv.Error):
            names, *lines = [cells for cells in csv.reader(io.StringIO(content.decode(), newline="")) if cells]
            return [{name: cell or None for name, cell in zip(names, cells)} if len(cells) == len(names) else None for cells in lines]
        return None
    if not content.lstrip(b" \t\r\n\x0b\x0c").startswith(b"["):
        return [naive_row(line) for line in content.split(b"\n") if line and not line.isspace()]
    with contextlib.suppress(ValueError, RecursionError):
        return [row if isinstance(row, dict) and naive_row(json.dumps(row).encode()) is not None else None for row in parsed(content.decode())]
    return None


def naive_label(value: object, rules: RowRules, name: str) -> bool:
    """Return what was given, true or false; a label that means neither fails the test."""
    if name.endswith(".csv"):
        value = CSV_LABELS.get(value, value)
    if rules.label_map is None:
        assert value is True or value is False, f"accepted {value!r}"
        return value
    text = value if isinstance(value, str) else json.dumps(int(value) if isinstance(value, float) and value == int(value) else value)
    return rules.label_map[text]


def naive_examples(row: dict, rules: RowRules, name: str) -> list[tuple[bool, str]]:
    """Return the label of every example in a row that was accepted, with text that the example must hold."""

    def given(*fields: str):
        columns = [rules.columns[field] for field in fields if field in rules.columns] or fields
        return next((row[column] for column in columns if row.get(column) is not None), None)

    def words(answer: object) -> str:
        if isinstance(answer, list):  # the last message, or the last part of its content
            return words(answer[-1]) if answer else ""
        if isinstance(answer, dict) and answer.get("role") is None and answer.get("from") is not None:
            return "" if answer["from"] == "function_call" else answer["value"]
        if isinstance(answer, dict):
            return words(answer.get("text") if answer.get("type") == "text" and "role" not in answer else answer.get("content"))
        return answer or ""

    label, talk = given("label", "kto_tag"), given("messages", "conversations", "conversation")
    if given("chosen") is not None and given("rejected") is not None:
        return [(True, words(given("chosen"))), (False, words(given("rejected")))]
    if given("output_A") is not None and given("output_B") is not None:
        both = [words(given("output_A")), words(given("output_B"))]
        return list(zip((True, False), both if naive_label(label, rules, name) else both[::-1]))
    if talk is not None:
        turns = [turn for turn in talk if turn.get("role") == "assistant" or turn.get("role") is None and turn.get("from") in ("gpt", "assistant", "model", "function_call")]
        if label is None or isinstance(label, list):
            labels = [turn.get("label") for turn in turns] if label is None else label
            return [(naive_label(value, rules, name), words(turn)) for value, turn in zip(labels, turns, strict=True) if value is not None]
        return [(naive_label(label, rules, name), words(talk))]
    return [(naive_label(label, rules, name), words(given("completion") if given("completion") is not None else given("output")))]


# what holds for every file


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that ids tell exactly which text they stand for."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL[0], additional_special_tokens=SPECIAL[1:])
    fast.chat_template = TEMPLATE
    return fast


def require_message(error: UserError, path: str) -> None:
    assert error.where.startswith(path) and error.what and error.remedy
    assert not CONTROL.search(str(error)) and len(str(error)) < 3000, ascii(str(error))


def read(path: str, rules: RowRules) -> tuple[list, UserError | None]:
    found = []
    try:
        found.extend(pickle.loads(pickle.dumps(block)) for block in read_blocks(path, None, label_field=rules.columns.get("label", "label")))
    except UserError as error:
        require_message(error, path)
        return found, error
    return found, None


def rows_in(found: list, path: str) -> list[dict | None]:
    rows = [row for block in found for _, row in block.rows()]
    for error in rows:
        if isinstance(error, UserError):
            require_message(error, path)
    return [None if isinstance(row, UserError) else row for row in rows]


def require_same_rows(path: str, case: Case) -> None:
    """Whatever the size of the blocks, and of what is read at once, and as a naive reader has them."""
    found, error = read(path, case.rules)
    rows = rows_in(found, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "CHUNK", 16)
        if not case.name.endswith(".json"):  # the first blocks of an array tell how its rows are named
            patch.setattr(blocks, "MAX_BLOCK_ROWS", 1)
        finer, finer_error = read(path, case.rules)
    finer_rows = rows_in(finer, path)
    if error is not None:  # what is read before an error is noticed may differ, and so how much of it the message shows
        assert finer_error is not None and finer_error.where == error.where
        return
    assert finer_error is None and repr(finer_rows) == repr(rows)
    naive = naive_rows(case)
    if naive is not None:
        if case.name.endswith(".csv"):
            rows, naive = ([row and {name: CSV_LABELS.get(cell, cell) for name, cell in row.items()} for row in table] for table in (rows, naive))
        assert repr(rows) == repr(naive)


def require_own_labels(block, case: Case, row_tokenizer: RowTokenizer, segment: Path) -> int:
    """Check one block as prepare does, and return how many examples it gives."""
    path = block.place.removesuffix("row ").removesuffix(":")
    checked = check_block(row_tokenizer, block, case.rules)
    assert tokenize_block(row_tokenizer, block, case.rules, GENEROUS, segment) == checked.num_rows
    notes, arrays = load_notes(segment), load_arrays(segment, Segment._fields)
    assert checked.num_bad <= len(notes["bad"]) <= checked.num_rows and not notes["dropped"]
    for where, what, remedy, text in [*checked.problems, *notes["bad"]]:
        require_message(UserError(what, where=where, remedy=remedy), path)
        assert len(text) <= blocks.MAX_TEXT and json.dumps(text).encode()
    bad = {problem[0] for problem in notes["bad"]}
    prompts, completions = (iter(arrays[f"{part}_tokens"].tolist()) for part in ("prompt", "completion"))
    examples: dict[int, list[tuple[bool, str]]] = {}
    for number, label, *lengths in zip(*(arrays[name].tolist() for name in ("row_of", "desirable", "prompt_lengths", "completion_lengths"))):
        assert min(lengths) >= 1
        ids = [next(prompts) for _ in range(lengths[0])] + [next(completions) for _ in range(lengths[1])]
        examples.setdefault(number, []).append((label, row_tokenizer.tokenizer.decode(ids)))
    for number, row in block.rows():
        found = examples.pop(number, [])
        assert bool(found) != (f"{block.place}{number}" in bad)
        if found:
            wanted = naive_examples(row, case.rules, case.name)
            assert [label for label, _ in found] == [label for label, _ in wanted]
            assert all(words in text for (_, text), (_, words) in zip(found, wanted)), (found, wanted)
    assert not examples
    return len(arrays["row_of"])


def check_file(case: Case, tokenizer: PreTrainedTokenizerFast) -> None:
    row_tokenizer = RowTokenizer(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / case.name
        path.write_bytes(case.content)
        found, error = read(str(path), case.rules)
        num_examples = sum(require_own_labels(block, case, row_tokenizer, Path(folder) / "segment.npz") for block in found)
        event(f"{'refused' if error else 'read'}, {'some' if num_examples else 'no'} examples")
        require_same_rows(str(path), case)


@searched(300)
@given(case=cases())
def test_files_of_any_rows_give_their_own_labels_or_a_message(case, tokenizer):
    check_file(case, tokenizer)


@pytest.mark.slow
@searched(8000)
@given(case=cases())
def test_very_many_files_of_any_rows_give_their_own_labels_or_a_message(case, tokenizer):
    check_file(case, tokenizer)


# the whole command, on fewer of them


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer) -> str:
    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(vocab_size=260, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def run(command: str, config: str, *options: str) -> tuple[int, str, str]:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        exit_code = cli.run([command, "--config", config, *options])
    return exit_code, out.getvalue(), err.getvalue()


def require_one_message(exit_code: int, out: str, err: str) -> None:
    assert exit_code in (0, 2) and "Traceback" not in out + err, err
    assert err.count("kto-ds: error:") == (exit_code == 2)
    message = err[err.index("kto-ds: error:") :] if exit_code else ""
    assert not CONTROL.search(message + out), ascii(message + out)


DATA = st.fixed_dictionaries(
    {"max_length": st.sampled_from([4, 64]), "kl_group_size": st.just(2), "dataset_num_proc": st.just(1)},
    optional={
        "truncation_mode": st.sampled_from(["keep_start", "drop", "error"]), "max_prompt_length": st.sampled_from([1, 3]), "max_completion_length": st.just(5),
        "held_out_fraction": st.just(0.3), "allow_one_label": LABELS, "append_eos": LABELS, "special_tokens_in_text": st.sampled_from(["warn", "error"]),
    },
)  # fmt: skip


@pytest.mark.parametrize("num_cases", [30, pytest.param(500, marks=pytest.mark.slow)])
def test_prepare_ends_in_an_artefact_or_one_message(num_cases, model, tmp_path):
    numbers = iter(range(10**6))

    @searched(num_cases)
    @given(case=cases(), data=DATA, skip=st.booleans())
    def prepare(case, data, skip):
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        (folder / case.name).write_bytes(case.content)
        (folder / "good.jsonl").write_text("".join(json.dumps({"prompt": text * 2, "completion": text, "label": text < "c"}) + "\n" for text in "abcd"))
        rules = {"columns": case.rules.columns, "label_map": case.rules.label_map}
        data = {**data, "train": [{"path": str(folder / "good.jsonl")}, {"path": str(folder / case.name), **rules}]}
        data |= {"on_bad_row": "skip", "max_bad_fraction": 1.0} if skip else {}
        config = {"output_dir": str(folder / "run"), "model": {"path": model}, "data": data, "batch": {"global_batch_size": 4}}
        (folder / "run.yaml").write_text(json.dumps(config))
        found = run("prepare", str(folder / "run.yaml"))
        require_one_message(*found)
        assert (folder / "run" / "dataset" / "manifest.json").exists() == (found[0] == 0)
        event("prepared" if found[0] == 0 else "refused")

    prepare()


# configs

CONFIG = {
    "output_dir": "runs/x",
    "seed": 1,
    "model": {"path": "some/model", "revision": None, "dtype": "float32", "attention": "sdpa", "layout": "auto"},
    "data": {
        "train": [{"path": "rows.jsonl", "weight": 0.5, "columns": {"prompt": "question"}, "label_map": {"good": True, "bad": False}}],
        "eval": {"dev": [{"path": "dev.jsonl", "split": "dev"}]},
        "max_length": 512, "max_prompt_length": 100, "truncation_mode": "keep_end", "chat_template_kwargs": {"think": False, "list": [1, {"a": None}]},
        "on_bad_row": "skip", "max_bad_fraction": 0.1, "held_out_fraction": 0.1, "dataset_num_proc": 2, "artifact": "elsewhere",
    },
    "loss": {"beta": 0.2, "desirable_weight": "auto", "undesirable_weight": 1.5},
    "batch": {"global_batch_size": 16},
    "optim": {"learning_rate": 1e-5, "warmup_ratio": 0, "max_grad_norm": 0},
    "train": {"max_steps": 5, "num_train_epochs": 0.5},
    "report": {"wandb": {"mode": "offline", "name": "x"}},
}  # fmt: skip
KEYS = st.sampled_from(["data", "train", "eval", "label_map", "columns", "max_length", "modle", "", "<list>", "[key]", "a.b", "\x1b[2J", "\u2028", "path", "held_out", "weight", "é"])
SETTINGS = ODD.filter(lambda value: "\ud800" not in str(value) and "\udfff" not in str(value)) | st.sampled_from(
    ["auto", "null", "1e-3", "~", "\x00", "a\nb", 2**31, -(2**70), 1e-320, 1.5, {"1": True}, {"path": "x"}, [{"path": "x"}], {"dev": [{"path": "x", "weight": 2}]}, [[1]], {"tools": 1}]
)
DAMAGE = [":", "-", "[", "]", "{", "}", "#", "&a ", "*a", "! ", "!!python/object:os.system ", "|", ">", "'", '"', "%", "@", "\t", "\n", "? ", "---\n", "...", "<<: ", "~",
          "\x00", "\x85", "\ufeff"]  # fmt: skip
SCALARS = ["2001-99-99", "2001-01-01", "0x1f", "0o9", "1_0", ".inf", "1e999", "1", "null", "true", "''", '"\\e[2J"', '"\\0"', "!!int x", "!!float x", "!!set {a}", "*a", "9" * 5000, "[" * 2000]
PARTS = {"value": re.compile("(?<=: ).+"), "key": re.compile(r"[a-z_]+(?=:)"), "line": re.compile("^(?=[a-z])", re.M), "any": re.compile(".?", re.S)}


def block_style(config: dict) -> str:
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.dump(config, stream)
    return stream.getvalue()


@st.composite
def config_texts(draw):
    config = draw(mutated(st.just(CONFIG), odd=SETTINGS, names=KEYS))
    if draw(st.booleans()):
        return json.dumps(config, ensure_ascii=draw(st.booleans())).replace("NaN", ".nan").replace("Infinity", ".inf").encode()
    text = block_style(config if draw(st.booleans()) else CONFIG)
    for _ in range(draw(st.integers(0, 2))):
        part = draw(st.sampled_from(["value", "key", "line", "any"]))
        spots = [match.span() for match in PARTS[part].finditer(text)]
        at, end = spots[draw(st.integers(0, len(spots) - 1))] if spots else (0, 0)
        text = text[:at] + draw(st.sampled_from(DAMAGE if part == "any" else DAMAGE + SCALARS)) + (": 1\n" if part == "line" else "") + text[end:]
    return text.encode() if draw(st.integers(0, 20)) else text.encode()[:-5] + b"\xff"


@pytest.mark.parametrize("num_cases", [200, pytest.param(1500, marks=pytest.mark.slow)])
def test_a_config_is_refused_with_one_message_or_printed_as_it_is_read_again(num_cases, tmp_path):
    given_path, printed_path = tmp_path / "run.yaml", tmp_path / "printed.yaml"

    @searched(num_cases)
    @given(content=config_texts(), command=st.sampled_from(["prepare", "train"]))
    def print_config(content, command):
        given_path.write_bytes(content)
        exit_code, out, err = run(command, str(given_path), "--print-config")
        require_one_message(exit_code, out, err)
        assert (out == "") == (exit_code != 0)
        event("printed" if exit_code == 0 else "refused")
        if exit_code == 0:
            printed_path.write_text(out, encoding="utf-8")
            assert run(command, str(printed_path), "--print-config") == (0, out, "")
            assert cli.read_config(command, ["--config", str(printed_path)])[0] == cli.read_config(command, ["--config", str(given_path)])[0]

    print_config()
