import json
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kto_ds.data.records import Record, to_records
from kto_ds.data.tokenization import load_tokenizer, tokenize_records
from kto_ds.errors import UserError

SHARED = Path(__file__).parents[3] / "shared"
WORDS = ["<unk>", "<s>", "</s>", "user", "assistant", "system", ":", "ask", "more", "good", "bad"]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
)


def word_tokenizer(*, chat_template=TEMPLATE, eos_token="</s>"):
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token=eos_token)
    tokenizer.chat_template = chat_template
    return tokenizer


def merging_tokenizer():
    """Letters a and b, which join to one token."""
    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "</s>": 3}, merges=[("a", "b")]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def ids(words):
    return [WORDS.index(word) for word in words.split()]


def record(prompt, completion, where="rows.jsonl:1"):
    if isinstance(prompt, str):
        return Record(prompt=prompt, completion=completion, desirable=True, where=where)
    turns = [{"role": role, "content": content} for role, content in prompt]
    return Record(prompt=turns, completion=[{"role": "assistant", "content": completion}], desirable=True, where=where)


TEXT = record("ask more", " good")
CHAT = record([("user", "ask")], "good")
SYSTEM = record([("system", "more"), ("user", "ask")], "good", "rows.jsonl:8")


def test_plain_text_ends_with_one_eos():
    rows = tokenize_records([TEXT, record("ask", " good bad </s>")], word_tokenizer(chat_template=None), num_proc=None)
    assert rows["prompt_ids"][:] == [ids("<s> ask more"), ids("<s> ask")]
    assert rows["completion_ids"][:] == [ids("good </s>"), ids("good bad </s>")]
    assert rows["boundary_merged"][:] == [False, False]


def test_conversations_go_through_the_chat_template():
    rows = tokenize_records([record([("user", "ask"), ("assistant", "bad"), ("user", "more")], "good")], word_tokenizer(), num_proc=None)
    assert rows[0] == {
        "prompt_ids": ids("user : ask </s> assistant : bad </s> user : more </s> assistant :"),
        "completion_ids": ids("good </s>"),
        "boundary_merged": False,
    }


def test_the_columns_are_small_integers_in_memory():
    rows = tokenize_records([TEXT, CHAT], word_tokenizer(), num_proc=None)
    assert rows.features == {
        "prompt_ids": datasets.List(datasets.Value("int32")),
        "completion_ids": datasets.List(datasets.Value("int32")),
        "boundary_merged": datasets.Value("bool"),
    }
    assert rows.cache_files == []


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [("ba", "b", ([1], [2, 3], True)), ("b", "ab", ([1], [2, 3], False)), ("bb", "a</s>", ([1, 1], [0, 3], False)), ("aba", "bb", ([2], [2, 1, 3], True))],
)
def test_tokens_that_merge_over_the_boundary_go_to_the_completion(prompt, completion, expected):
    row = tokenize_records([record(prompt, completion)], merging_tokenizer(), num_proc=None)[0]
    assert (row["prompt_ids"], row["completion_ids"], row["boundary_merged"]) == expected


def test_a_template_that_ends_the_prompt_differently_moves_the_boundary():
    template = TEMPLATE.replace("assistant :{% endif %}", "assistant : more{% endif %}")
    row = tokenize_records([CHAT], word_tokenizer(chat_template=template), num_proc=None)[0]
    assert row == {"prompt_ids": ids("user : ask </s> assistant :"), "completion_ids": ids("good </s>"), "boundary_merged": True}


@pytest.mark.parametrize("num_proc", [1, 2, 3, 50])
def test_the_number_of_workers_changes_nothing(num_proc):
    records = [record("ask " * (index % 5 + 1), "good", f"x:{index}") if index % 3 else record([("user", "more " * index)], "bad") for index in range(10)]
    alone = tokenize_records(records, word_tokenizer(), num_proc=None)
    assert alone["prompt_ids"][3] == ids("user : more more more </s> assistant :")
    assert tokenize_records(records, word_tokenizer(), num_proc=num_proc).to_list() == alone.to_list()


