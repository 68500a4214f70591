"""kto_ds from Python: the program of docs/python.md as it stands, a command on two ranks, and what mistakes raise."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from kto_ds import api
from kto_ds.errors import KtoError, UserError
from kto_ds.report.metrics_file import read_records
from tests.distributed.runs import ROOT, environment
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
    with pytest.raises(KtoError, match="train on 2 ranks ended with exit code"):
        api.launch("train", config.model_copy(update={"seed": 7}), num_ranks=2)


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
