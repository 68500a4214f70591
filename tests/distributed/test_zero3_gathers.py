"""What ZeRO-3 gathers in a step of two phases: a trace that stays valid, each decoder layer as one collective."""

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from kto_ds import cli
from tests.distributed.ranks import run_commands
from tests.distributed.runs import conversation, number_tokenizer, read_metrics, write_config, write_rows

pytestmark = pytest.mark.distributed

NUM_LAYERS = 8


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    """Runs of 1 and 3 steps on two ranks, with one micro-batch a phase and with several; returns (folder, results by name)."""
    folder = tmp_path_factory.mktemp("gathers")
    torch.manual_seed(0)
    shape = dict(vocab_size=128, hidden_size=32, intermediate_size=96, num_hidden_layers=NUM_LAYERS, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    model = Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0))
    model.save_pretrained(folder / "model")
    number_tokenizer(128).save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(1)
    draw = lambda length: torch.randint(3, 127, (length,), generator=generator).tolist()  # noqa: E731
    write_rows(folder / "rows.jsonl", [conversation(draw(3 + number % 9), draw(8 + number % 5), number % 2 == 0) for number in range(24)])
    # The proportions of a 32B model under DeepSpeed's own limits: two layers may be there at a time. How far to prefetch is left to kto_ds.
    two_layers = 2 * sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": two_layers, "stage3_max_reuse_distance": two_layers}
    (folder / "zero3.json").write_text(json.dumps({"zero_optimization": zero}))
    write_config(
        folder / "run.yaml",
        output_dir=str(folder / "run"),
        model={"path": str(folder / "model"), "dtype": "float32"},
        data={"train": [{"path": str(folder / "rows.jsonl")}], "max_length": 64, "artifact": str(folder / "dataset")},
        reference={"artifact": str(folder / "reference")},
        batch={"global_batch_size": 8},
        deepspeed={"config": str(folder / "zero3.json")},
    )
    config = ["--config", str(folder / "run.yaml")]
    assert cli.run(["prepare", *config]) == 0
    names = {name: ["--batch.max_tokens_per_microbatch", budget, "--train.max_steps", steps] for name, budget, steps in
             (("one", 8192, 1), ("three", 8192, 3), ("one-split", 40, 1), ("three-split", 40, 3))}  # fmt: skip
    commands = [["train", *config, "--output_dir", folder / name, *options] for name, options in names.items()]
    _, *results = run_commands(folder, [["precompute-ref", *config], *commands], num_ranks=2)
    return folder, {**dict(zip(names, results)), "numel": sum(parameter.numel() for parameter in model.parameters())}


@pytest.mark.parametrize("split", ["", "-split"])
def test_the_trace_is_never_thrown_away(runs, split):
    folder, results = runs
    assert len(read_metrics(folder / f"three{split}")) == 3
    assert results[f"three{split}"]["invalidations"] == results[f"one{split}"]["invalidations"] == 0
    assert results[f"three{split}"]["gathers"] > results[f"one{split}"]["gathers"]


def test_a_pair_of_micro_batches_gathers_each_layer_four_times_at_most(runs):
    _, results = runs
    a_step = {name: (results["three"][name] - results["one"][name]) / 2 for name in ("gathers", "gathered_numel")}
    # Two forwards and a backward; embedding, norm and head are in it too.
    assert 2 * NUM_LAYERS <= a_step["gathers"] <= 4 * NUM_LAYERS, a_step
    assert 1.5 < a_step["gathered_numel"] / results["numel"] <= 3.05, a_step
