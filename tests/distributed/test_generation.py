"""eval.generate on one rank and on two: the same samples, no ZeRO-3 trace thrown away; and what kto-ds evaluate and kto-ds chat make of the same model."""

import io
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kto_ds import cli
from kto_ds.report.samples_file import Sample, read_samples
from kto_ds.stages import run
from tests.distributed import ranks
from tests.distributed.ranks import run_commands
from tests.distributed.runs import read_metrics, write_zero
from tests.distributed.tiny_run import config_of
from tests.unit.test_generate import naive_greedy

pytestmark = pytest.mark.distributed

NUM_STEPS, NUM_TOKENS = 4, 6
SLOW_SECONDS = 5.0
GREEDY = dict(train__max_steps=NUM_STEPS, eval__generate__num_prompts=3, eval__generate__max_new_tokens=NUM_TOKENS)
DRAWN = {**GREEDY, "eval__generate__num_prompts": 1, "eval__generate__temperature": 1.0, "eval__generate__top_p": 0.9}


@pytest.fixture(scope="module")
def results(tiny) -> dict[str, dict]:
    """Results of the commands by name. The second of two ranks has no prompt to answer in the drawn runs."""
    one = {
        "greedy1": ["train", *config_of(tiny, output_dir=tiny / "greedy1", **GREEDY)],
        "drawn1": ["train", *config_of(tiny, output_dir=tiny / "drawn1", **DRAWN)],
        "export": ["export", *config_of(tiny, output_dir=tiny / "greedy1")],
        "evaluate1": ["evaluate", *config_of(tiny, output_dir=tiny / "evaluate1", eval__path=tiny / "greedy1" / "export", **GREEDY)],
    }
    two = {
        "greedy2": ["train", *config_of(tiny, output_dir=tiny / "greedy2", **GREEDY)],
        "drawn2": ["train", *config_of(tiny, output_dir=tiny / "drawn2", deepspeed__config=write_zero(tiny, 2), **DRAWN)],
        "shared2": ["train", *config_of(tiny, output_dir=tiny / "shared2", batch__sequence_parallel_size=2, **{**GREEDY, "train__max_steps": 1})],
        "evaluate2": ["evaluate", *config_of(tiny, output_dir=tiny / "evaluate2", eval__path=tiny / "greedy1" / "export", reference__placement="sharded", **GREEDY)],
    }
    found = {}
    for num_ranks, commands in ((1, one), (2, two)):
        found.update(zip(commands, run_commands(tiny, list(commands.values()), num_ranks=num_ranks)))
    return found


def samples_of(folder: Path, file: str = "samples.jsonl") -> list[dict]:
    """Return the samples without their rewards, which have the rounding of the ranks in them."""
    return [{name: value for name, value in sample.items() if name != "dataset_reward"} for sample in read_samples(folder / file)]


@pytest.mark.parametrize("kind, num_prompts", [("greedy", 3), ("drawn", 1)])
def test_samples_do_not_depend_on_the_ranks(tiny, results, kind, num_prompts):
    found = samples_of(tiny / f"{kind}2")
    assert found == samples_of(tiny / f"{kind}1")
    assert all(sample.keys() == Sample.__annotations__.keys() for sample in read_samples(tiny / f"{kind}2" / "samples.jsonl"))
    assert [sample["step"] for sample in found] == [0] * num_prompts + [NUM_STEPS] * num_prompts
    assert {sample["num_tokens"] for sample in found} == {NUM_TOKENS} and len({sample["prompt"] for sample in found}) == num_prompts


def test_ranks_that_share_rows_generate_by_themselves(tiny, results):
    before = [sample for sample in samples_of(tiny / "greedy1") if sample["step"] == 0]
    assert [sample for sample in samples_of(tiny / "shared2") if sample["step"] == 0] == before


def test_no_trace_is_thrown_away(results):
    assert {name: result["invalidations"] for name, result in results.items()} == dict.fromkeys(results, 0)


def test_before_the_first_step_the_base_model_speaks(tiny, results):
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(tiny / "model").eval(), AutoTokenizer.from_pretrained(tiny / "model")
    first = [sample for sample in samples_of(tiny / "greedy2") if sample["step"] == 0]
    for sample in first:
        expected = naive_greedy(plain, np.array(tokenizer(sample["prompt"])["input_ids"]), NUM_TOKENS)
        assert tokenizer(sample["completion"])["input_ids"] == expected
    befores = {sample["prompt"]: sample["completion"] for sample in first}
    assert all(sample["before"] == befores[sample["prompt"]] for sample in samples_of(tiny / "greedy2"))


def test_rows_of_the_dataset_stand_beside_the_samples(tiny, results):
    rows = (tiny / "eval.jsonl").read_text().splitlines()
    last = [sample for sample in read_samples(tiny / "greedy2" / "samples.jsonl") if sample["step"] == NUM_STEPS]
    for sample in last:
        row = rows[int(sample["row"].rpartition(":")[2]) - 1]
        assert f'"{sample["prompt"].strip()}"' in row and f'"{sample["dataset_completion"].strip()}"' in row and f'"label": {str(sample["label"]).lower()}' in row
    [metrics] = read_metrics(tiny / "greedy2", "eval")
    smallest, largest = (pick(sample["dataset_reward"] for sample in last) for pick in (min, max))
    assert smallest != 0 and smallest < max(metrics["rewards/chosen"], metrics["rewards/rejected"]) and largest > min(metrics["rewards/chosen"], metrics["rewards/rejected"])


def slow_answers(rank: int) -> None:
    def slow(*args, ask=run.ask, step, **options):
        time.sleep(SLOW_SECONDS if step == 0 else 0)
        ask(*args, step=step, **options)

    run.ask = slow


def test_what_is_answered_before_the_first_step_is_no_time_of_training(tiny, tmp_path):
    command = ["train", *config_of(tiny, output_dir=tmp_path / "run", **{**GREEDY, "train__max_steps": 1})]
    assert ranks.run(command, log=tmp_path / "log", num_ranks=1, before=slow_answers)[0] == [0]
    assert read_metrics(tmp_path / "run")[0]["seconds/host"] < SLOW_SECONDS


def test_evaluate_generates_with_the_export(tiny, results):
    trained = [{**sample, "step": None, "before": None} for sample in samples_of(tiny / "greedy1") if sample["step"] == NUM_STEPS]
    for folder in ("evaluate1", "evaluate2"):
        assert samples_of(tiny / folder, "evaluation_samples.jsonl") == trained


def test_chat_with_a_checkpoint_is_chat_with_its_export(tiny, results, monkeypatch, capsys):
    torch.manual_seed(0)  # whatever was before
    spoken = []
    for options in ([], ["--checkpoint", "latest"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("t5 t6\nt7\n"))
        assert cli.main(["chat", *config_of(tiny, output_dir=tiny / "greedy1"), "--temperature", "0", "--max-new-tokens", "8", *options]) == 0
        transcript = capsys.readouterr().out
        assert "zero checkpoint" not in transcript, "what DeepSpeed says while it reads is no part of a chat"
        spoken.append(transcript.partition("/help")[2])
    assert spoken[0] == spoken[1] and spoken[0].count("reward of the policy's answer") == 2
