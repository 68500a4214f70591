"""Which prompts eval.generate asks, when, and what becomes of samples.jsonl."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaConfig

from kto_ds.cli import read_config
from kto_ds.config import GenerateConfig, ModelConfig
from kto_ds.data.batch_plan import plan_batches
from kto_ds.errors import UserError
from kto_ds.report.samples_file import drop_after, read_samples, write_samples
from kto_ds.stages.run import Inputs, Run
from kto_ds.stages.samples import Questions, open_questions, spread_prompts, text_after
from tests.distributed.runs import number_tokenizer
from tests.unit.splits import make_split
from tests.unit.test_config_cli import run_file


def split_of(prompt_lengths: list[int], completions_each: int = 2):
    prompts = [[3 + number] * length for number, length in enumerate(prompt_lengths) for _ in range(completions_each)]
    return make_split(prompts, [[9, 2]] * len(prompts), desirable=[True] * len(prompts), max_length=50, kl_group_size=2, max_group_examples=30, shuffle=False, seed=0)


def test_prompts_are_distinct_and_spread():
    split = split_of([2, 3, 4, 5, 6, 7, 8, 9, 10])
    chosen = spread_prompts(split, 4, 50)
    assert split.prompt_of[chosen].tolist() == [0, 2, 4, 6] and (np.diff(chosen) > 0).all()
    assert len(spread_prompts(split, 100, 50)) == 9
    assert split.prompt_lengths[split.prompt_of[spread_prompts(split, 9, 5)]].tolist() == [2, 3, 4, 5]
    assert len(spread_prompts(split, 9, 1)) == 0


def test_a_prompt_that_is_too_long_for_one_rank_is_not_asked(tmp_path):
    make_model(tmp_path, positions=32)
    settings, splits = GenerateConfig(num_prompts=9, max_new_tokens=8), {"eval": split_of([4, 12, 20])}
    ask = partial(open_questions, settings, ModelConfig(path=str(tmp_path)), splits)
    lengths = [splits["eval"].prompt_lengths[splits["eval"].prompt_of[ask(max_tokens=limit).examples["eval"]]].tolist() for limit in (100, 12)]
    assert lengths == [[4, 12, 20], [4, 12]]
    with pytest.raises(UserError, match=r"every prompt of eval has more tokens than a forward of one rank may have, 3.*\n.*max_tokens_per_scoring_microbatch"):
        ask(max_tokens=3)
    with pytest.raises(UserError, match="leaves room"):
        partial(open_questions, settings.model_copy(update={"max_new_tokens": 30}), *ask.args[1:])(max_tokens=100)


def make_model(folder: Path, *, positions: int) -> None:
    LlamaConfig(vocab_size=20, max_position_embeddings=positions).save_pretrained(folder)
    number_tokenizer(20).save_pretrained(folder)


def test_text_is_that_behind_the_prompt_and_ends_before_the_stop_token():
    tokenizer = number_tokenizer(20)
    assert text_after(tokenizer, [], [5, 6]) == "t5 t6"
    assert text_after(tokenizer, [5], [6, 7, 2], stop_ids=[2]) == " t6 t7"
    assert text_after(tokenizer, [5], [6, 2, 7], stop_ids=[2]) == " t6 <eos> t7"  # a conversation that goes on
    assert text_after(tokenizer, [5], [2], stop_ids=[2]) == ""


def test_a_resume_drops_what_came_after_and_heals_a_torn_line(tmp_path):
    path = tmp_path / "samples.jsonl"
    drop_after(path, 3)
    assert not path.exists() and read_samples(path) == []
    write_samples(path, [{"split": "eval", "step": step, "prompt": "漢"} for step in (0, 2, 4)])
    with path.open("a") as file:
        file.write('{"split": "ev')
    drop_after(path, 3)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"split": "eval", "step": step, "prompt": "漢"} for step in (0, 2)]
    drop_after(path, -1)
    assert read_samples(path) == []


def test_the_policy_is_asked_at_first_at_last_and_in_every_so_many_evaluations(tmp_path):
    def steps(eval_steps: str, every: int) -> list[int]:
        config = config_of(tmp_path, "--data.held_out_fraction", "0.1", "--eval.generate.every", str(every), "--eval.eval_steps", eval_steps)
        plan = plan_batches(np.repeat(np.arange(10), 2), global_batch_size=2, num_train_epochs=1, max_steps=None, shuffle=False, seed=0)
        inputs = Inputs({}, {}, ("", ""), plan, config.loss, {}, Questions(config.eval.generate, {}, number_tokenizer(20), [2]))
        run = Run(config, inputs=inputs, world=None, engine=None, planner=None, watch=None, wall_time=None, aux_coef=None)
        return [step for step in range(11) if (step == 0 or run.is_evaluated_at(step)) and run.is_sampled_at(step)]

    assert steps("3", 1) == [0, 3, 6, 9, 10]
    assert steps("3", 2) == [0, 6, 10]
    assert steps("null", 1) == [0, 10] == steps("4", 3)


def config_of(tmp_path: Path, *options: str):
    return read_config("train", ["--config", str(run_file(tmp_path)), *options])[0]


def test_the_section_is_none_by_default_and_has_defaults_of_its_own(tmp_path):
    assert config_of(tmp_path).eval.generate is None
    settings = config_of(tmp_path, "--data.held_out_fraction", "0.1", "--eval.generate", '{"num_prompts": 3}').eval.generate
    assert (settings.num_prompts, settings.max_new_tokens, settings.temperature, settings.top_p, settings.every) == (3, 128, 0.0, 1.0, 1)


@pytest.mark.parametrize("options, message", [
    (["--eval.generate.num_prompts", "3"], "eval.generate: there are no evaluation rows to take prompts from"),
    (["--data.held_out_fraction", "0.1", "--eval.generate.top_p", "0"], "eval.generate.top_p"),
    (["--data.held_out_fraction", "0.1", "--eval.generate.temperature", "-1"], "eval.generate.temperature"),
    (["--data.held_out_fraction", "0.1", "--eval.generate.num_tokens", "3"], "num_tokens"),
])  # fmt: skip
def test_what_cannot_be_meant_is_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        config_of(tmp_path, *options)
