"""The demo's task, its tokenizer and its labels. The model is untrained: what it says is noise, which is what labels must stand."""

import random

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from kto_ds.demo import task
from kto_ds.demo.base_model import build_model, build_tokenizer, half_wrong_batch, label_rows, measure_accuracy, sample_completions, supervised_start

PROMPTS = task.split_prompts(0)


@pytest.mark.parametrize(("left", "right", "prompt", "answer"), [(47, 85, "47+85=", "231"), (0, 0, "00+00=", "000"), (99, 99, "99+99=", "891"), (3, 4, "03+04=", "700")])
def test_answer_is_the_sum_last_digit_first(left, right, prompt, answer):
    assert task.make_prompt(left, right) == prompt
    assert task.right_answer(prompt) == answer
    assert task.is_right(prompt, answer)


@pytest.mark.parametrize("completion", ["", "132", "23", "2310", "231 ", "+=+"])
def test_any_other_completion_is_wrong(completion):
    assert not task.is_right("47+85=", completion)


def test_wrong_answers_are_wrong_and_well_formed():
    rng = random.Random(0)
    for prompt in [*PROMPTS.test, "00+00=", "04+05=", "99+99="]:
        answer = task.wrong_answer(prompt, rng)
        assert not task.is_right(prompt, answer)
        assert len(answer) == task.ANSWER_LENGTH and answer.isdigit()


def test_split_covers_all_prompts_and_keeps_twins_together():
    parts = [*PROMPTS]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 10_000
    assert len(PROMPTS.test) >= 500 and len(PROMPTS.validation) >= 300
    for part in parts:
        assert {f"{prompt[3:5]}+{prompt[:2]}=" for prompt in part} == set(part)
    assert task.split_prompts(0) == PROMPTS != task.split_prompts(1)


def test_tokenizer_gives_characters_and_nothing_else(tmp_path):
    build_tokenizer().save_pretrained(tmp_path)
    for tokenizer in (build_tokenizer(), AutoTokenizer.from_pretrained(tmp_path)):
        prompt_ids = tokenizer("47+85=")["input_ids"]
        assert tokenizer.convert_ids_to_tokens(prompt_ids) == list("47+85=")
        assert tokenizer("47+85=231")["input_ids"][: len(prompt_ids)] == prompt_ids
        assert tokenizer.decode(tokenizer("47+85=231")["input_ids"]) == "47+85=231"
        assert tokenizer("231" + tokenizer.eos_token)["input_ids"][-1] == tokenizer.eos_token_id
        assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, *prompt_ids}) == 8


def test_supervised_batch_teaches_the_answer_and_its_end_only():
    tokenizer = build_tokenizer()
    input_ids, labels = half_wrong_batch(tokenizer, PROMPTS.training[:200], random.Random(0))
    assert input_ids.shape == labels.shape == (200, 10)
    assert (labels[:, :6] == -100).all() and (labels[:, 6:] == input_ids[:, 6:]).all()
    assert (labels[:, -1] == tokenizer.eos_token_id).all()
    answers = tokenizer.batch_decode(input_ids[:, 6:], skip_special_tokens=True)
    assert 70 < sum(map(task.is_right, PROMPTS.training, answers)) < 130


def test_labels_of_an_untrained_model(tmp_path):
    tokenizer = build_tokenizer()
    build_model(tokenizer, seed=0).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompts = PROMPTS.test[:200]
    completions = sample_completions(model, tokenizer, prompts, seed=0)
    assert completions == sample_completions(model, tokenizer, prompts, seed=0) != sample_completions(model, tokenizer, prompts, seed=1)
    assert "" in completions and max(map(len, completions)) == 4
    rows = label_rows(prompts, completions)
    assert len(rows) == 200 - completions.count("")
    assert all(row["completion"] and row["label"] == task.is_right(row["prompt"], row["completion"]) for row in rows)
    assert measure_accuracy(model, tokenizer, prompts, seed=0) < 0.05


def test_label_rows_keep_prompt_and_verdict_and_drop_the_empty():
    assert label_rows(["47+85=", "47+85=", "01+01="], ["231", "", "2000"]) == [
        {"prompt": "47+85=", "completion": "231", "label": True},
        {"prompt": "01+01=", "completion": "2000", "label": False},
    ]


def test_supervised_start_learns_and_is_repeatable():
    tokenizer = build_tokenizer()
    seen = []
    for _ in range(2):
        model = build_model(tokenizer, seed=0)
        supervised_start(model, tokenizer, PROMPTS.training, steps=5, batch_size=8, seed=0, progress=lambda step, loss: seen.append((step, loss)))
    assert seen[0] == seen[1] and seen[0][0] == 5
