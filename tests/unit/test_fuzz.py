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
import random
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
from kto_ds.config_data import FIELDS
from kto_ds.data.ingest import check_block, tokenize_block
from kto_ds.data.segments import Limits, Segment, load_arrays, load_notes
from kto_ds.data.tokenization import RowTokenizer
from kto_ds.errors import UserError
from kto_ds.rows import blocks, json_rows
from kto_ds.rows.records import RowRules
from kto_ds.rows.sources import read_blocks
from tests.faults.ledger import tally

CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # a message may have several lines
SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CSV_LABELS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
GENEROUS = Limits(max_length=10**9)


def searched(max_examples: int):
    return settings(max_examples=max_examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


# rows of every shape, and what may happen to them

TEXTS = st.one_of(
    st.sampled_from(
        ["ask", "more of it", " good", "bad", "é 漢 🙂", "true", "1", "a\x00b", "\x1b[2J", "\u2028", "a\r\nb", 'say "x", {y}', "tail\\", "<|im_end|>", "<|end|>"]
    ),  # fmt: skip
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


LABELLED = [
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
]
PAIRS = [
    rows_of(prompt=TEXTS, chosen=TEXTS, rejected=TEXTS),
    rows_of(prompt=ASK, chosen=in_turn(ANSWER), rejected=in_turn(ANSWER)),
    rows_of(prompt=ASK, chosen=ANSWER, rejected=ANSWER),
    st.tuples(ASK, ANSWER, ANSWER).map(lambda parts: {"chosen": [*parts[0], parts[1]], "rejected": [*parts[0], parts[2]]}),
    st.tuples(TEXTS, TEXTS, TEXTS).map(lambda parts: {"chosen": parts[0] + parts[1], "rejected": parts[0] + parts[2]}),
    rows_of(conversations=ASK, chosen=ANSWER, rejected=ANSWER),
    rows_of(instruction=TEXTS, chosen=TEXTS, rejected=TEXTS, options={"history": HISTORY}),
]
PLAIN = [LABELLED[0], LABELLED[1], PAIRS[0], rows_of(prompt=TEXTS, output_A=TEXTS, output_B=TEXTS, label=LABELS), rows_of(instruction=TEXTS, output=TEXTS, label=LABELS)]


def nested(depth: int):
    value = None
    for _ in range(depth):
        value = [value]
    return value


ODD = [
     None, True, False, 0, 1, -1, 1.0, 0.0, 0.5, math.nan, math.inf, 10**30, "", " \n", "true", "True", "False", "yes", "good", "bad", "\ud800", "x\udfffy", "\x07", "\x9b2J",
     [], {}, [[]], [None], {"": None}, [True], [None, True], {"label": True}, {"role": None}, {"role": "user"}, {"role": "oracle", "content": "x"}, {"from": "gpt", "value": None},
     {"type": "text", "text": "part"}, [{"type": "image"}], {"name": "f", "arguments": "{"}, '{"name": "f", "arguments": {}}', "[{}]", nested(60), {"a": {"b": nested(400)}},
]  # fmt: skip
WRONG_LABELS = ["true", "True", "false", "yes", "good", "bad", "Good", "1", "0", "", 1, 0, 1.0, 0.0, 1.5, 2, -1, 0.5, math.nan]
WRONG_LABELS += [None, [], [True], [None], {}, {"label": True}, "\ud800"]
JSON = st.recursive(
    st.sampled_from(ODD) | TEXTS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS) | TEXTS, inner, max_size=4), max_leaves=8
)
NAMES = [*FIELDS, "conversation", "role", "content", "from", "value", "Label", "label ", "", "\x1b]0;", "tool_calls"]


