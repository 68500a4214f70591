import json
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kto_ds.data import tokenization
from kto_ds.data.tokenization import RowTokenizer, TextRules, load_tokenizer
from kto_ds.errors import UserError
from kto_ds.rows.records import Record, to_records

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


def tokenize(records, tokenizer, **rules):
    """Return (prompt ids, completion ids, boundary merged) of every record as plain values, and errors as they are."""
    found = RowTokenizer(tokenizer, TextRules(**rules)).tokenize(records)
    return [row if isinstance(row, UserError) else (row.prompt_ids.tolist(), row.completion_ids.tolist(), row.boundary_merged) for row in found]


TEXT = record("ask more", " good")
CHAT = record([("user", "ask")], "good")
SYSTEM = record([("system", "more"), ("user", "ask")], "good", "rows.jsonl:8")


def test_plain_text_ends_with_one_eos():
    rows = tokenize([TEXT, record("ask", " good bad </s>")], word_tokenizer(chat_template=None))
    assert rows == [(ids("<s> ask more"), ids("good </s>"), False), (ids("<s> ask"), ids("good bad </s>"), False)]


def test_without_append_eos_plain_text_ends_as_it_does():
    rows = tokenize([TEXT, record("ask", " good bad </s>")], word_tokenizer(chat_template=None), append_eos=False)
    assert [completion for _, completion, _ in rows] == [ids("good"), ids("good bad </s>")]


def test_conversations_go_through_the_chat_template():
    rows = tokenize([record([("user", "ask"), ("assistant", "bad"), ("user", "more")], "good")], word_tokenizer())
    assert rows == [(ids("user : ask </s> assistant : bad </s> user : more </s> assistant :"), ids("good </s>"), False)]


def test_tools_and_template_arguments_reach_the_template():
    template = "{% if tools %}{{ tools[0].name }} {% endif %}{{ mood }} " + TEMPLATE
    tools = [{"name": "ask", "parameters": {}}]
    rows = [
        Record(CHAT.prompt, CHAT.completion, True, "x", tools=tools, template_kwargs={"mood": "bad"}),
        Record(CHAT.prompt, CHAT.completion, True, "x", tools=tools),
        CHAT,
    ]
    found = tokenize(rows, word_tokenizer(chat_template=template), chat_template_kwargs={"mood": "more"})
    turn = "user : ask </s> assistant :"
    assert [prompt for prompt, _, _ in found] == [ids(f"ask bad {turn}"), ids(f"ask more {turn}"), ids(f"more {turn}")]


def test_ids_are_small_integers():
    row = RowTokenizer(word_tokenizer()).tokenize([CHAT])[0]
    assert row.prompt_ids.dtype == row.completion_ids.dtype == np.int32


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [("ba", "b", ([1], [2, 3], True)), ("b", "ab", ([1], [2, 3], False)), ("bb", "a</s>", ([1, 1], [0, 3], False)), ("aba", "bb", ([2], [2, 1, 3], True))],
)
def test_tokens_that_merge_over_the_boundary_go_to_the_completion(prompt, completion, expected):
    assert tokenize([record(prompt, completion)], merging_tokenizer()) == [expected]


def test_a_template_that_ends_the_prompt_differently_moves_the_boundary():
    template = TEMPLATE.replace("assistant :{% endif %}", "assistant : more{% endif %}")
    assert tokenize([CHAT], word_tokenizer(chat_template=template)) == [(ids("user : ask </s> assistant :"), ids("good </s>"), True)]


def test_the_backend_gives_what_the_tokenizer_gives():
    rng = np.random.default_rng(0)
    tokenizer = word_tokenizer()
    texts = [" ".join(rng.choice(WORDS + ["", "other", "</s>"], size=20)) for _ in range(50)]
    encode = tokenization._encoder(tokenizer)
    assert encode.__name__ == "through_backend"
    for special in (True, False):
        assert encode(texts, special) == [tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts]


def test_a_tokenizer_that_does_more_than_its_backend_is_asked_itself():
    class Appending(PreTrainedTokenizerFast):
        def __call__(self, texts, **options):
            return {"input_ids": [row + [1] for row in super().__call__(texts, **options)["input_ids"]]}

    tokenizer = Appending(tokenizer_object=word_tokenizer().backend_tokenizer, unk_token="<unk>", eos_token="</s>")
    encode = tokenization._encoder(tokenizer)
    assert encode.__name__ == "through_tokenizer"
    assert encode(["ask"], True) == [[*ids("<s> ask"), 1]]
    assert encode([], True) == []


SENTENCES = ["What is the capital of France?", "Paris.", " déjà vu 漢字 🙂 ", "two\n\nlines ", "<|im_end|>", "<|im_", "start|>x", "<b>", "a<b>c ", ""]
SPECIAL = ["<unk>", "</s>", "<|im_start|>", "<|im_end|>", "<b>"]
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN_TURNS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


