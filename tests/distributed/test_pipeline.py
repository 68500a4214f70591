"""launch/pipeline.sh on real rows with two ZeRO-3 ranks; what it exports is an ordinary model of transformers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.distributed.runs import ROOT, free_port, launch, read_metrics, write_config, write_zero

pytestmark = pytest.mark.distributed

SHARED = ROOT.parent / "shared"
MAX_LENGTH = 512


def naive_logp(model, tokenizer, row: dict) -> float | None:
    """Log-prob of the last turn by transformers alone, in one unpadded forward; None where kto_ds drops the row."""
    prompt = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, tokenize=True, return_dict=False)
    whole = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)[:MAX_LENGTH]
    if len(prompt) >= MAX_LENGTH:
        return None
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([whole])).logits[0, :-1].float().log_softmax(-1)
    return float(logps.gather(1, torch.tensor(whole)[1:, None])[len(prompt) - 1 :].sum())


@pytest.mark.skipif(not SHARED.exists(), reason="needs the real rows, which are not part of the project")
def test_pipeline_on_real_rows(tmp_path: Path):
    rows = json.loads((SHARED / "data" / "kto_en_demo.json").read_text())
    held_out = rows[::10]
    (tmp_path / "train.json").write_text(json.dumps([row for number, row in enumerate(rows) if number % 10]))
    (tmp_path / "eval.json").write_text(json.dumps(held_out))
    for part in ("model", "tokenizer"):
        shutil.copytree(SHARED / "golden" / part, tmp_path / "base", dirs_exist_ok=True)
    config = write_config(
        tmp_path / "run.yaml",
        output_dir=str(tmp_path / "run"),
        model={"path": str(tmp_path / "base"), "dtype": "float32"},
        data={"train": [{"path": str(tmp_path / "train.json")}], "eval": [{"path": str(tmp_path / "eval.json")}], "max_length": MAX_LENGTH},
        batch={"global_batch_size": 16, "max_tokens_per_microbatch": 2048},
        optim={"learning_rate": 1e-3},
        deepspeed={"config": write_zero(tmp_path, 3)},
    )
    done = launch(["bash", str(ROOT / "launch" / "pipeline.sh"), str(config)], NUM_RANKS="2", MASTER_PORT=free_port())
    assert done.returncode == 0, done.stdout[-4000:]

    exported = tmp_path / "run" / "export"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32), AutoTokenizer.from_pretrained(exported)
    logps = {label: [logp for row in held_out if row["label"] is label and (logp := naive_logp(model, tokenizer, row)) is not None] for label in (True, False)}
    trained = read_metrics(tmp_path / "run", "eval")[-1]
    assert trained["count/chosen"] == len(logps[True]) and trained["count/rejected"] == len(logps[False])
    assert trained["logps/chosen"] == pytest.approx(sum(logps[True]) / len(logps[True]), rel=1e-4)
    assert trained["logps/rejected"] == pytest.approx(sum(logps[False]) / len(logps[False]), rel=1e-4)
    assert abs(trained["rewards/chosen"]) > 0.1, "nothing was learnt, so the export may be the base model"