def places(value: object) -> list[tuple]:
    """Return (holder, key) of everything inside a value, in order."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [place for key in keys for place in ((value, key), *places(value[key]))]


# What to draw is chosen by a seeded generator: hypothesis alone would draw a few kinds of rows again and again.
CHOICES = st.integers(0, 2**32 - 1).map(random.Random)


def mutate(value: object, rng: random.Random, odd: list = ODD, names: list = NAMES) -> None:
    """Change up to three places inside a value."""
    for _ in range(rng.choice([0, 0, 1, 1, 2, 3])):
        found = places(value)
        if not found:
            break
        holder, key = rng.choice(found)
        change = rng.choice(["drop", "odd", "odd", "wrap", "copy", "name"])
        if change == "drop":
            del holder[key]
        elif change == "odd":
            holder[key] = copy.deepcopy(rng.choice(odd))
        elif change == "wrap":
            holder[key] = rng.choice([[holder[key]], {"label": holder[key]}])
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        else:
            holder[rng.choice(names)] = holder.pop(key) if change == "name" else copy.deepcopy(holder[key])


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


def lines_of(rows: list, rng: random.Random) -> list[str]:
    lines = [json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in rows]
    return [line.replace("{", '{"label": false, ', 1) if rng.random() < 0.05 and line[1:2] == '"' else line for line in lines]


BROKEN = [b"\0", b"\xff", b"\xed\xa0\x80", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b"\n", b"\r", b"\x1b", b"NaN", b"\xc2\x85"]


def damage(content: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        at = rng.randint(0, len(content))
        change = rng.choice(["cut", "insert", "insert", "drop", "mark", "line ends", "blank"])
        if change == "cut":
            content = content[:at]
        elif change == "insert":
            content = content[:at] + rng.choice(BROKEN) + content[at:]
        elif change == "drop":
            content = content[:at] + content[at + 1 :]
        elif change == "mark":
            content = b"\xef\xbb\xbf" + content
        else:
            content = content.replace(b"\n", b"\r\n" if change == "line ends" else b"\n \n")
    return content


@st.composite
def cases(draw):
    rng = draw(CHOICES)
    shapes = rng.choice([LABELLED, LABELLED, PAIRS, [*LABELLED, *PAIRS, JSON]])
    kind = rng.choice([".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz"])
    rules = rng.choice(RULES)
    if kind in (".csv", ".parquet"):
        shapes = [rng.choice(PLAIN if kind == ".csv" else shapes)]  # a table has rows of one shape
    rows = [copy.deepcopy(draw(rng.choice(shapes))) for _ in range(rng.randint(1, 4))]
    rng.seed(repr(rows) + kind + repr(rules))  # hypothesis likes to draw the same number again, with other texts
    for row in (row for row in rows if isinstance(row, dict)):
        for label in {"label", "kto_tag"} & row.keys():
            if rng.random() < 0.3 or rules.label_map and not isinstance(row[label], list):
                row[label] = rng.choice(WRONG_LABELS if rng.random() < 0.5 else list(rules.label_map or [True]))
        mutate(row, rng)
        for ours in rules.columns.keys() & row.keys():
            row[rules.columns[ours]] = row.pop(ours)
    if kind == ".parquet":
        content = parquet_of(rows)
        return Case("rows" + kind, damage(content, rng) if rng.random() < 0.1 else content, rules)
    if kind == ".csv":
        return Case("rows" + kind, damage(csv_of(rows, rng.random() < 0.5), rng), rules)
    lines = lines_of(rows, rng)
    if kind == ".json":
        lines = [rng.choice(["[", "[\n"]) + rng.choice([",", ",\n", ", \n\n"]).join(lines) + "]"]
    content = damage(("\n".join(lines) + rng.choice(["\n", ""])).encode(errors="surrogatepass"), rng)
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
            table = pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
            return [{name: without_nulls(value) for name, value in row.items()} for row in table]
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


def without_nulls(value: object) -> object:
    """Below its columns a table writes null for what a row does not have."""
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return {name: without_nulls(inner) for name, inner in value.items() if inner is not None} if isinstance(value, dict) else value


def naive_label(value: object, rules: RowRules, name: str) -> bool:
    """Return what was given, true or false; a label that means neither fails the test."""
    if rules.label_map is None:
        value = CSV_LABELS.get(value, value) if name.endswith(".csv") else value
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
    if given("prompt") is not None and given("output_A") is not None and given("output_B") is not None:
        both = [words(given("output_A")), words(given("output_B"))]
        return list(zip((True, False), both if naive_label(label, rules, name) else both[::-1]))
    if talk is not None:
        turns = [turn for turn in talk if turn.get("role") == "assistant" or turn.get("role") is None and turn.get("from") in ("gpt", "assistant", "model", "function_call")]
        if label is None or isinstance(label, list):
            labels = [turn.get("label") for turn in turns] if label is None else label
            return [(naive_label(value, rules, name), words(turn)) for value, turn in zip(labels, turns, strict=True) if value is not None]
        return [(naive_label(label, rules, name), words(talk))]
    answers_prompt = given("prompt") is not None and given("completion") is not None  # or the row may well have an unused field of that name
    return [(naive_label(label, rules, name), words(given("completion" if answers_prompt else "output")))]


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
        found.extend(pickle.loads(pickle.dumps(block)) for block in read_blocks(path, None, label_fields=rules.boolean_columns))
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
        is_strict = case.name.endswith((".csv", ".parquet")) or "UTF-16" in error.what
        assert is_strict or not any(naive_rows(case) or [])
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


@searched(400)
@given(case=cases())
def test_files_of_any_rows_give_their_own_labels_or_a_message(case, tokenizer):
    check_file(case, tokenizer)


@pytest.mark.slow
def test_very_many_files_of_any_rows_give_their_own_labels_or_a_message(tokenizer):
    with tally("R20", "files of any rows, mutated: each label is a row's own, or the file is refused") as counts:

        @searched(8000)
        @given(case=cases())
        def check(case):
            counts.injected += 1
            check_file(case, tokenizer)
            counts.survived += 1

        check()


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
        counts.injected += 1
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
        counts.survived += 1

    with tally("R20", "`prepare` on such files: an artefact or one message") as counts:
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
KEYS = ["data", "train", "eval", "label_map", "columns", "max_length", "modle", "", "<list>", "[key]", "a.b", "\x1b[2J", "\u2028", "path", "held_out", "weight", "é"]
SETTINGS = [
    *(value for value in ODD if "\\ud" not in ascii(value)),
    *["auto", "null", "1e-3", "~", "\x00", "a\nb", 2**31, -(2**70), 1e-320, 1.5, {"1": True}, {"path": "x"}, [{"path": "x"}], {"dev": [{"path": "x", "weight": 2}]}, [[1]], {"tools": 1}],
]
DAMAGE = [":", "-", "[", "]", "{", "}", "#", "&a ", "*a", "! ", "!!python/object:os.system ", "|", ">", "'", '"', "%", "@", "\t", "\n", "? ", "---\n", "...", "<<: ", "~",
          "\x00", "\x85", "\ufeff"]  # fmt: skip
SCALARS = ["2001-99-99", "2001-01-01", "0x1f", "0o9", "1_0", ".inf", "1e999", "1", "null", "true", "''"]
SCALARS += ['"\\e[2J"', '"\\0"', "!!int x", "!!float x", "!!set {a}", "*a", "9" * 5000, "[" * 2000]
PARTS = {"value": re.compile("(?<=: ).+"), "key": re.compile(r"[a-z_]+(?=:)"), "line": re.compile("^(?=[a-z])", re.M), "any": re.compile(".?", re.S)}


def block_style(config: dict) -> str:
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.dump(config, stream)
    return stream.getvalue()


def config_text(rng: random.Random) -> bytes:
    config = copy.deepcopy(CONFIG)
    mutate(config, rng, odd=SETTINGS, names=KEYS)
    if rng.random() < 0.4:
        return json.dumps(config, ensure_ascii=rng.random() < 0.5).replace("NaN", ".nan").replace("Infinity", ".inf").encode()
    text = block_style(config)
    for _ in range(rng.randint(0, 2)):
        part = rng.choice(list(PARTS))
        at, end = rng.choice([match.span() for match in PARTS[part].finditer(text)] or [(0, 0)])
        text = text[:at] + rng.choice(DAMAGE if part == "any" else DAMAGE + SCALARS) + (": 1\n" if part == "line" else "") + text[end:]
    return text.encode() if rng.random() < 0.95 else text.encode()[:-5] + b"\xff"


@pytest.mark.parametrize("num_cases", [100, pytest.param(1500, marks=pytest.mark.slow)])
def test_a_config_is_refused_with_one_message_or_printed_as_it_is_read_again(num_cases, tmp_path):
    given_path, printed_path = tmp_path / "run.yaml", tmp_path / "printed.yaml"

    @searched(num_cases)
    @given(content=CHOICES.map(config_text), command=st.sampled_from(["prepare", "train"]))
    def print_config(content, command):
        counts.injected += 1
        given_path.write_bytes(content)
        exit_code, out, err = run(command, str(given_path), "--print-config")
        require_one_message(exit_code, out, err)
        assert (out == "") == (exit_code != 0)
        event("printed" if exit_code == 0 else "refused")
        if exit_code == 0:
            printed_path.write_text(out, encoding="utf-8")
            assert run(command, str(printed_path), "--print-config") == (0, out, "")
            assert cli.read_config(command, ["--config", str(printed_path)])[0] == cli.read_config(command, ["--config", str(given_path)])[0]
        counts.survived += 1

    with tally("R20", "configs, mutated: one message, or printed as they are read again") as counts:
        print_config()
