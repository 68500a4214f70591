import json
from pathlib import Path

import pytest

from kto_ds.data.records import Record, to_records
from kto_ds.errors import UserError

DEMO_ROWS = Path(__file__).parents[3] / "shared" / "data" / "kto_en_demo.json"


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


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
    ],
)
def test_rows_of_every_shape_become_records(row, expected):
    before = json.dumps(row)
    records = to_records(row, "rows.jsonl:7")
    assert records == [Record(prompt=p, completion=c, desirable=d, where="rows.jsonl:7") for p, c, d in expected]
    assert json.dumps(row) == before


def test_what_a_template_may_read_is_kept_and_null_is_not():
    messages = [{"role": "user", "content": "q", "name": "ann", "tool_calls": None}, {**assistant("a"), "reasoning_content": "hm"}]
    record = to_records({"messages": messages, "label": True}, "x")[0]
    assert record.prompt == [{"role": "user", "content": "q", "name": "ann"}]
    assert record.completion == [{"role": "assistant", "content": "a", "reasoning_content": "hm"}]


@pytest.mark.parametrize("label", [1, 0, -1, 0.5, float("nan"), "yes", "true", "", None, [True], {"a": 1}])
@pytest.mark.parametrize("fields", [{"prompt": "q", "completion": "a"}, {"messages": ASK + GOOD}])
def test_only_true_and_false_are_labels(fields, label):
    with pytest.raises(UserError) as caught:
        to_records({**fields, "label": label}, "rows.jsonl:7")
    assert str(caught.value).startswith(f"rows.jsonl:7: label: expected true or false, found {label!r}")


@pytest.mark.parametrize("fields", [{"prompt": "q", "completion": "a"}, {"messages": ASK + GOOD}])
def test_a_missing_label_is_named(fields):
    with pytest.raises(UserError, match="label: expected true or false, the field is missing"):
        to_records(fields, "x")


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
        ({"prompt": "q", "chosen": "a", "rejected": None}, "found ['prompt', 'chosen', 'rejected'], of which ['rejected'] null"),
        ({"conversations": [], "kto_tag": True}, "give prompt, completion and label; or chosen and rejected"),
        ({"\x1b[2J": 1}, "['\\x1b[2J']"),
        ({"prompt": "q", "completion": "a", "label": True, "chosen": "a", "rejected": "b"}, "more than one shape"),
        ({"prompt": "q", "completion": "a", "label": True, "messages": ASK + GOOD}, "more than one shape"),
        ({"prompt": "", "completion": "a", "label": True}, "prompt: empty, found ''"),
        ({"prompt": " \n", "completion": "a", "label": True}, "prompt: empty, found ' \\n'"),
        ({"prompt": [], "completion": GOOD, "label": True}, "prompt: empty, found []"),
        ({"prompt": [user("")], "completion": GOOD, "label": True}, "prompt: empty"),
        ({"messages": GOOD, "label": True}, "prompt: empty"),
        ({"messages": [], "label": True}, "prompt: empty"),
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
        ({"messages": [{"from": "human", "value": "q"}], "label": True}, "messages[0]: expected role to be text, found {'from': 'human', 'value': 'q'}"),
        ({"messages": [user("q"), assistant("a"), user("\x1b")], "label": True}, "messages: expected an assistant turn as the completion, found {'role'"),
        ({"prompt": ASK, "completion": GOOD + [user("r")] + GOOD, "label": True}, "completion: expected an assistant turn"),
        ({"prompt": [user("other")], "chosen": ASK + GOOD, "rejected": ASK + BAD}, "chosen: expected an assistant turn"),
        ({"chosen": LONG[:2] + GOOD + [user("r")] + GOOD, "rejected": LONG[:2] + BAD}, "chosen: expected an assistant turn"),
        ({"prompt": "other", "chosen": ASK + GOOD, "rejected": ASK + BAD}, "prompt: not a message that both chosen and rejected start with, found 'other'"),
        ({"prompt": "q", "chosen": GOOD, "rejected": BAD}, "chosen and rejected: without a prompt of the same kind"),
        ({"chosen": "a", "rejected": "b"}, "they must start alike and then differ, found 'a' and 'b'"),
        ({"chosen": " a", "rejected": " b"}, "they must start alike and then differ"),
        ({"chosen": "same", "rejected": "same"}, "they must start alike and then differ"),
        ({"chosen": "same", "rejected": "same and more"}, "they must start alike and then differ"),
        ({"chosen": ASK + GOOD, "rejected": ASK + GOOD}, "they must start alike and then differ"),
        ({"chosen": [], "rejected": []}, "they must start alike and then differ"),
        ({"chosen": "q ", "rejected": "q b"}, "chosen: the completion is empty, found ' '"),
    ],
)
def test_bad_rows_are_refused(row, what):
    with pytest.raises(UserError) as caught:
        to_records(row, "rows.jsonl:7")
    assert caught.value.where == "rows.jsonl:7"
    assert what in str(caught.value)
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.skipif(not DEMO_ROWS.exists(), reason="the shared rows are not here")
def test_real_rows_are_read():
    rows = json.loads(DEMO_ROWS.read_text())
    records = [record for row in rows for record in to_records(row, "x")]
    assert [record.desirable for record in records] == [row["label"] for row in rows]
    assert all(record.prompt + record.completion == row["messages"] for record, row in zip(records, rows))