def trained_tokenizer(kind):
    """The ways in which the common families of models cut text before their merges."""
    trainer = trainers.UnigramTrainer if kind == "unigram" else trainers.BpeTrainer
    backend = Tokenizer(models.Unigram() if kind == "unigram" else models.BPE(unk_token="<unk>", byte_fallback=kind == "llama"))
    if kind == "byte level":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif kind == "prefix space":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif kind == "llama":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if kind == "metaspace first" else "always")
    options = {"unk_token": "<unk>"} if kind == "unigram" else {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    backend.train_from_iterator(SENTENCES[:4] * 3, trainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False, **options))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", additional_special_tokens=SPECIAL[2:])


@pytest.mark.parametrize("template", [CHATML, PLAIN_TURNS])
@pytest.mark.parametrize("kind", ["byte level", "prefix space", "llama", "metaspace first", "metaspace always", "unigram"])
def test_ids_of_a_prompt_taken_from_the_whole_are_its_own(kind, template):
    tokenizer = trained_tokenizer(kind)
    tokenizer.chat_template = template
    rng = np.random.default_rng(0)

    def text():
        return "".join(rng.choice(SENTENCES, size=rng.integers(1, 4)))

    rows = [record([("user", text()), ("assistant", text()), ("user", text())], text() or "x") for _ in range(200)]
    row_tokenizer = RowTokenizer(tokenizer)
    found = tokenize(rows, tokenizer)
    for row, (prompt_ids, completion_ids, merged) in zip(rows, found):
        alone = tokenizer.apply_chat_template(row.prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
        whole = tokenizer.apply_chat_template(row.prompt + row.completion, tokenize=True, return_dict=False)
        boundary = next((place for place, (one, other) in enumerate(zip(alone, whole)) if one != other), min(len(alone), len(whole)))
        assert (prompt_ids, completion_ids, merged) == (whole[:boundary], whole[boundary:], boundary < len(alone))
    if template is CHATML:  # the short way is the one that was taken
        prompt = tokenizer.apply_chat_template(CHAT.prompt, add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(CHAT.prompt + CHAT.completion, tokenize=False)
        place, index = row_tokenizer._last_cut(CHAT, prompt, whole, np.array(tokenizer(whole, add_special_tokens=False)["input_ids"]))
        assert prompt[place:] == "<|im_start|>assistant\n" and index > 2


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([record("ask </s>", " good")], [True]),
        ([record("ask", " good </s>")], [False]),  # an end of text that ends the completion is meant
        ([record("ask", " <unk> good </s>")], [True]),
        ([record([("user", "ask <unk> x")], "good")], [True]),
        ([Record(CHAT.prompt, [{"role": "assistant", "content": "good", "reasoning_content": "x </s>"}], True, "x")], [True]),
        ([Record(CHAT.prompt, CHAT.completion, True, "x", tools=[{"name": "f", "parameters": {"</s>": []}}])], [True]),
        ([CHAT], [False]),
    ],
)
def test_special_tokens_in_the_text_are_noticed(rows, expected):
    found = RowTokenizer(word_tokenizer()).tokenize(rows)
    assert [row.has_special_text for row in found] == expected
    strict = RowTokenizer(word_tokenizer(), TextRules(special_tokens_in_text="error")).tokenize(rows)
    assert [isinstance(row, UserError) and "spells the special token" in row.what for row in strict] == expected


def test_a_template_that_refuses_a_row_is_reported_with_the_row():
    found = tokenize([CHAT, TEXT, SYSTEM], word_tokenizer())
    assert [isinstance(row, UserError) for row in found] == [False, False, True]
    assert found[2].where == "rows.jsonl:8"
    assert "TemplateError: 'System role not supported'" in found[2].what
    assert str(found[2]).count("remedy:") == 1


@pytest.mark.parametrize("template", ["{{ messages[0]['content'] + 1 }}", "{{ messages[0].nothing.at_all }}", "{% for %}", {"rag": TEMPLATE}])
def test_a_broken_template_is_reported_with_the_row(template):
    (error,) = tokenize([CHAT], word_tokenizer(chat_template=template))
    assert str(error).startswith("rows.jsonl:1: the chat template refuses the row: ")


def test_a_template_that_writes_the_prompt_anew_when_it_is_answered_is_refused():
    # As some do that put the system's text before the last turn when that is the user's.
    template = (
        "{% for m in messages %}{% if m['role'] != 'system' %}{% if loop.last and messages[0]['role'] == 'system' and m['role'] == 'user' %}{{ messages[0]['content'] }} {% endif %}"
        "{{ m['role'] }} : {{ m['content'] }} </s> {% endif %}{% endfor %}"
    )
    found = tokenize([SYSTEM, CHAT], word_tokenizer(chat_template=template))
    assert isinstance(found[0], UserError) and "it renders the prompt in another way once an answer follows" in found[0].what
    assert found[1] == (ids("user : ask </s>"), ids("assistant : good </s>"), False)


