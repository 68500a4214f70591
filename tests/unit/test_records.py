import copy
import datetime
import decimal
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from ruamel.yaml import YAML

from kto_ds.config_data import FIELDS, SourceConfig
from kto_ds.errors import UserError
from kto_ds.rows.records import Record, RowRules, to_records, unused_fields

SHARED_ROWS = Path(__file__).parents[3] / "shared" / "data"


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


def calling(*calls):
    return {"role": "assistant", "tool_calls": list(calls)}


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def said(speaker, value):
    return {"from": speaker, "value": value}


ASK, GOOD, BAD = [user("q")], [assistant("good")], [assistant("bad")]
LONG = [{"role": "system", "content": ""}, user("q"), assistant("a"), user("r")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q ", "completion": " a", "label": True}, [("q ", " a", True)]),
        ({"prompt": ASK, "completion": GOOD, "label": False}, [(ASK, GOOD, False)]),
        ({"prompt": ASK, "completion": [assistant("a"), assistant("")], "label": True}, [(ASK, [assistant("a"), assistant("")], True)]),
        ({"prompt": "q", "chosen": "good", "rejected": "bad"}, [("q", "good", True), ("q", "bad", False)]),
        ({"prompt": "q", "chosen": "q good", "rejected": "q bad"}, [("q", "q good", True), ("q", "q bad", False)]),
        ({"prompt": ASK, "chosen": GOOD, "rejected": BAD}, [(ASK, GOOD, True), (ASK, BAD, False)]),
        ({"prompt": ASK, "chosen": ASK + GOOD, "rejected": ASK + BAD}, [(ASK, GOOD, True), (ASK, BAD, False)]),
        ({"prompt": LONG, "chosen": LONG + GOOD, "rejected": BAD}, [(LONG, GOOD, True), (LONG, BAD, False)]),
        ({"prompt": "q", "chosen": ASK + GOOD, "rejected": ASK + BAD, "messages": ASK + GOOD}, [(ASK, GOOD, True), (ASK, BAD, False)]),
        ({"chosen": LONG + GOOD, "rejected": LONG + BAD}, [(LONG, GOOD, True), (LONG, BAD, False)]),
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, [("The sky is", " blue.", True), ("The sky is", " green.", False)]),
        ({"chosen": "Q: a\nA: b", "rejected": "Q: a\nA:  c"}, [("Q: a\nA:", " b", True), ("Q: a\nA:", "  c", False)]),
        ({"chosen": "x1 ", "rejected": "x2"}, [("x", "1 ", True), ("x", "2", False)]),
        ({"messages": ASK + GOOD, "label": True}, [(ASK, GOOD, True)]),
        ({"messages": LONG + BAD, "label": False}, [(LONG, BAD, False)]),
        ({"prompt": "q", "completion": "a", "label": True, "score": 0.3, "id": None}, [("q", "a", True)]),
        ({"prompt": "q", "completion": None, "label": None, "messages": None, "chosen": "a", "rejected": "b"}, [("q", "a", True), ("q", "b", False)]),
        # one message as the answer; UltraFeedback's text prompt
        ({"prompt": ASK, "chosen": GOOD[0], "rejected": BAD[0]}, [(ASK, GOOD, True), (ASK, BAD, False)]),
        ({"prompt": "q", "chosen": LONG[:2] + GOOD, "rejected": LONG[:2] + BAD}, [(LONG[:2], GOOD, True), (LONG[:2], BAD, False)]),
        # conversations, in either spelling
        ({"conversations": ASK + GOOD, "label": True}, [(ASK, GOOD, True)]),
        ({"conversation": ASK + GOOD, "kto_tag": False}, [(ASK, GOOD, False)]),
        ({"conversations": [said("human", "q"), said("gpt", "good")], "label": True}, [(ASK, GOOD, True)]),
        ({"messages": [said("system", "s"), said("user", "q"), said("model", "good")], "label": True}, [([system("s"), *ASK], GOOD, True)]),
        ({"messages": [{**said("human", "q"), "role": None, "content": None}, *GOOD], "label": True}, [(ASK, GOOD, True)]),
        # LLaMA-Factory's ranking rows
        ({"conversations": [said("human", "q")], "chosen": said("gpt", "good"), "rejected": said("gpt", "bad")}, [(ASK, GOOD, True), (ASK, BAD, False)]),
        ({"messages": ASK, "chosen": GOOD[0], "rejected": BAD}, [(ASK, GOOD, True), (ASK, BAD, False)]),
        ({"messages": ASK, "chosen": ASK + GOOD, "rejected": ASK + BAD}, [(ASK, GOOD, True), (ASK, BAD, False)]),
        # LLaMA-Factory's instructions
        ({"instruction": "q", "output": "good", "kto_tag": True}, [(ASK, GOOD, True)]),
        ({"instruction": "q", "input": "", "output": "good", "label": False, "system": "", "history": []}, [(ASK, GOOD, False)]),
        ({"instruction": "q", "input": "x", "output": "good", "label": True}, [([user("q\nx")], GOOD, True)]),
        ({"instruction": "", "input": "x", "output": "good", "label": True}, [([user("x")], GOOD, True)]),
        (
            {"instruction": "q", "output": "good", "label": True, "system": "s", "history": [["a", "b"], ["c", "d"]]},
            [([system("s"), user("a"), assistant("b"), user("c"), assistant("d"), *ASK], GOOD, True)],
        ),
        ({"instruction": "q", "input": "x", "chosen": "good", "rejected": "bad"}, [([user("q\nx")], GOOD, True), ([user("q\nx")], BAD, False)]),
        # HALOs
        ({"prompt": ASK, "output": GOOD, "label": True}, [(ASK, GOOD, True)]),
        ({"prompt": ASK, "output": "good", "label": False}, [(ASK, GOOD, False)]),
        ({"prompt": "q", "output": " good", "label": True}, [("q", " good", True)]),
        ({"prompt": ASK, "output_A": GOOD, "output_B": BAD, "label": True}, [(ASK, GOOD, True), (ASK, BAD, False)]),
        ({"prompt": ASK, "output_A": "bad", "output_B": GOOD, "label": False}, [(ASK, GOOD, True), (ASK, BAD, False)]),
        # thumbs on single turns
        ({"messages": [*ASK, {**GOOD[0], "label": True}]}, [(ASK, GOOD, True)]),
        (
            {"messages": [user("q"), {**assistant("a"), "label": False}, user("r"), {**assistant("b"), "label": None}, user("s"), {**assistant("c"), "label": True}, user("t")]},
            [([user("q")], [assistant("a")], False), ([user("q"), assistant("a"), user("r"), assistant("b"), user("s")], [assistant("c")], True)],
        ),
        ({"messages": LONG + GOOD, "label": [None, True]}, [(LONG, GOOD, True)]),
        ({"messages": LONG + GOOD, "label": [False, True]}, [(LONG[:2], LONG[2:3], False), (LONG, GOOD, True)]),
        ({"conversations": [said("human", "q"), {**said("gpt", "good"), "label": False}]}, [(ASK, GOOD, False)]),
        # a system field
        ({"messages": ASK + GOOD, "label": True, "system": "s"}, [([system("s"), *ASK], GOOD, True)]),
        ({"chosen": ASK + GOOD, "rejected": ASK + BAD, "system": "s"}, [([system("s"), *ASK], GOOD, True), ([system("s"), *ASK], BAD, False)]),
        # what a cell of a table may hold besides
        ({"prompt": "q", "completion": "a", "label": np.bool_(True), "tools": "[]", "chat_template_kwargs": {}}, [("q", "a", True)]),
        ({"messages": [user([{"type": "text", "text": "q"}, {"type": "text", "text": "r", "image": None}]), *GOOD], "label": True}, [([user("qr")], GOOD, True)]),
    ],
)
def test_rows_of_every_shape_become_records(row, expected):
    before = copy.deepcopy(row)
    records = to_records(row, "rows.jsonl:7")
    assert records == [Record(prompt=p, completion=c, desirable=d, where="rows.jsonl:7") for p, c, d in expected]
    assert row == before


