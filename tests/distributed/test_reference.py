"""precompute-ref on one and two ranks: the values and the bytes. A start costs seconds, so one serves many checks."""

import itertools
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from kto_ds import cli
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.keys import find
from kto_ds.data.reference import read_shards
from tests.distributed import ranks
from tests.distributed.ranks import run_commands
from tests.distributed.runs import ROOT, launch, launcher, number_tokenizer, write_config, write_rows, write_zero

pytestmark = pytest.mark.distributed

SHARED = ROOT.parent / "shared"
WAYS = list(itertools.product(("replica", "sharded"), ("prefix_shared", "packed", "padded")))


def artefact_of(folder: Path, placement: str, layout: str, num_ranks: int) -> Path:
    return folder / f"{placement}-{layout}-{num_ranks}"


def naive_logps(model_path: Path, split: TokenizedSplit) -> np.ndarray:
    """One pair at a time through transformers, float32: [2E]."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    found = []
    for pair in range(2 * split.num_examples):
        prompt, completion = split.prompt(split.pair_prompts[pair]), split.completion(pair)
        ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        found.append(float(logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).double().sum()))
    return np.array(found)


def real_rows(folder: Path, num_rows: int | None) -> list[dict]:
    sources = []
    for name in ("kto_en_demo.json", "dpo_en_demo.json"):
        (folder / name).write_text(json.dumps(json.loads((SHARED / "data" / name).read_text())[:num_rows]))
        sources.append({"path": str(folder / name)})
    return sources


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(16, id="16 real rows of each kind", marks=pytest.mark.skipif(not SHARED.exists(), reason="needs the real rows, which are not part of the project")),
        pytest.param(None, id="all real rows", marks=[pytest.mark.slow, pytest.mark.skipif(not SHARED.exists(), reason="needs the real rows, which are not part of the project")]),
    ],
)  # fmt: skip
def scored(request, tmp_path_factory) -> Path:
    """Real rows of both kinds, scored in every layout and placement, on one rank and on two."""
    folder = tmp_path_factory.mktemp("scored")
    shutil.copytree(SHARED / "golden" / "tokenizer", folder / "model")
    vocab_size = len(json.loads((folder / "model" / "tokenizer.json").read_text())["model"]["vocab"]) + 64
    shape = dict(vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=2048)
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**shape, initializer_range=0.1, bos_token_id=1, eos_token_id=2, pad_token_id=0)).save_pretrained(folder / "model")
    write_config(
        folder / "run.yaml",
        output_dir=str(folder / "run"),
        model={"path": str(folder / "model"), "dtype": "float32"},
        data={"train": real_rows(folder, request.param), "max_length": 512},
        reference={"max_tokens_per_microbatch": 2048},
        deepspeed={"config": write_zero(folder, 3)},
    )
    assert cli.run(["prepare", "--config", str(folder / "run.yaml")]) == 0
    for num_ranks in (1, 2):
        commands = [
            ["precompute-ref", "--config", folder / "run.yaml", "--model.layout", layout, "--reference.placement", placement,
             "--reference.artifact", artefact_of(folder, placement, layout, num_ranks)]
            for placement, layout in WAYS
        ]  # fmt: skip
        run_commands(folder, commands, num_ranks=num_ranks)
    return folder


def test_the_values_are_those_of_a_naive_scorer(scored):
    split = TokenizedSplit.load(scored / "run" / "dataset" / "train")
    wanted = naive_logps(scored / "model", split)
    for (placement, layout), num_ranks in itertools.product(WAYS, (1, 2)):
        rows = read_shards(artefact_of(scored, placement, layout, num_ranks).glob("*.safetensors"))
        places = find(rows.keys, split.pair_keys)
        assert (places >= 0).all()
        np.testing.assert_allclose(rows.logps[places], wanted, rtol=1e-5, err_msg=f"{placement} {layout} {num_ranks}")


def test_the_artefact_is_the_same_to_the_byte_for_one_rank_and_two(scored):
    for placement, layout in WAYS:
        one, two = ({path.name: path.read_bytes() for path in artefact_of(scored, placement, layout, num_ranks).iterdir()} for num_ranks in (1, 2))
        assert one == two and len(one) > 2, f"{placement} {layout}"


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A prepared run whose scoring takes some ten seconds on one rank, in many shards."""
    folder = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    shape = dict(vocab_size=61, hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
    LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=1, eos_token_id=2, pad_token_id=0)).save_pretrained(folder / "model")
    number_tokenizer(61).save_pretrained(folder / "model")
    generator = np.random.default_rng(0)
    draw = lambda low, high: "".join(f" t{token}" for token in generator.integers(3, 61, generator.integers(low, high)))  # noqa: E731
    write_rows(folder / "rows.jsonl", [{"prompt": draw(20, 60), "completion": draw(40, 200), "label": number % 2 == 0} for number in range(1000)])
    write_config(
        folder / "run.yaml",
        output_dir=str(folder / "run"),
        model={"path": str(folder / "model"), "dtype": "float32"},
        data={"train": [{"path": str(folder / "rows.jsonl")}], "max_length": 512},
        reference={"max_tokens_per_microbatch": 512, "artifact": str(folder / "reference")},
        deepspeed={"config": write_zero(folder, 3)},
    )
    assert cli.run(["prepare", "--config", str(folder / "run.yaml")]) == 0
    return folder


