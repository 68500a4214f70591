"""A step is the same however it is split: over ranks, ZeRO stages, micro-batches and layouts, whatever labels lie together."""

import itertools
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kto_ds import cli
from kto_ds.artifacts import read_manifest
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.packing import share_out
from kto_ds.runtime.restore import Checkpoint, read_weights
from kto_ds.runtime.retention import list_checkpoints
from tests.distributed.ranks import run_commands
from tests.distributed.runs import conversation, number_tokenizer, read_metrics, write_config, write_rows, write_zero

pytestmark = pytest.mark.distributed

RANKS, LAYOUTS = (1, 2), ("prefix_shared", "packed", "padded")
STAGES, SLOW_STAGES = (0, 3), (1, 2)
BUDGETS = {"one": 4096, "several": 90}  # tokens of a micro-batch; 90 is a little more than the longest pair
# AdamW's first update is lr * g / (|g| + eps). With lr = eps = 1000 that is g to within |g| / 1000, the same for every split, so that weights
# before and after the step show the gradient.
OPTIM = {"learning_rate": 1e3, "adam_epsilon": 1e3, "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "max_grad_norm": 0.0}


def rows() -> list[dict]:
    """16 examples on 9 prompts, odd lengths. Desirable ones are long, undesirable ones short: micro-batches of one label."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda length: torch.randint(3, 61, (length,), generator=generator).tolist()  # noqa: E731
    prompts = [draw(length) for length in (5, 9, 13, 21, 7, 11, 3, 17, 1)]
    kinds = [(0, True), (0, True), (0, False), (1, True), (2, False), (2, False), (3, True), (3, False), (4, True), (5, False), (5, False), (6, True), (7, False), (8, True), (8, True), (8, False)]
    return [conversation(prompts[prompt], draw(37 + 3 * number if label else 1 + number % 7), label) for number, (prompt, label) in enumerate(kinds)]


def write_one_step(folder: Path, **sections) -> None:
    """Write rows and run.yaml of a run of one step on all of them, for the models `model` and `reference` of the folder."""
    write_rows(folder / "rows.jsonl", rows())
    write_config(
        folder / "run.yaml",
        output_dir=str(folder),
        model={"path": str(folder / "model"), "dtype": "float32"},
        data={"train": [{"path": str(folder / "rows.jsonl")}], "max_length": 90, "kl_group_size": 3, "artifact": str(folder / "dataset")},
        reference={"path": str(folder / "reference"), "artifact": str(folder / "reference_logps")},
        batch={"global_batch_size": 16},
        optim=OPTIM,
        train={"max_steps": 1},
        **sections,
    )


# Beside the grid: a tied head, whose weight is embedding too, a clipped step, and every second layer checkpointed, its input on the host, against
# none; one rank without ZeRO against two with stage 3.
EXTRAS = {
    "tied": {1: ["--model.path", "tied"], 2: ["--model.path", "tied"]},
    "clipped": {1: ["--optim.max_grad_norm", "0.1"], 2: ["--optim.max_grad_norm", "0.1"]},
    "checkpointed": {1: ["--model.gradient_checkpointing", "false"], 2: ["--model.gradient_checkpointing_every", "2", "--model.gradient_checkpointing_offload", "true"]},
}
# Rows that two ranks share, none of which has room for the longest pair by itself, on one group of ranks and on two.
SHARED = [(2, stage, layout) for stage in STAGES for layout in ("packed", "prefix_shared")] + [(4, 3, "prefix_shared")]
SLOW_SHARED = [(2, stage, layout) for stage in SLOW_STAGES for layout in ("packed", "prefix_shared")]
SHARED_BUDGET = 48


def name_of(*parts) -> str:
    return "-".join(map(str, parts))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """One optimizer step of every combination but those of SLOW_STAGES, each a run folder named ranks-stage-budget-layout."""
    folder = tmp_path_factory.mktemp("split")
    torch.manual_seed(0)
    shape = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
    # Wider than usual, so that policy and reference differ enough; the order of the two makes z positive.
    for name in ("reference", "model"):
        LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.1, bos_token_id=1, eos_token_id=2, pad_token_id=0)).save_pretrained(folder / name)
        number_tokenizer(61).save_pretrained(folder / name)
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.1, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0)).save_pretrained(folder / "tied")
    number_tokenizer(61).save_pretrained(folder / "tied")
    write_one_step(folder, loss={"desirable_weight": 1.3, "undesirable_weight": 0.7})
    config = ["--config", str(folder / "run.yaml")]
    assert cli.run(["prepare", *config]) == 0
    run_commands(folder, [["precompute-ref", *config]], num_ranks=1)
    _take_steps(folder, STAGES, SHARED)
    for num_ranks, stage in zip(RANKS, (0, 3)):
        commands = []
        for extra, options in EXTRAS.items():
            options = [str(folder / option) if option == "tied" else option for option in options[num_ranks]]
            run = ["--output_dir", folder / name_of(extra, num_ranks), "--deepspeed.config", write_zero(folder, stage), "--batch.max_tokens_per_microbatch", 96]
            commands.append(["train", *config, *run, *options])
        run_commands(folder, commands, num_ranks=num_ranks)
    return folder


@pytest.fixture(scope="module")
def slow_runs(runs) -> Path:
    _take_steps(runs, SLOW_STAGES, SLOW_SHARED)
    return runs


def _take_steps(folder: Path, stages: tuple[int, ...], shared: list[tuple[int, int, str]]) -> None:
    config = ["--config", str(folder / "run.yaml")]
    for num_ranks in (*RANKS, 4):
        commands = [
            ["train", *config, "--output_dir", folder / name_of(num_ranks, stage, budget, layout), "--deepspeed.config", write_zero(folder, stage),
             "--batch.max_tokens_per_microbatch", BUDGETS[budget], "--model.layout", layout]
            for stage, budget, layout in itertools.product(stages, BUDGETS, LAYOUTS) if num_ranks in RANKS
        ] + [
            ["train", *config, "--output_dir", folder / name_of("shared", *split), "--deepspeed.config", write_zero(folder, split[1]), "--model.layout", split[2],
             "--batch.max_tokens_per_microbatch", SHARED_BUDGET, "--batch.sequence_parallel_size", 2]
            for split in shared if split[0] == num_ranks
        ]  # fmt: skip
        if commands:
            run_commands(folder, commands, num_ranks=num_ranks)


def weights_after(run: Path) -> dict[str, torch.Tensor]:
    _, folder = list_checkpoints(run / "checkpoints")[-1]
    return {name: weight.contiguous() for name, weight in read_weights(Checkpoint(folder, read_manifest(folder, kind="checkpoint", remedy=""))).items()}


@pytest.mark.parametrize("num_ranks, stage, budget, layout", list(itertools.product(RANKS, STAGES, BUDGETS, LAYOUTS)))
def test_step_does_not_depend_on_its_split(runs, num_ranks, stage, budget, layout):
    require_same_step(runs, runs / name_of(num_ranks, stage, budget, layout))


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks, stage, budget, layout", list(itertools.product(RANKS, SLOW_STAGES, BUDGETS, LAYOUTS)))
def test_nor_at_the_stages_between(slow_runs, num_ranks, stage, budget, layout):
    require_same_step(slow_runs, slow_runs / name_of(num_ranks, stage, budget, layout))


@pytest.mark.parametrize("shared", SHARED)
def test_nor_on_how_many_ranks_share_a_row(runs, shared):
    assert TokenizedSplit.load(runs / "dataset" / "train").longest_pair_tokens > SHARED_BUDGET
    require_same_step(runs, runs / name_of("shared", *shared))


@pytest.mark.slow
@pytest.mark.parametrize("shared", SLOW_SHARED)
def test_nor_there_on_how_many_ranks_share_a_row(slow_runs, shared):
    require_same_step(slow_runs, slow_runs / name_of("shared", *shared))


def require_same_step(runs: Path, split: Path) -> None:
    """Compare a run's step with that of one rank, which had all rows in one micro-batch, padded: metrics and gradient."""
    plain = runs / name_of(1, 0, "one", "padded")
    (wanted,), (found,) = read_metrics(plain), read_metrics(split)
    assert wanted["kl"] > 0.1 and wanted["count/chosen"] == 8
    for name in ("loss", "kl", "kl_stderr", "grad_norm", "logps/chosen", "logps/rejected"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-5), name
    # Means of small differences between large sums, in which rounding of the sums stays absolute.
    for name in ("rewards/chosen", "rewards/rejected"):
        assert found[name] == pytest.approx(wanted[name], abs=1e-5), name
    for label in ("chosen", "rejected"):
        assert found[f"logratios/{label}"] == wanted[f"logratios/{label}"] and sum(wanted[f"logratios/{label}"]) == 8
        assert found[f"length_correlation/{label}"] == pytest.approx(wanted[f"length_correlation/{label}"], abs=1e-4)
        for ours, theirs in zip(found[f"rewards_by_length/{label}"], wanted[f"rewards_by_length/{label}"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)
    assert found["rewards/auc"] == wanted["rewards/auc"]

    require_equal_gradients(runs / "model", plain, split)


def require_equal_gradients(model: Path, plain: Path, split: Path) -> dict[str, torch.Tensor]:
    """Compare what one step changed in two runs that began with `model`, parameter by parameter; return the gradient of the first."""
    before, after_plain, after_split = LlamaForCausalLM.from_pretrained(model), weights_after(plain), weights_after(split)
    gradients = {}
    for name, weight in before.named_parameters():
        gradients[name] = gradient = after_plain[f"lm.{name}"] - weight.detach()
        assert gradient.norm() > 1e-4, f"{name} has no gradient to compare"
        error = (after_split[f"lm.{name}"] - after_plain[f"lm.{name}"]).norm() / gradient.norm()
        assert error < 1e-5, f"{name}: the gradients differ by {error:.1e}"
    return gradients


def test_a_tied_head_under_zero3_gets_the_gradient_of_both_its_uses(runs):
    gradients = require_equal_gradients(runs / "tied", runs / "tied-1", runs / "tied-2")
    assert "lm_head.weight" not in gradients and "model.embed_tokens.weight" in gradients
    assert (runs / "tied-2" / "metrics.jsonl").exists()


def test_checkpointing_some_layers_with_inputs_on_the_host_changes_nothing_under_zero3(runs):
    require_equal_gradients(runs / "model", runs / "checkpointed-1", runs / "checkpointed-2")


def test_clipping_is_the_same_at_every_stage_and_the_norm_is_from_before_it(runs):
    gradients = require_equal_gradients(runs / "model", runs / "clipped-1", runs / "clipped-2")
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert float(norm) == pytest.approx(0.1, rel=1e-3)
    (unclipped,), (one,), (two,) = (read_metrics(runs / name) for name in (name_of(1, 0, "one", "padded"), "clipped-1", "clipped-2"))
    assert one["grad_norm"] == pytest.approx(unclipped["grad_norm"], rel=1e-5) and one["grad_norm"] > 0.5
    assert two["grad_norm"] == pytest.approx(unclipped["grad_norm"], rel=1e-5)


def test_the_splits_are_real(runs):
    split = TokenizedSplit.load(runs / "dataset" / "train")
    for num_ranks in RANKS:
        shares = share_out(
            torch.arange(split.num_examples).numpy(), pair_prompts=split.pair_prompts, pair_lengths=split.pair_lengths, prompt_lengths=split.prompt_lengths,
            layout="packed", max_tokens=BUDGETS["several"], num_ranks=num_ranks,
        )  # fmt: skip
        labels = [{bool(split.desirable[pair]) for unit in micro_batch for pair in unit.pairs} for share in shares for micro_batch in share]
        assert {True} in labels and all(len(share) > 2 for share in shares)