def test_what_a_template_may_read_is_kept_and_null_is_not():
    messages = [{"role": "user", "content": "q", "name": "ann", "tool_calls": None}, {**assistant("a"), "reasoning_content": "hm"}]
    record = to_records({"messages": messages, "label": True}, "x")[0]
    assert record.prompt == [{"role": "user", "content": "q", "name": "ann"}]
    assert record.completion == [{"role": "assistant", "content": "a", "reasoning_content": "hm"}]


def test_calls_of_tools_are_content_and_keep_their_nulls():
    search = call("search", {"query": "x", "page": None})
    tools = [{"type": "function", "function": {"name": "search", "parameters": {"enum": [None, 1], "title": None}}}]
    row = {"messages": [*ASK, {"role": "assistant", "content": None, "tool_calls": [search]}], "label": True, "tools": tools, "chat_template_kwargs": {"think": False, "x": None}}
    record = to_records(row, "x")[0]
    assert record.completion == [calling(search)]
    assert record.tools == tools
    assert record.template_kwargs == {"think": False}
    assert to_records({**row, "tools": json.dumps(tools)}, "x")[0].tools == record.tools

    turns = [*ASK, calling(search), {"role": "tool", "content": "found", "tool_calls": None}, {**GOOD[0], "tool_calls": []}]
    record = to_records({"messages": turns, "label": True}, "x")[0]
    assert (record.prompt, record.completion) == ([*ASK, calling(search), {"role": "tool", "content": "found"}], GOOD)


@pytest.mark.parametrize("value", ['{"name": "f", "arguments": {"x": null}}', '[{"name": "f", "arguments": {"x": null}}]'])
def test_a_function_call_of_sharegpt_becomes_a_call_of_a_tool(value):
    row = {"conversations": [said("human", "q"), said("function_call", value), said("observation", "1"), said("gpt", "good")], "tools": '[{"name": "f"}]', "label": True}
    record = to_records(row, "x")[0]
    assert record.prompt == [*ASK, calling(call("f", {"x": None})), {"role": "tool", "content": "1"}]
    assert record.tools == [{"name": "f"}]


def test_foreign_values_of_tables_become_text_or_numbers():
    when = datetime.date(2024, 5, 1)
    messages = [{**user("q"), "at": when, "cost": decimal.Decimal("0.5"), "score": np.float32(0.5), "ids": np.array([1, 2]), 3: b"x"}, *GOOD]
    record = to_records({"messages": messages, "label": True}, "x")[0]
    assert record.prompt == [{**user("q"), "at": "2024-05-01", "cost": "0.5", "score": 0.5, "ids": [1, 2], "3": "b'x'"}]
    assert json.loads(json.dumps(record.prompt)) == record.prompt