@pytest.mark.parametrize(("kwargs", "is_refused"), [({}, True), ({"date_string": "26 Jul 2024"}, False)])
def test_a_template_that_reads_the_clock_needs_a_date(kwargs, is_refused):
    template = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }} " + TEMPLATE
    if is_refused:
        with pytest.raises(UserError, match="^data.chat_template_kwargs: the chat template .* writes the date of today"):
            tokenize([CHAT], word_tokenizer(chat_template=template), chat_template_kwargs=kwargs)
    else:
        assert tokenize([CHAT], word_tokenizer(chat_template=template), chat_template_kwargs=kwargs)[0][1] == ids("good </s>")


def test_an_end_that_the_tokenizer_gives_every_text_is_no_merge():
    tokenizer = word_tokenizer(chat_template=None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    assert tokenize([TEXT], tokenizer) == [(ids("<s> ask more"), ids("good </s>"), False)]


def test_a_template_without_end_is_stopped(monkeypatch):
    monkeypatch.setattr(tokenization, "MAX_TEMPLATE_SECONDS", 0.2)
    template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    begin = time.monotonic()
    (error,) = tokenize([CHAT], word_tokenizer(chat_template=template))
    assert "TimeoutError: 'it took more than 0.2 seconds'" in error.what
    assert time.monotonic() - begin < 5


def test_a_template_that_writes_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(tokenization, "MAX_RENDERED_CHARACTERS", 1000)
    (error,) = tokenize([CHAT], word_tokenizer(chat_template="{{ 'ask ' * 5000 }}"))
    assert "it makes 20000 characters of one row, more than 1000" in error.what


@pytest.mark.parametrize(
    ("bad", "tokenizer", "what"),
    [
        (CHAT, word_tokenizer(chat_template="{{ messages[0]['content'] }}"), "no token of the completion is left after the prompt"),
        (CHAT, word_tokenizer(chat_template="{{ messages[-1]['content'] }}"), "the chat template refuses the row: ValueError: 'it renders the prompt in another way"),
        (record("a", "b"), merging_tokenizer(), "no token of the prompt is left before the completion"),
    ],
)
def test_a_row_without_a_prompt_or_completion_token_is_refused(bad, tokenizer, what):
    (error,) = tokenize([bad], tokenizer)
    assert str(error).startswith(f"rows.jsonl:1: {what}")


def test_a_missing_chat_template_is_reported_with_the_row():
    tokenizer = word_tokenizer(chat_template=None)
    tokenizer.name_or_path = "models/tiny"
    error = tokenize([TEXT, SYSTEM], tokenizer)[1]
    assert str(error).startswith("rows.jsonl:8: a row of messages needs a chat template, and the tokenizer 'models/tiny' has none\n  remedy: add a chat_template.jinja")


def test_a_saved_tokenizer_is_loaded(tmp_path):
    word_tokenizer().save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), revision=None, trust_remote_code=False)
    assert tokenize([CHAT, TEXT], loaded) == tokenize([CHAT, TEXT], word_tokenizer())


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    word_tokenizer(eos_token=None).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="^model.path: .*no eos_token"):
        load_tokenizer(str(tmp_path), revision=None, trust_remote_code=False)


@pytest.mark.parametrize("damage", [None, "{", '{"a": 1}', "\x00"])
def test_a_folder_without_a_usable_tokenizer_is_refused(tmp_path, damage):
    if damage:
        word_tokenizer().save_pretrained(tmp_path)
        (tmp_path / "tokenizer.json").write_text(damage)
    with pytest.raises(UserError, match="^model.path: cannot load the tokenizer '"):
        load_tokenizer(str(tmp_path), revision=None, trust_remote_code=False)


def test_a_missing_folder_is_refused():
    with pytest.raises(UserError, match="^model.path: cannot load the tokenizer '/missing/model': no such folder"):
        load_tokenizer("/missing/model", revision=None, trust_remote_code=False)


@pytest.mark.skipif(not (SHARED / "golden" / "kto.json").exists(), reason="the shared golden file is not here")
def test_the_ids_are_those_of_trl():
    golden = json.loads((SHARED / "golden" / "kto.json").read_text())
    rows = json.loads((SHARED / "data" / "kto_en_demo.json").read_text())[:120]
    tokenizer = load_tokenizer(str(SHARED / "golden" / "tokenizer"), revision=None, trust_remote_code=False)
    records = [record for index, row in enumerate(rows) for record in to_records(row, f"row {index}")]
    kept = [(row, record) for row, record in zip(tokenize(records, tokenizer), records) if len(row[0]) < golden["max_length"]]
    assert len(kept) == golden["rows_kept"]
    for ((prompt_ids, completion_ids, _), record), example in zip(kept, golden["examples"]):
        assert (prompt_ids, completion_ids, record.desirable) == (example["prompt_ids"], example["completion_ids"], example["label"])
