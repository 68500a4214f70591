"""docs/quickstart.md from top to bottom: its table, its config and its commands as they stand, with a tiny model in the place of the one from the hub."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import decoders
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.distributed.runs import ROOT, environment, free_port
from tests.distributed.tiny_run import status_of
from tests.unit.test_docs_data import blocks, byte_tokenizer

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

MODEL = "Qwen/Qwen3-0.6B"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the reader has typed so far, and the model where the hub's name for it leads to."""
    folder = tmp_path_factory.mktemp("quickstart")
    [table], [config] = ([block.text for block in blocks(ROOT / "docs" / "quickstart.md") if block.language == language] for language in ("csv", "yaml"))
    (folder / "thumbs.csv").write_text(table)
    assert MODEL in config
    (folder / "run.yaml").write_text(config)
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()  # so that text is shown as it was
    tokenizer.save_pretrained(folder / MODEL)
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=2048)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, eos_token_id=0)).save_pretrained(folder / MODEL)
    return folder


def test_every_step_works(folder):
    lines = [line.partition("#")[0].strip() for block in blocks(ROOT / "docs" / "quickstart.md") if block.language == "bash" for line in block.text.splitlines()]
    commands = lines[lines.index("kto-ds --help") :]
    assert [line.split()[1] for line in commands] == ["--help", "prepare", "inspect", "plan", "doctor", "launch/pipeline.sh", "report", "chat"]
    variables = {**environment(), "NUM_RANKS": "2", "MASTER_PORT": free_port(), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    said = {}
    for line in commands:
        typed = line.replace("launch/", f"{ROOT}/launch/")
        done = subprocess.run(["bash", "-c", typed], cwd=folder, env=variables, input="What is water made of?\n", capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "Traceback" not in done.stderr, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        said[line.split()[1]] = done.stdout
    run = folder / "runs" / "first"
    assert status_of(run)["state"] == "completed" and (run / "report.html").stat().st_size > 10_000
    assert "thumbs.csv" in said["inspect"] and "Paris." in said["inspect"] and "margin" in said["launch/pipeline.sh"]
    assert "policy" in said["chat"] and "reward of the policy's answer" in said["chat"]
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(run / "export"), AutoTokenizer.from_pretrained(run / "export")
    assert lm.config.vocab_size == len(tokenizer)