# labels


def as_json(label):
    """What a message shows: JSON for null, booleans and numbers."""
    return json.dumps(label) if label is None or isinstance(label, (bool, float)) else repr(label)


@pytest.mark.parametrize("label", [1, 0, -1, 0.5, float("nan"), "yes", "true", "", None, [True, False], [], {}, {"a": 1}])
@pytest.mark.parametrize("fields", [{"prompt": "q", "completion": "a"}, {"messages": ASK + GOOD}, {"instruction": "q", "output": "a"}])
def test_only_true_and_false_are_labels(fields, label):
    with pytest.raises(UserError) as caught:
        to_records({**fields, "label": label}, "rows.jsonl:7")
    assert str(caught.value).startswith(f"rows.jsonl:7: label: expected true or false, found {as_json(label)}")
    assert "true marks a desirable completion" in str(caught.value)


def test_numbers_as_labels_are_shown_the_map_that_they_need():
    for label in (1, 0, 1.0):
        with pytest.raises(UserError, match=r"label_map: \{1: true, 0: false\}"):
            to_records({"prompt": ASK, "output": GOOD, "label": label}, "x")


@pytest.mark.parametrize("fields", [{"prompt": "q", "completion": "a"}, {"messages": ASK + GOOD}, {"prompt": "q", "output_A": "a", "output_B": "b"}])
def test_a_missing_label_is_named(fields):
    with pytest.raises(UserError, match="^x: label: expected true or false, the field is missing"):
        to_records(fields, "x")
    with pytest.raises(UserError, match="^x: kto_tag: expected true or false, found null"):
        to_records({**fields, "kto_tag": None}, "x")


@pytest.mark.parametrize(
    ("label_map", "label", "expected"),
    [
        ({1: True, 0: False}, 1, True),
        ({"1": True, "0": False}, 0, False),
        ({"1": True, "0": False}, "1", True),
        ({1: True, 0: False}, 1.0, True),
        ({1: True, -1: False}, np.int64(-1), False),
        ({"true": False, "false": True}, True, False),
        ({True: True}, True, True),
        ({"thumbs_up": True, "thumbs_down": False}, "thumbs_down", False),
        ({"": False}, "", False),
        ({0.5: True}, 0.5, True),
    ],
)
def test_a_label_map_says_what_other_labels_mean(label_map, label, expected):
    rules = RowRules(label_map=label_map)
    assert to_records({"prompt": "q", "completion": "a", "label": label}, "x", rules)[0].desirable is expected
    assert [record.desirable for record in to_records({"messages": LONG + GOOD, "label": [label, None]}, "x", rules)] == [expected]
    assert to_records({"messages": [*ASK, {**GOOD[0], "label": label}]}, "x", rules)[0].desirable is expected


@pytest.mark.parametrize("label", [2, "2", True, 0.5, 1.5, float("nan"), float("inf"), "yes", {}, [1], decimal.Decimal("NaN")])
def test_a_label_outside_the_map_is_refused_with_its_keys(label):
    rules = RowRules(label_map={1: True, "0": False})
    with pytest.raises(UserError) as caught:
        to_records({"prompt": "q", "completion": "a", "label": label}, "rows.jsonl:7", rules)
    assert str(caught.value).startswith(f"rows.jsonl:7: label: expected one of label_map's keys '1', '0', found {as_json(label)}")


def pasted(remedy, key):
    """The mapping that a remedy shows after `key: `, as the config would read it."""
    (text,) = re.findall(rf"{key}: (\{{.*?\}})", remedy)
    return YAML(typ="safe", pure=True).load(text)


@pytest.mark.parametrize(
    ("label", "desirable"),
    [("TRUE", True), ("FALSE", False), ("True", True), ("False", False), ("true", True), ("false", False), ("tRUE", True), ("Yes", True), ("no", False)]
    + [("thumbs_down", False), ("0", False), (1.0, True), (-1, False), ("\U0001f44d", True), ("\U0001f44e", False)],
)
def test_the_map_that_a_label_needs_can_be_pasted(label, desirable):
    row = {"prompt": "q", "completion": "a", "label": label}
    with pytest.raises(UserError) as caught:
        to_records(row, "x")
    source = SourceConfig(path="x", label_map=pasted(caught.value.remedy, "label_map"))
    assert to_records(row, "x", RowRules(label_map=source.label_map))[0].desirable is desirable
    assert sorted(source.label_map.values()) == [False, True]


@pytest.mark.parametrize("label", [True, False, "TRUE", 0, 2.5, "\U0001f44d", 'a "b" \\ c\n', "null", "caf\xe9: x"])
def test_a_key_that_a_map_lacks_can_be_pasted(label):
    row = {"prompt": "q", "completion": "a", "label": label}
    with pytest.raises(UserError, match="expected one of label_map's keys 'up', 'down', found") as caught:
        to_records(row, "x", RowRules(label_map={"up": True, "down": False}))
    entries = re.fullmatch(r"add (.*: true) to label_map for a desirable completion, (.*: false) for an undesirable one; or mend the row", caught.value.remedy)
    for entry, desirable in zip(entries.groups(), (True, False)):
        source = SourceConfig(path="x", label_map=YAML(typ="safe", pure=True).load(f"{{up: true, {entry}}}"))
        assert to_records(row, "x", RowRules(label_map=source.label_map))[0].desirable is desirable
    with pytest.raises(UserError, match="add the value to label_map"):
        to_records({**row, "label": "long" * 100}, "x", RowRules(label_map={"up": True}))


