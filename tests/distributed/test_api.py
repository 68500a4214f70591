"""kto_ds from Python: the program of docs/python.md as it stands, a command on two ranks, and what mistakes raise."""

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kto_ds import api
from kto_ds.errors import KtoError, Preempted, UserError
from kto_ds.report.metrics_file import read_records
from tests.distributed import ranks
from tests.distributed.runs import ROOT, environment, write_zero
from tests.distributed.tiny_run import make_tiny_run, status_of
from tests.unit.test_docs_data import blocks

pytestmark = pytest.mark.distributed


def test_the_program_on_the_page(tiny, tmp_path):
    [program] = [block.text for block in blocks(ROOT / "docs" / "python.md") if block.language == "python"]
    model = shutil.copytree(tiny / "model", tmp_path / "model")
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": 2048}))  # which max_length is unless the program says otherwise
    places = {'"Qwen/Qwen3-0.6B"': f'"{model}"', '"thumbs.jsonl"': f'"{tiny / "rows.jsonl"}"'}
    for shown, here in places.items():
        assert program.count(shown) == 1
        program = program.replace(shown, here)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    run = tmp_path / "runs" / "mine"
    margin = read_records(run / "metrics.jsonl")[-1]["rewards/margins"]
    auc = json.loads((run / "evaluation.json").read_text())["splits"]["eval/held_out"]["rewards/auc"]
    lines = done.stdout.splitlines()
    assert lines[-1] == str(auc) and any(line == f"{margin} runs/mine/export" for line in lines)
    assert (run / "export" / "model.safetensors").is_file() and status_of(run)["state"] == "completed"


@pytest.mark.slow
def test_commands_on_several_ranks(tmp_path, capfd):
    folder = make_tiny_run(tmp_path)
    config = api.read_config(folder / "run.yaml", {"train.max_steps": 2, "eval.eval_steps": None, "report.wandb": {"mode": "disabled"}})
    assert (config.train.max_steps, config.eval.eval_steps, config.loss.beta) == (2, None, 0.1)
    api.launch("precompute-ref", config, num_ranks=2)
    api.launch("train", config, num_ranks=2)
    assert re.search(r"ranks +2, ZeRO 3", capfd.readouterr().out)
    assert [record["step"] for record in api.metrics(config) if record["split"] == "train"] == [1, 2]
    with pytest.raises(KtoError, match="train on 2 ranks ended with exit code 2") as found:
        api.launch("train", api.change(config, {"seed": 7}), num_ranks=2)
    assert found.value.exit_code == 2


@pytest.mark.slow
def test_an_interrupt_of_a_launch_waits_for_what_is_saved(tiny, tmp_path):
    config = api.read_config(tiny / "run.yaml", {"output_dir": tmp_path / "run", "train.max_steps": 400, "checkpoint.save_steps": 400})

    def interrupt() -> None:
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(Preempted, match="SIGINT: train on 2 ranks is stopped"):
        api.launch("train", config, num_ranks=2)
    status = status_of(tmp_path / "run")
    assert status["state"] == "preempted" and status["exit_code"] == 75
    assert (tmp_path / "run" / "checkpoints" / f"step-{status['step']:08}").is_dir()


def train_and_look(words: list[str]) -> None:
    """Train from Python, and print how many elements of tensors there are afterwards."""
    run, output_dir, zero = words
    api.train(api.read_config(run, {"output_dir": output_dir, "deepspeed.config": zero, "train.max_steps": 1}))
    print(f"held: {sum(held.numel() for held in gc.get_objects() if type(held) in (torch.Tensor, torch.nn.Parameter))}", flush=True)


def test_a_trained_model_is_let_go(tiny, tmp_path):
    words = [tiny / "run.yaml", tmp_path / "run", write_zero(tmp_path, 2)]
    output = ranks.require_success(words, log=tmp_path / "log", num_ranks=1, program=train_and_look)
    num_weights = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(tiny / "model").parameters())
    assert int(re.search(r"^held: (\d+)$", output, re.MULTILINE)[1]) < num_weights / 10


def test_some_keys_are_changed_and_the_others_stay(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: run\nmodel: {path: x}\ndata: {train: [{path: y}], held_out_fraction: 0.1}\nloss: {beta: 0.2}\n")
    config = api.read_config(path, {"output_dir": tmp_path / "here", "eval.generate": {"num_prompts": 3}, "data.train": [{"path": Path("rows.jsonl")}]})
    assert (config.output_dir, config.eval.generate.num_prompts, config.data.train[0].path, config.loss.beta) == (tmp_path / "here", 3, "rows.jsonl", 0.2)
    changed = api.change(config, {"loss.kl_fraction": 0.5, "eval.generate": {"top_p": 0.9}})
    assert (changed.loss.beta, changed.loss.kl_fraction) == (0.2, 0.5) and (changed.eval.generate.num_prompts, changed.eval.generate.top_p) == (3, 0.9)
    assert api.change(changed, {"loss": {}, "eval.generate": {}}) == changed, "an empty mapping names nothing"
    assert config.loss.kl_fraction == 1 and api.change(changed, {"eval.generate": None}).eval.generate is None
    for changes, message in (
        ({"loss.betta": 1}, r"loss.betta: unknown key\n.*loss\.beta"), ({"loss": {"betta": 1}}, r"loss.betta: unknown key\n.*loss\.beta"),
        ({"max_wall_time": "5"}, "max_wall_time: unknown key"), ({"loss.beta": -1}, "loss.beta: .*found -1"),
    ):  # fmt: skip
        for attempt in (lambda: api.change(config, changes), lambda: api.read_config(path, changes)):  # noqa: B023
            with pytest.raises(UserError, match=message):
                attempt()


def test_mistakes_are_raised(tmp_path):
    with pytest.raises(UserError) as found:
        api.make_config(output_dir=str(tmp_path), model={"path": "x"}, data={"train": [{"path": "y"}]}, loss={"betta": 1})
    assert "loss.betta" in found.value.what and "loss.beta" in found.value.remedy
    config = api.make_config(output_dir=str(tmp_path / "run"), model={"path": str(tmp_path / "none")}, data={"train": [{"path": str(tmp_path / "rows.jsonl")}]})
    with pytest.raises(UserError, match="no such file|no such folder"):
        api.prepare(config)
    with pytest.raises(UserError, match="does not run on several ranks"):
        api.launch("prepare", config, num_ranks=2)
    assert api.plan.__doc__ and not (tmp_path / "run").exists()
