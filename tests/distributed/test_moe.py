"""A mixture of experts through the command line: a step with the load-balancing loss is the same however it is split, and the export is a model of its family."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from kto_ds import cli
from tests.distributed.ranks import run_commands
from tests.distributed.runs import number_tokenizer, read_metrics, write_zero
from tests.distributed.test_split_invariance import BUDGETS, weights_after, write_one_step

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# name -> (ranks, ZeRO stage, options); every objective is run on one rank in one padded micro-batch, and split.
ONE, SEVERAL = ("--batch.max_tokens_per_microbatch", BUDGETS["one"]), ("--batch.max_tokens_per_microbatch", BUDGETS["several"])
OBJECTIVES = {
    "kto": (),
    "half": ("--loss.kl_fraction", 0.5),
    "apo": ("--loss.loss_type", "apo_zero_unpaired"),
    "unbalanced": ("--model.router_aux_loss_coef", 0),
}
RUNS = {f"{name}-plain": (1, 0, (*options, *ONE, "--model.layout", "padded")) for name, options in OBJECTIVES.items()}
RUNS |= {f"{name}-sharded": (2, 3, (*options, *SEVERAL)) for name, options in OBJECTIVES.items()}
RUNS |= {
    "kto-several": (1, 0, SEVERAL),
    "kto-packed": (2, 2, (*SEVERAL, "--model.layout", "packed")),
    "kto-kept": (2, 3, (*SEVERAL, "--model.gradient_checkpointing", "false")),
}
COEF = 0.5


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    """One optimizer step of every run; returns the folder and what was counted in each."""
    folder = tmp_path_factory.mktemp("moe")
    shape = dict(
        vocab_size=61, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_experts=6, num_experts_per_tok=2, mlp_only_layers=[1], router_aux_loss_coef=COEF, max_position_embeddings=256, initializer_range=0.15,
    )  # fmt: skip
    for seed, name in enumerate(("reference", "model")):
        torch.manual_seed(seed)
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0)).save_pretrained(folder / name)
        number_tokenizer(61).save_pretrained(folder / name)
    write_one_step(folder)
    config = ["--config", str(folder / "run.yaml")]
    assert cli.run(["prepare", *config]) == 0
    run_commands(folder, [["precompute-ref", *config]], num_ranks=1)
    counts = {}
    for ranks in (1, 2):
        chosen = {name: (stage, options) for name, (num_ranks, stage, options) in RUNS.items() if num_ranks == ranks}
        commands = [
            ["train", *config, "--output_dir", folder / name, "--deepspeed.config", write_zero(folder, stage), *options] for name, (stage, options) in chosen.items()
        ]
        counts |= dict(zip(chosen, run_commands(folder, commands, num_ranks=ranks)))
    return folder, counts


def change_of(folder: Path, run: str) -> dict[str, torch.Tensor]:
    """What the step changed in every parameter: minus its gradient, but for a factor, as OPTIM is chosen."""
    before = dict(AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).named_parameters())
    return {name.removeprefix("lm."): weight - before[name.removeprefix("lm.")].detach() for name, weight in weights_after(folder / run).items()}


@pytest.mark.parametrize("run", [name for name in RUNS if not name.endswith("-plain")])
def test_a_step_with_the_load_balancing_loss_does_not_depend_on_its_split(runs, run):
    folder, _ = runs
    plain = run.split("-")[0] + "-plain"
    (wanted,), (found,) = read_metrics(folder / plain), read_metrics(folder / run)
    assert wanted["aux_loss"] > 2.01 and 1.2 < wanted["router/load_max"] <= 3  # of 6 experts, of which a token has 2
    for name in ("loss", "kl", "grad_norm", "logps/chosen", "aux_loss", "router/load_max"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-5), name
    changes, plain_changes = change_of(folder, run), change_of(folder, plain)
    assert changes.keys() == plain_changes.keys() and len(changes) > 20
    for name, change in plain_changes.items():
        error = (changes[name] - change).norm() / change.norm()
        assert change.norm() > 1e-5 and error < 2e-5, f"{name}: the gradients differ by {error:.1e}"


def test_the_loss_moves_the_routers(runs):
    folder, _ = runs
    balanced, unbalanced = (change_of(folder, run)["model.layers.0.mlp.gate.weight"] for run in ("kto-plain", "unbalanced-plain"))
    assert (balanced - unbalanced).norm() > 0.1 * balanced.norm()
    (with_loss,), (without,) = read_metrics(folder / "kto-plain"), read_metrics(folder / "unbalanced-plain")
    assert with_loss["loss"] == without["loss"] and with_loss["aux_loss"] == without["aux_loss"], "the loss that is logged is that of KTO alone"


def test_zero3_keeps_its_trace(runs):
    _, counts = runs
    assert [counts[name]["invalidations"] for name in ("kto-sharded", "apo-sharded", "unbalanced-sharded")] == [0, 0, 0]


def test_the_export_is_a_model_of_its_family(runs):
    folder, _ = runs
    ranks, stage, options = RUNS["kto-sharded"]
    run = ["--config", str(folder / "run.yaml"), "--output_dir", str(folder / "kto-sharded"), *map(str, options)]
    assert cli.run(["export", *run]) == 0
    exported = AutoModelForCausalLM.from_pretrained(folder / "kto-sharded" / "export", dtype=torch.float32)
    weights = {name.removeprefix("lm."): weight for name, weight in weights_after(folder / "kto-sharded").items()}
    assert {name for name, _ in exported.named_parameters()} == weights.keys()
    for name, parameter in exported.named_parameters():
        assert torch.equal(parameter, weights[name]), name