def test_a_map_does_not_stand_in_for_a_label():
    for row in ({"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": "a", "label": None}):
        with pytest.raises(UserError, match="label: expected one of label_map's keys 'null', 'None', '', (found null|the field is missing)"):
            to_records(row, "x", RowRules(label_map={"null": True, "None": True, "": True}))


# the prompt that a pair shares


@pytest.mark.parametrize("end", [0, 1, 2, 3, 7, 8, 9, 1000, 4095])
def test_the_prompt_of_a_pair_is_all_that_its_texts_share(end):
    shared = "".join(chr(97 + index % 26) for index in range(end))
    for chosen, rejected in (("1", "2"), ("1" * 50, "2x"), ("1" + shared, "2" + shared)):
        row = {"chosen": f"q{shared}{chosen}", "rejected": f"q{shared}{rejected}"}
        assert [(record.prompt, record.completion) for record in to_records(row, "x")] == [(f"q{shared}", chosen), (f"q{shared}", rejected)]


def test_a_long_shared_prompt_is_found_fast():
    shared = "word " * 4_000_000
    row = {"chosen": f"{shared}good", "rejected": f"{shared}bad"}
    start = time.process_time()
    assert [len(record.prompt) for record in to_records(row, "x")] == [len(shared) - 1] * 2
    assert time.process_time() - start < 0.8  # comparing these characters one by one takes longer


# columns


def test_columns_say_how_the_table_calls_our_fields():
    rules = RowRules(columns={"prompt": "question", "completion": "output", "label": "thumb"})
    row = {"question": "q", "output": "a", "thumb": True, "prompt": "not this", "label": 3, "id": 4, "note": None}
    assert to_records(row, "x", rules) == [Record(prompt="q", completion="a", desirable=True, where="x")]
    assert unused_fields(row, rules) == {"prompt", "label", "id"}
    assert to_records({"dialog": ASK + GOOD, "up": True}, "x", RowRules(columns={"conversations": "dialog", "kto_tag": "up"}))[0].prompt == ASK


def test_errors_name_the_field_and_its_column():
    rules = RowRules(columns={"prompt": "question", "label": "thumb"})
    for row, what in (
        ({"question": 3, "completion": "a", "thumb": True}, "prompt (column 'question'): expected text"),
        ({"question": "q", "completion": "a", "thumb": "up"}, "label (column 'thumb'): expected true or false, found 'up'"),
        ({"question": "q", "completion": "a"}, "label (column 'thumb'): expected true or false, the field is missing"),
        ({"prompt": "q", "completion": "a", "label": True}, "columns names ['question', 'thumb'], which the row lacks"),
    ):
        with pytest.raises(UserError) as caught:
            to_records(row, "x", rules)
        assert what in str(caught.value)


@pytest.mark.parametrize(
    ("row", "unused"),
    [
        ({"prompt": "q", "completion": "a", "label": True}, set()),
        ({"prompt": "q", "completion": "a", "label": True, "id": 1, "score": None, "input": "x", 3: 4}, {"id", "input", "3"}),
        ({"prompt": "q", "prompt_id": "i", "messages": ASK + GOOD, "chosen": ASK + GOOD, "rejected": ASK + BAD}, {"prompt_id", "messages"}),
        ({"conversations": ASK, "chosen": GOOD[0], "rejected": BAD[0], "tools": "[]", "system": "s"}, set()),
        ({"instruction": "q", "input": "", "history": [], "output": "a", "kto_tag": True, "text": "qa"}, {"text"}),
        ({"text": "a"}, set()),
        ({}, set()),
    ],
)
def test_fields_that_no_record_comes_from_are_listed(row, unused):
    assert unused_fields(row) == unused


def test_every_known_field_is_used_by_some_shape():
    used = set()
    for row in (
        {"prompt": "q", "completion": "a", "label": True}, {"prompt": "q", "chosen": "a", "rejected": "b"}, {"messages": ASK + GOOD, "label": True},
        {"conversations": ASK + GOOD, "kto_tag": True, "tools": "[]", "chat_template_kwargs": {}, "system": "s"}, {"prompt": "q", "output_A": "a", "output_B": "b", "label": True},
        {"instruction": "q", "input": "i", "output": "a", "history": [], "kto_tag": True},
    ):  # fmt: skip
        assert to_records(row, "x") and not unused_fields(row)
        used |= row.keys()
    assert used == set(FIELDS)


# refusals