@pytest.mark.parametrize("num_proc", [None, 2])
def test_a_template_that_refuses_a_row_is_reported_with_the_row(num_proc):
    with pytest.raises(UserError) as caught:
        tokenize_records([CHAT, TEXT, CHAT, SYSTEM], word_tokenizer(), num_proc=num_proc)
    assert caught.value.where == "rows.jsonl:8"
    assert "TemplateError: 'System role not supported'" in caught.value.what
    assert str(caught.value).count("remedy:") == 1


@pytest.mark.parametrize("template", ["{{ messages[0]['content'] + 1 }}", "{{ messages[0].nothing.at_all }}", "{% for %}", {"rag": TEMPLATE}])
def test_a_broken_template_is_reported_with_the_row(template):
    with pytest.raises(UserError, match="^rows.jsonl:1: the chat template refuses the row: "):
        tokenize_records([CHAT], word_tokenizer(chat_template=template), num_proc=None)


@pytest.mark.parametrize(
    ("bad", "tokenizer", "what"),
    [
        (CHAT, word_tokenizer(chat_template="{{ messages[0]['content'] }}"), "no token of the completion is left after the prompt"),
        (CHAT, word_tokenizer(chat_template="{{ messages[-1]['content'] }}"), "no token of the prompt is left before the completion"),
        (record("a", "b"), merging_tokenizer(), "no token of the prompt is left before the completion"),
    ],
)
def test_a_row_without_a_prompt_or_completion_token_is_refused(bad, tokenizer, what):
    with pytest.raises(UserError, match=f"^rows.jsonl:1: {what}"):
        tokenize_records([bad], tokenizer, num_proc=None)


def test_a_missing_chat_template_is_found_before_any_work():
    tokenizer = word_tokenizer(chat_template=None)
    tokenizer.name_or_path = "models/tiny"
    with pytest.raises(UserError, match="^rows.jsonl:8: .*the tokenizer 'models/tiny' has none\n  remedy: add a chat_template.jinja"):
        tokenize_records([TEXT, SYSTEM, CHAT], tokenizer, num_proc=None)


def test_a_tokenizer_without_eos_is_refused():
    with pytest.raises(UserError, match="^model.path: .*no eos_token"):
        tokenize_records([TEXT], word_tokenizer(eos_token=None), num_proc=None)


def test_a_saved_tokenizer_is_loaded(tmp_path):
    word_tokenizer().save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), revision=None, trust_remote_code=False)
    assert tokenize_records([CHAT, TEXT], loaded, num_proc=None).to_list() == tokenize_records([CHAT, TEXT], word_tokenizer(), num_proc=None).to_list()


@pytest.mark.parametrize("damage", [None, "{", '{"a": 1}', "\x00"])
def test_a_folder_without_a_usable_tokenizer_is_refused(tmp_path, damage):
    if damage:
        word_tokenizer().save_pretrained(tmp_path)
        (tmp_path / "tokenizer.json").write_text(damage)
    with pytest.raises(UserError, match="^model.path: cannot load the tokenizer '"):
        load_tokenizer(str(tmp_path), revision=None, trust_remote_code=False)


def test_a_missing_folder_is_refused():
    with pytest.raises(UserError, match="cannot load the tokenizer '/missing/model'"):
        load_tokenizer("/missing/model", revision=None, trust_remote_code=False)


@pytest.mark.skipif(not (SHARED / "golden" / "kto.json").exists(), reason="the shared golden file is not here")
@pytest.mark.parametrize("num_proc", [None, 2])
def test_the_ids_are_those_of_trl(num_proc):
    golden = json.loads((SHARED / "golden" / "kto.json").read_text())
    rows = json.loads((SHARED / "data" / "kto_en_demo.json").read_text())[:120]
    tokenizer = load_tokenizer(str(SHARED / "golden" / "tokenizer"), revision=None, trust_remote_code=False)
    records = [record for index, row in enumerate(rows) for record in to_records(row, f"row {index}")]
    tokenized = tokenize_records(records, tokenizer, num_proc=num_proc).to_list()
    kept = [(row, record) for row, record in zip(tokenized, records) if len(row["prompt_ids"]) < golden["max_length"]]
    assert len(kept) == golden["rows_kept"]
    for (row, record), example in zip(kept, golden["examples"]):
        assert (row["prompt_ids"], row["completion_ids"], record.desirable) == (example["prompt_ids"], example["completion_ids"], example["label"])