def test_a_nan_on_one_rank_ends_all_of_them_without_an_artefact(work):
    """With copies the ranks tell each other by a file, partitioned by a flag that is added up; nobody hangs, and the row is named."""
    broken = LlamaForCausalLM.from_pretrained(work / "model")
    with torch.no_grad():
        broken.model.embed_tokens.weight[17] = float("nan")
    broken.save_pretrained(work / "broken")
    number_tokenizer(61).save_pretrained(work / "broken")
    for placement in ("replica", "sharded"):
        options = ["--reference.path", str(work / "broken"), "--reference.placement", placement, "--reference.artifact", str(work / "nan")]
        began = time.monotonic()
        exit_codes, output = ranks.run(["precompute-ref", "--config", str(work / "run.yaml"), *options], log=work / "log")
        assert exit_codes == [3, 3] and "reference log-probs are not finite" in output and "rows.jsonl:" in output, output[-3000:]
        assert time.monotonic() - began < 60 and not (work / "nan").exists()


def test_a_partitioned_reference_is_partitioned(tmp_path):
    """Between two forwards a rank holds its part of the weights only."""
    script = tmp_path / "look.py"
    script.write_text(LOOK)
    torch.manual_seed(0)
    shape = dict(vocab_size=61, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=1, eos_token_id=2, pad_token_id=0)).save_pretrained(tmp_path / "model")
    done = launch([*launcher(2), str(script), str(tmp_path / "model")])
    assert done.returncode == 0, done.stdout[-3000:]
    assert [(tmp_path / f"part-{rank}").read_text() for rank in (0, 1)] == ["0.50", "0.50"]


LOOK = """
import sys
from pathlib import Path
from kto_ds.config import ModelConfig
from kto_ds.model.load import load_policy
from kto_ds.model.support import read_model_config
from kto_ds.runtime.collectives import start, stop
from kto_ds.runtime.deepspeed_config import reading_config
from kto_ds.runtime.engine import shard_for_reading

world = start(timeout_seconds=600)
model = ModelConfig(path=sys.argv[-1], dtype="float32")
shards = reading_config({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}, dtype="float32")
policy = load_policy(model, read_model_config(model), layout="prefix_shared", backend="sdpa", gradient_checkpointing=False, partition_for=shards)
shard_for_reading(policy, shards)
parameters = list(policy.parameters())
assert all(parameter.numel() == 0 for parameter in parameters)
whole = sum(parameter.ds_numel for parameter in parameters)
part = sum(parameter.ds_tensor.numel() for parameter in parameters) / whole
Path(model.path).with_name(f"part-{world.rank}").write_text(f"{part:.2f}")
stop()
"""