@pytest.mark.parametrize(
    ("prompt", "full", "empty"),
    [("q", "a", empty) for empty in ("", " ", "\n\t\u00a0")] + [(ASK, GOOD, empty) for empty in ([], [assistant("")], [assistant(" \n")], ASK)],
)
def test_empty_completions_are_refused(prompt, full, empty):
    rows = [{"prompt": prompt, "chosen": empty, "rejected": full}, {"prompt": prompt, "chosen": full, "rejected": empty}]
    if empty != ASK:  # only pairs may repeat the prompt
        rows.append({"prompt": prompt, "completion": empty, "label": True})
    for row in rows:
        with pytest.raises(UserError, match="(completion|chosen|rejected): the completion is empty"):
            to_records(row, "x")


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({}, "no known shape: found []"),
        ({"text": "a"}, "no known shape: found ['text']"),
        ({"prompt": "q", "label": True}, "no known shape: found ['prompt', 'label']"),
        ({"prompt": "q", "chosen": "a"}, "no known shape: found ['prompt', 'chosen']"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "rejected: expected a value, found null\n  remedy: give it a value"),
        ({"prompt": None, "completion": "a", "label": None}, "prompt: expected a value, found null"),
        ({"prompt": None, "chosen": None, "rejected": None, "messages": None, "label": None}, "of which ['prompt', 'chosen', 'rejected', 'messages', 'label'] null"),
        ({"text": "a"}, "the simplest shape is prompt, completion, label; the source's columns can say how a table calls them; docs/data.md lists all shapes"),
        ({"instruction": True, "output": "a", "label": True}, "instruction: expected text, found true"),
        ({"\x1b[2J": 1}, "['\\x1b[2J']"),
        ({"prompt": "q", "completion": "a", "label": True, "chosen": "a", "rejected": "b"}, "more than one shape"),
        ({"prompt": "q", "completion": "a", "label": True, "messages": ASK + GOOD}, "more than one shape"),
        ({"prompt": "", "completion": "a", "label": True}, "prompt: the prompt is empty, found ''"),
        ({"prompt": " \n", "completion": "a", "label": True}, "prompt: the prompt is empty, found ' \\n'"),
        ({"prompt": [], "completion": GOOD, "label": True}, "prompt: the prompt is empty, found []"),
        ({"prompt": [user("")], "completion": GOOD, "label": True}, "prompt: the prompt is empty"),
        ({"messages": GOOD, "label": True}, "messages: the prompt is empty"),
        ({"messages": [], "label": True}, "messages: the prompt is empty"),
        ({"prompt": 3, "completion": "a", "label": True}, "prompt: expected text or a list of messages, found 3"),
        ({"prompt": "q", "completion": {"a": 1}, "label": True}, "completion: expected text or a list of messages, found {'a': 1}"),
        ({"prompt": "q", "completion": "\x1b" * 500 + "a", "label": 1}, "label: expected true or false, found 1"),
        ({"prompt": "q", "completion": True, "label": True}, "completion: expected text or a list of messages, found True"),
        ({"messages": "q", "label": True}, "messages: expected a list of messages, found 'q'"),
        ({"prompt": "q", "completion": GOOD, "label": True}, "prompt and completion: expected both as text or both as messages, found prompt 'q'"),
        ({"prompt": ASK, "completion": "a", "label": True}, "prompt and completion: expected both"),
        ({"prompt": ASK, "chosen": "a", "rejected": "b"}, "prompt and chosen: expected both"),
        ({"prompt": "q", "chosen": "a", "rejected": BAD}, "chosen and rejected: expected both"),
        ({"prompt": ["q"], "completion": GOOD, "label": True}, "prompt[0]: expected a message with role and content, found 'q'"),
        ({"messages": [user("q"), {"role": "assistant"}], "label": True}, "messages[1]: expected content to be text"),
        ({"messages": [user("q"), {"role": "assistant", "content": None}], "label": True}, "messages[1]: expected content to be text"),
        ({"messages": [user("q"), {"role": "assistant", "content": [{"text": "a"}]}], "label": True}, "messages[1]: expected content to be text"),
        ({"messages": [{"speaker": "human", "text": "q"}], "label": True}, "messages[0]: expected role to be text, found {'speaker': 'human', 'text': 'q'}"),
        ({"messages": [user("q"), assistant("a"), user("\x1b")], "label": True}, "messages: expected an assistant turn as the completion, found {'role'"),
        ({"prompt": ASK, "completion": GOOD + [user("r")] + GOOD, "label": True}, "completion: expected an assistant turn"),
        ({"prompt": [user("other")], "chosen": ASK + GOOD, "rejected": ASK + BAD}, "chosen: expected an assistant turn"),
        ({"chosen": LONG[:2] + GOOD + [user("r")] + GOOD, "rejected": LONG[:2] + BAD}, "chosen: expected an assistant turn"),
        ({"prompt": "other", "chosen": ASK + GOOD, "rejected": ASK + BAD}, "prompt: not a message that both chosen and rejected start with, found 'other'"),
        ({"prompt": "q", "chosen": GOOD, "rejected": BAD}, "chosen and rejected: without a prompt of the same kind"),
        ({"chosen": "a", "rejected": "b"}, "they must start alike and then differ, found 'a' and 'b'"),
        ({"chosen": " a", "rejected": " b"}, "they must start alike and then differ"),
        ({"chosen": "same", "rejected": "same"}, "chosen and rejected are the same"),
        ({"chosen": "same", "rejected": "same and more"}, "they must start alike and then differ"),
        ({"chosen": ASK + GOOD, "rejected": ASK + GOOD}, "chosen and rejected are the same"),
        ({"chosen": [], "rejected": []}, "chosen and rejected are the same"),
        ({"chosen": "q ", "rejected": "q b"}, "chosen: the completion is empty, found ' '"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same, found 'a'"),
        ({"prompt": ASK, "chosen": ASK + GOOD, "rejected": GOOD}, "chosen and rejected are the same"),
        ({"prompt": "q", "chosen": ASK + GOOD, "rejected": ASK + GOOD}, "chosen and rejected are the same"),
        ({"prompt": "q", "output_A": "a", "output_B": "a", "label": True}, "output_A and output_B are the same"),
        ({"prompt": "q", "output_A": "a", "output_B": "", "label": True}, "output_B: the completion is empty"),
        ({"prompt": "q", "output_A": "a", "output_B": BAD, "label": True}, "prompt and output_B: expected both"),
        # shapes
        ({"prompt": "q", "output": "a", "output_A": "a", "output_B": "b", "label": True}, "more than one shape: prompt, output, label; prompt, output_A"),
        ({"instruction": "q", "output": "a", "prompt": "q", "label": True}, "more than one shape"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "label": True, "completion": "a"}, "more than one shape"),
        ({"prompt": "q", "completion": "a", "label": True, "kto_tag": True}, "label and kto_tag: names of one field"),
        ({"messages": ASK + GOOD, "conversations": ASK + GOOD, "label": True}, "messages and conversations: names of one field"),
        ({"messages": ASK, "chosen": "good", "rejected": "bad"}, "messages and chosen: expected both"),
        # messages
        ({"messages": [{"role": "bot", "content": "q"}, *GOOD], "label": True}, "messages[0]: unknown role 'bot'"),
        ({"messages": [{"role": 3, "content": "q"}, *GOOD], "label": True}, "messages[0]: expected role to be text"),
        ({"conversations": [said("bot", "q"), *GOOD], "label": True}, "conversations[0]: unknown from 'bot'"),
        ({"conversations": [said(["gpt"], "q"), *GOOD], "label": True}, "conversations[0]: unknown from ['gpt']"),
        ({"conversations": [said("human", 3), *GOOD], "label": True}, "conversations[0]: expected value to be text, found 3"),
        ({"messages": [user([{"type": "image", "url": "x"}]), *GOOD], "label": True}, "remedy: text only"),
        ({"messages": [user(["q"]), *GOOD], "label": True}, "messages[0]: expected content to be text or a list of text parts, found 'q'"),
        ({"messages": [*ASK, {**assistant("a"), "tool_calls": "f()"}], "label": True}, "messages[1]: expected tool_calls to be a list of objects, found 'f()'"),
        ({"messages": [{**user("q"), "tool_calls": [call("f", {})]}, *GOOD], "label": True}, "messages[0]: tool_calls in a message of role user"),
        ({"messages": [*ASK, {"role": "assistant", "tool_calls": []}], "label": True}, "messages[1]: expected content to be text, found None"),
        ({"messages": [*ASK, said("function_call", "f(x)")], "label": True}, "messages[1]: value: not valid JSON"),
        ({"messages": [*ASK, said("function_call", '{"name": "f"}')], "label": True}, "messages[1]: expected a function call with name and arguments"),
        ({"messages": [*ASK, said("function_call", "[]")], "label": True}, "messages[1]: a function_call without a call"),
        ({"messages": [*ASK, said("function_call", '{"name": "\\ud800", "arguments": {}}')], "label": True}, "messages[1]: value: not valid JSON"),
        ({"messages": [system("s"), *GOOD], "label": True}, "messages: the prompt is nothing but a system message"),
        ({"prompt": [{"role": "developer", "content": "s"}], "completion": GOOD, "label": True}, "prompt: the prompt is nothing but a system message"),
        ({"chosen": [system("s"), *GOOD], "rejected": [system("s"), *BAD]}, "chosen: the prompt is nothing but a system message"),
        # fields beside the messages
        ({"messages": LONG + GOOD, "label": True, "system": "s"}, "system: the messages begin with a system message already, found 's'"),
        ({"messages": ASK + GOOD, "label": True, "system": ["s"]}, "system: expected text, found ['s']"),
        ({"prompt": "q", "completion": "a", "label": True, "system": "s"}, "system: only rows of messages have it, found 's'"),
        ({"prompt": "q", "completion": "a", "label": True, "tools": [{"name": "f"}]}, "tools: only rows of messages have it"),
        ({"prompt": "q", "completion": "a", "label": True, "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs: only rows of messages have it"),
        ({"messages": ASK + GOOD, "label": True, "tools": {"name": "f"}}, "tools: expected a list of objects, found {'name': 'f'}"),
        ({"messages": ASK + GOOD, "label": True, "tools": ["f"]}, "tools: expected a list of objects, found ['f']"),
        ({"messages": ASK + GOOD, "label": True, "tools": "f(x)"}, "tools: not valid JSON: Expecting value: line 1 column 1 (char 0), found 'f(x)'"),
        ({"messages": ASK + GOOD, "label": True, "tools": '[{"x": NaN}]'}, "tools: not valid JSON: NaN"),
        ({"messages": ASK + GOOD, "label": True, "tools": '[{"x": 1, "x": 2}]'}, "tools: not valid JSON: field 'x' occurs twice"),
        ({"messages": ASK + GOOD, "label": True, "chat_template_kwargs": "{}"}, "chat_template_kwargs: expected an object, found '{}'"),
        ({"messages": ASK + GOOD, "label": True, "chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs: tokenize cannot be set by a row, found False"),
        ({"messages": ASK + GOOD, "label": True, "chat_template_kwargs": {3: False}}, "chat_template_kwargs: expected names as text, found 3"),
        # instructions
        ({"instruction": "", "output": "a", "label": True}, "instruction: empty, found ''"),
        ({"instruction": "q", "output": "", "label": True}, "output: the completion is empty"),
        ({"instruction": ["q"], "output": "a", "label": True}, "instruction: expected text, found ['q']"),
        ({"instruction": "q", "input": 3, "output": "a", "label": True}, "input: expected text, found 3"),
        ({"instruction": "q", "output": GOOD, "label": True}, "output: expected text, found [{"),
        ({"instruction": "q", "chosen": "a", "rejected": BAD}, "rejected: expected text, found [{"),
        ({"instruction": "q", "output": "a", "label": True, "history": ["a", "b"]}, "history: expected a list of [question, answer], found ['a', 'b']"),
        ({"instruction": "q", "output": "a", "label": True, "history": [["a", None]]}, "history: expected a list of [question, answer]"),
        ({"instruction": "q", "output": "a", "label": True, "history": "a"}, "history: expected a list of [question, answer], found 'a'"),
        # thumbs on single turns
        ({"messages": [*ASK, {**GOOD[0], "label": None}]}, "label: expected true or false, the field is missing, and no assistant turn of messages has a label"),
        ({"messages": [*ASK, {**GOOD[0], "label": True}], "label": True}, "label: the row has a label and messages[1] one of its own, found True and True"),
        ({"messages": [{**ASK[0], "label": True}, *GOOD]}, "messages[0]: only assistant turns can have a label, found True"),
        ({"messages": [*ASK, {**GOOD[0], "label": 1}]}, "messages[1].label: expected true or false, found 1"),
        ({"messages": LONG + GOOD, "label": [True]}, "label: expected true or false, found [True]; entries: 1, assistant turns: 2"),
        ({"messages": LONG + GOOD, "label": [None, None]}, "label: no turn is rated, found [None, None]"),
        ({"messages": LONG + GOOD, "label": [None, "up"]}, "label: expected true or false, found 'up'"),
        ({"messages": [{**GOOD[0], "label": True}, *ASK]}, "messages: the prompt is empty"),
        ({"messages": [*ASK, {**assistant(" "), "label": True}]}, "messages[1]: the completion is empty"),
    ],
)
def test_bad_rows_are_refused(row, what):
    with pytest.raises(UserError) as caught:
        to_records(row, "rows.jsonl:7")
    assert caught.value.where == "rows.jsonl:7"
    assert what in str(caught.value)
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 600
    assert str(caught.value).count("\n  remedy: ") == 1


