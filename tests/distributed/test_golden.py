"""kto_ds through its command line against recorded runs of TRL 1.16 on the same rows, model and options."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kto_ds import cli
from tests.distributed.ranks import run_commands
from tests.distributed.runs import GOLDEN, conversation, number_tokenizer, read_metrics, write_config, write_rows, write_zero

TRACES = json.loads((GOLDEN / "trl_traces.json").read_text())
STAGES = (0, 3)
# Log-probs are fp32 sums over hundreds of tokens; z and rewards are small differences of such sums.
TOLERANCES = {
    "loss": 1e-4, "grad_norm": 1e-4, "logps/chosen": 1e-4, "logps/rejected": 1e-4, "kl": 5e-4, "rewards/chosen": 5e-4, "rewards/rejected": 5e-4,
}  # fmt: skip
SMALLEST = 1e-2  # what is smaller is compared as if it had this size
# The log-probs of the longest rows are sums of 2,048 to 4,096 nats, of which float32 holds steps of 2**-12. Policy and reference score a row in other
# company, so that one of the two may be rounded up where the other is rounded down, and a reward that is 0 in TRL becomes beta times such a step.
LOGP_STEP = 2**-12

pytestmark = pytest.mark.distributed


def commands_for(folder: Path, num_ranks: int) -> list[list[str]]:
    """precompute-ref once, then train and export every case at every stage, all from one config and a few overrides."""
    config = ["--config", str(folder / "run.yaml"), "--reference.artifact", str(folder / f"reference{num_ranks}")]
    commands = [["precompute-ref", *config]]
    for case, recorded in TRACES["cases"].items():
        options = [part for key, value in recorded["options"].items() for part in (f"--loss.{key}", str(value))]
        for stage in STAGES:
            run = ["--output_dir", str(folder / f"{case}-{num_ranks}-{stage}"), "--data.artifact", str(folder / "dataset"), "--deepspeed.config", write_zero(folder, stage)]
            commands.append(["train", *config, *options, *run])
    return commands


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Every case on 1 and on 2 ranks, at stage 0 and 3; returns the folder of the run folders."""
    folder = tmp_path_factory.mktemp("golden")
    shutil.copytree(GOLDEN / "model", folder / "model")
    number_tokenizer(1024).save_pretrained(folder / "model")
    write_rows(folder / "rows.jsonl", [conversation(row["prompt_ids"], row["completion_ids"], row["label"]) for row in TRACES["examples"]])
    write_config(
        folder / "run.yaml",
        output_dir=str(folder),
        model={"path": str(folder / "model"), "dtype": "float32"},
        data={"train": [{"path": str(folder / "rows.jsonl")}], "max_length": TRACES["max_length"], "shuffle": False, "kl_group_size": TRACES["batch"]},
        batch={"global_batch_size": TRACES["batch"], "max_tokens_per_microbatch": 1400},
        optim={"learning_rate": TRACES["learning_rate"], "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "max_grad_norm": 0.0, "weight_decay": 0.0},
    )  # fmt: skip
    assert cli.run(["prepare", "--config", str(folder / "run.yaml")]) == 0
    for num_ranks in (1, 2):
        run_commands(folder, commands_for(folder, num_ranks), num_ranks=num_ranks)
    return folder


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("case", TRACES["cases"])
def test_every_step_is_that_of_trl(runs, case, num_ranks, stage):
    found, wanted = read_metrics(runs / f"{case}-{num_ranks}-{stage}"), TRACES["cases"][case]["steps"]
    assert len(found) == len(wanted)
    beta, compared = TRACES["cases"][case]["options"].get("beta", 0.1), 0
    for have, want in zip(found, wanted):
        for name in TOLERANCES.keys() & want.keys():
            error = abs(have[name] - want[name])
            rounding = beta * LOGP_STEP if name.startswith("rewards/") else 0.0
            assert error < max(TOLERANCES[name] * max(abs(want[name]), SMALLEST), rounding), f"step {have['step']} {name}: {have[name]}, TRL {want[name]}"
            compared += 1
    assert compared >= len(wanted) * 6


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("case", TRACES["cases"])
def test_trained_weights_have_the_norms_of_trl(runs, case, num_ranks, stage):
    run = runs / f"{case}-{num_ranks}-{stage}"
    config = ["--config", str(run / "config.yaml")]
    assert cli.run(["export", *config]) == 0
    weights = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32).state_dict()
    wanted = TRACES["cases"][case]["final_parameter_norms"]
    assert weights.keys() == wanted.keys()
    for name, norm in wanted.items():
        assert float(weights[name].double().norm()) == pytest.approx(norm, rel=1e-5), name


def test_reference_log_probs_are_those_of_trl(runs):
    from kto_ds.data.dataset import TokenizedSplit
    from kto_ds.data.keys import find
    from kto_ds.data.reference import read_shards

    split, batch = TokenizedSplit.load(runs / "dataset" / "train"), TRACES["batch"]
    for num_ranks in (1, 2):
        scored = read_shards((runs / f"reference{num_ranks}").glob("*.safetensors"))
        places = find(scored.keys, split.pair_keys)
        assert (places >= 0).all()
        logps = scored.logps[places]
        for row, example in enumerate(TRACES["examples"]):
            # TRL's row i has the completion of row i - 1 of its batch; our pair E + j is completion j, behind the next prompt.
            donor = row - 1 if row % batch else row + batch - 1
            assert logps[row] == pytest.approx(example["ref_logps"], rel=1e-5)
            assert logps[split.num_examples + donor] == pytest.approx(example["ref_KL_logps"], rel=1e-5)
    one, two = (sorted((path.name, path.read_bytes()) for path in (runs / f"reference{num_ranks}").iterdir()) for num_ranks in (1, 2))
    assert one == two, "the artefacts depend on the number of ranks"