def nested(depth):
    value = "x"
    for _ in range(depth):
        value = {"a": [value]}
    return value


NASTY = [
    None, 3, float("nan"), "", "x", b"x", datetime.datetime(2024, 1, 1), decimal.Decimal("NaN"), np.array([1, 2]), np.array([[True], [False]]), np.float64(1), np.str_("x"),
    [], [None], [[]], {}, {None: 1}, {1: {2: 3}}, {"role": "user"}, {"role": np.array(["user", "tool"])}, [{"from": b"gpt", "value": 1}], [("role", "user")],
    [{"role": "assistant", "content": "a", "tool_calls": np.array([1, 2])}], [{"role": "assistant", "content": "a", "label": np.array([1, 2])}], nested(100), nested(900),
    [{"role": "user", "content": "q", "extra": nested(900)}], [{"role": "user", "content": "q", "extra": np.array([{}, None])}, {"role": "assistant", "content": "a"}],
]  # fmt: skip


def test_whatever_the_cells_hold_there_are_records_or_one_kind_of_error():
    shapes = (
        {"prompt": ASK, "completion": GOOD, "label": True}, {"messages": ASK + GOOD, "label": True}, {"prompt": "q", "chosen": ASK + GOOD, "rejected": ASK + BAD},
        {"chosen": ASK + GOOD, "rejected": ASK + BAD}, {"conversations": ASK, "chosen": GOOD[0], "rejected": BAD[0]}, {"prompt": ASK, "output": GOOD, "label": True},
        {"instruction": "q", "input": "", "output": "a", "history": [], "kto_tag": True}, {"instruction": "q", "chosen": "a", "rejected": "b"},
        {"prompt": ASK, "output_A": GOOD, "output_B": BAD, "label": True},
    )  # fmt: skip
    ended = {"records": 0, "errors": 0}
    for shape in shapes:
        for field in (*shape, "system", "tools", "chat_template_kwargs", 3):
            for value in NASTY:
                for rules in (RowRules(), RowRules(label_map={"1": True})):
                    row = {**shape, field: value}
                    unused_fields(row, rules)
                    try:
                        assert to_records(row, "x", rules)
                        ended["records"] += 1
                    except UserError as error:
                        assert error.where == "x" and error.remedy and len(str(error)) < 700
                        ended["errors"] += 1
    assert min(ended.values()) > 100


@pytest.mark.skipif(not SHARED_ROWS.exists(), reason="the shared rows are not here")
def test_real_rows_are_read():
    rows = json.loads((SHARED_ROWS / "kto_en_demo.json").read_text())
    records = [record for row in rows for record in to_records(row, "x")]
    assert [record.desirable for record in records] == [row["label"] for row in rows]
    assert all(record.prompt + record.completion == row["messages"] for record, row in zip(records, rows))

    rows = json.loads((SHARED_ROWS / "dpo_en_demo.json").read_text())
    records = [to_records(row, "x") for row in rows]
    assert all([record.desirable for record in pair] == [True, False] for pair in records)
    assert all(pair[0].completion == [assistant(row["chosen"]["value"])] for pair, row in zip(records, rows))


# rows of no known shape


@pytest.mark.parametrize(
    ("row", "columns", "proposed"),
    [
        ({"question": "q", "answer": "a", "thumb": True}, {}, {"prompt": "question", "completion": "answer", "label": "thumb"}),
        ({"question": "q", "answer": "a", "thumb": True}, {"prompt": "question"}, {"prompt": "question", "completion": "answer", "label": "thumb"}),
        ({"Question": "q", "Response": "a", "Score": True, "id": 3, 4: 5}, {}, {"prompt": "Question", "completion": "Response", "label": "Score"}),
        ({"prompt": "q", "text": "a", "kto_tag": True}, {}, {"completion": "text"}),
        ({"prompt": "q", "text": "a", "up": True}, {"kto_tag": "up"}, {"kto_tag": "up", "completion": "text"}),
        ({"instruction": "q", "response": "a", "label": True}, {}, {"output": "response"}),
        ({"instruction": "q", "input": "", "response": "a", "feedback": True}, {}, {"output": "response", "label": "feedback"}),
        ({"input": "q", "output": "a", "is_good": True}, {}, {"prompt": "input", "label": "is_good"}),
        ({"question": None, "query": "q", "completion": "a", "label": True}, {}, {"prompt": "query"}),
        ({"question": "q", "completion": "a", "label": True}, {"prompt": "query"}, {"prompt": "question"}),
        ({"prompt": "q", "completion": "a", "label": True}, {"prompt": "query"}, {"prompt": "prompt"}),
        ({"prompt": "q", "preferred": "a", "dispreferred": "b"}, {}, {"chosen": "preferred", "rejected": "dispreferred"}),
        ({"user": "q", "reply": "a", "rating": True}, {}, {"prompt": "user", "completion": "reply", "label": "rating"}),
        ({"dialogue": ASK + GOOD, "rating": True}, {}, {"messages": "dialogue", "label": "rating"}),
        ({"prompt": "q", "completion": "a", "rating": True}, {}, {"label": "rating"}),
        ({"question": "q", "completion": "a", "rating": True}, {"prompt": "question", "kto_tag": "up"}, {"prompt": "question", "label": "rating"}),
    ],
)
def test_the_columns_that_a_row_needs_can_be_pasted(row, columns, proposed):
    with pytest.raises(UserError) as caught:
        to_records(row, "x", RowRules(columns=columns))
    assert pasted(caught.value.remedy, "set columns") == proposed
    assert to_records(row, "x", RowRules(columns=SourceConfig(path="x", columns=proposed).columns))


def test_what_cannot_be_guessed_is_asked_for():
    with pytest.raises(UserError) as caught:
        to_records({"asked": "q", "reply": "a", "rating": True}, "x", RowRules())
    assert "set columns: {completion: reply, label: rating} on the source, and say there which column is prompt;" in caught.value.remedy


@pytest.mark.parametrize(
    ("row", "columns", "nearest"),
    [
        ({"prompt": "q", "chosen": "a"}, {}, "prompt, chosen, rejected, of which the row has prompt, chosen and lacks rejected"),
        ({"chosen": "a"}, {}, "chosen, rejected, of which the row has chosen and lacks rejected"),
        ({"question": "q", "up": True}, {"prompt": "question", "label": "up"}, "prompt, completion, label, of which the row has prompt (column 'question'), label (column 'up') and lacks completion"),
        ({"question": "q", "reply": "a"}, {}, "prompt, completion, label, of which the row has none"),
        ({"prompt": "q", "kto_tag": True, "thread": 1}, {}, "prompt, completion, label, of which the row has prompt, kto_tag and lacks completion; or prompt, output, label"),
    ],
)  # fmt: skip
def test_the_shape_that_lacks_least_is_named(row, columns, nearest):
    with pytest.raises(UserError, match="fields of no known shape: found") as caught:
        to_records(row, "x", RowRules(columns=columns))
    assert f"; nearest: {nearest}" in caught.value.what
    assert caught.value.remedy.endswith("; docs/data.md lists all shapes")


def test_columns_that_yaml_would_read_otherwise_are_left_to_the_user():
    with pytest.raises(UserError, match="remedy: add to the source's columns: {completion: answer}; docs"):
        to_records({"a: b": "q", "answer": "a", "label": True}, "x", RowRules(columns={"prompt": "a: b"}))


def test_columns_do_not_reach_into_turns():
    row = {"messages": [*ASK, {**GOOD[0], "rating": True}]}
    with pytest.raises(UserError, match="columns does not reach into turns: there the label is called label"):
        to_records(row, "x", RowRules(columns={"label": "rating"}))
    for other in ({"columns": {"label": "thumb"}}, {}):
        with pytest.raises(UserError) as caught:
            to_records(row, "x", RowRules(**other))
        assert "reach into turns" not in str(caught.value)
