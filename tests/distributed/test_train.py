"""Training as a user starts it: resume after kill -9, the ZeRO-3 trace, bfloat16, NaN, refusals. Two ranks unless said otherwise."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kto_ds.artifacts import read_manifest
from kto_ds.runtime.restore import Checkpoint, read_weights
from kto_ds.runtime.retention import list_checkpoints
from tests.distributed.runs import launch, launch_and_kill, launcher, read_metrics, run_commands, write_zero
from tests.distributed.tiny_run import RARE_TOKEN, config_of, make_tiny_run, status_of, without_timings

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with model, run.yaml, dataset and reference artefact of 32 examples: 4 steps an epoch, 3 epochs."""
    folder = make_tiny_run(tmp_path_factory.mktemp("train"))
    run_commands(folder, [["precompute-ref", *config_of(folder)]], num_ranks=1)
    return folder


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    _, folder = list_checkpoints(run / "checkpoints")[-1]
    return read_weights(Checkpoint(folder, read_manifest(folder, kind="checkpoint", remedy="")))


@pytest.mark.slow  # tests/faults has a quicker one
def test_a_killed_run_ends_like_an_unbroken_one_bit_for_bit(prepared):
    def command(name: str) -> list[str]:
        return [*launcher(2), "--module", "kto_ds", "train", *config_of(prepared, output_dir=prepared / name)]

    unbroken = launch(command("unbroken"))
    assert unbroken.returncode == 0, unbroken.stdout[-4000:]
    assert [step for step, _ in list_checkpoints(prepared / "unbroken" / "checkpoints")] == [10, 12], "retention keeps two"

    launch_and_kill(command("killed"), when=prepared / "killed" / "checkpoints" / "step-00000004")
    assert status_of(prepared / "killed")["state"] == "running", "the run ended before it was killed"
    done_before = [step for step, _ in list_checkpoints(prepared / "killed" / "checkpoints")]
    assert 4 in done_before and 12 not in done_before
    resumed = launch(command("killed"))
    assert resumed.returncode == 0, resumed.stdout[-4000:]
    assert f"resuming at step {max(done_before) + 1} of 12" in resumed.stdout

    wanted, found = final_weights(prepared / "unbroken"), final_weights(prepared / "killed")
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)
    for split in ("train", "eval"):
        assert without_timings(read_metrics(prepared / "killed", split)) == without_timings(read_metrics(prepared / "unbroken", split))
    assert status_of(prepared / "killed") == {"state": "completed", "step": 12, "exit_code": 0, "reason": ""}


def test_one_process_group_of_runs(prepared):
    """What needs two ranks but no process of its own: the trace, a profile, a sampled reference point, bfloat16 at every stage."""
    plain = {"checkpoint__resume": "never"}
    commands = [
        ["train", *config_of(prepared, output_dir=prepared / "trace1", train__max_steps=1, **plain), "--profile"],
        ["train", *config_of(prepared, output_dir=prepared / "trace5", train__max_steps=5, report__wandb__mode="offline", **plain), "--profile"],
        ["train", *config_of(prepared, output_dir=prepared / "fraction", train__max_steps=5, loss__kl_fraction=0.5, **plain)],
        *(
            ["train", *config_of(prepared, output_dir=prepared / f"bf16-{stage}", deepspeed__config=write_zero(prepared, stage), model__dtype="bfloat16",
                                 reference__artifact=prepared / "reference_bf16", train__max_steps=3, **plain)]
            for stage in (0, 1, 2, 3)
        ),
    ]  # fmt: skip
    run_commands(prepared, [["precompute-ref", *config_of(prepared, model__dtype="bfloat16", reference__artifact=prepared / "reference_bf16")]], num_ranks=1)
    one, five, fraction, *_ = run_commands(prepared, commands, num_ranks=2)
    assert fraction["invalidations"] == five["invalidations"] == one["invalidations"], "the parameter trace is thrown away after step 1"
    assert not (prepared / "trace1" / "profile" / "rank0.json.gz").exists(), "no step was recorded"
    require_profile_of_three_steps(prepared / "trace5" / "profile" / "rank0.json.gz")
    require_sampled_reference_points(read_metrics(prepared / "fraction"), read_metrics(prepared / "trace5"))

    wanted = read_metrics(prepared / "trace5")
    assert list((prepared / "trace5" / "wandb").glob("offline-run-*/*.wandb"))
    for stage in (0, 1, 2, 3):
        found = read_metrics(prepared / f"bf16-{stage}")
        assert len(found) == 3
        for have, want in zip(found, wanted):
            # bfloat16 has 8 bits: sums of about 100 log-probs near -4 are good to about 1 in 400
            assert have["logps/rejected"] == pytest.approx(want["logps/rejected"], rel=5e-3)
            assert have["loss"] == pytest.approx(want["loss"], abs=0.02)


def require_profile_of_three_steps(path: Path) -> None:
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert {event["name"] for event in events if event["name"].startswith("ProfilerStep")} == {"ProfilerStep#2", "ProfilerStep#3", "ProfilerStep#4"}
    assert {"aten::mm", "kl", "policy", "update"} <= {event["name"] for event in events}


def require_sampled_reference_points(sampled: list[dict], whole: list[dict]) -> None:
    """One of a step's two KL groups estimates z, whose error nobody can tell then; the first step's examples are scored by the same weights."""
    assert sampled[0]["logps/chosen"] == whole[0]["logps/chosen"] and sampled[0]["tflops"] > 0
    assert not any("kl_stderr" in record for record in sampled) and all("kl_stderr" in record for record in whole)
    assert [record["kl_raw"] for record in sampled] != [record["kl_raw"] for record in whole]
    assert all(record["seconds"] == pytest.approx(sum(record[f"seconds/{phase}"] for phase in ("kl", "policy", "update", "host"))) for record in sampled)


def test_nan_stops_all_ranks_before_the_update_and_names_the_row(prepared):
    broken = prepared / "broken"
    broken.mkdir()
    for path in (prepared / "model").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][RARE_TOKEN] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    overrides = dict(model__path=broken, reference__path=prepared / "model", output_dir=prepared / "nan", deepspeed__config=write_zero(prepared, 3))

    done = launch([*launcher(2), "--module", "kto_ds", "train", *config_of(prepared, **overrides)])
    assert done.returncode == 3, done.stdout[-4000:]
    errors = [line for line in done.stdout.splitlines() if "kto-ds: error" in line]
    assert len(errors) == 1 and "rows.jsonl:6" in errors[0] and "step " in errors[0], errors
    assert "Traceback" not in done.stdout
    status = status_of(prepared / "nan")
    assert (status["state"], status["exit_code"]) == ("failed", 3)
    bad_step = status["step"] + 1
    assert f"step {bad_step}" in errors[0]
    assert all(step < bad_step for step, _ in list_checkpoints(prepared / "nan" / "checkpoints"))


def test_nan_in_the_reference_leaves_no_artefact(prepared):
    target = prepared / "reference_nan"
    done = launch([*launcher(2), "--module", "kto_ds", "precompute-ref", *config_of(prepared, reference__path=prepared / "broken", reference__artifact=target)])
    assert done.returncode == 3, done.stdout[-4000:]
    assert "rows.jsonl:6" in done.stdout and "Traceback" not in done.stdout
    assert not target.exists()


@pytest.mark.slow  # tests/faults has a quicker one
def test_a_flipped_byte_is_found_and_the_checkpoint_before_it_is_used(prepared):
    run = prepared / "killed"
    _, newest = list_checkpoints(run / "checkpoints")[-1]
    damaged = next((newest / "state").glob("*optim_states.pt"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    done = launch([*launcher(2), "--module", "kto_ds", "train", *config_of(prepared, output_dir=run)])
    assert done.returncode == 0, done.stdout[-4000:]
    assert damaged.name in done.stdout and "resuming at step 11 of 12" in done.stdout, done.stdout[-4000:]
    assert newest.with_name(newest.name + ".corrupt.1").is_dir()
    wanted, found = final_weights(prepared / "unbroken"), final_weights(run)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


@pytest.mark.slow  # tests/faults has a quicker one
def test_another_rank_count_is_converted_and_another_config_refused_on_resume(prepared):
    """One rank meets the two-rank checkpoints of test_a_killed_run_..., which has nothing left to do; then another learning rate."""
    command = [*launcher(1), "--module", "kto_ds", "train", *config_of(prepared, output_dir=prepared / "unbroken")]
    done = launch(command)
    assert done.returncode == 0 and "converted step-00000012 of 2 ranks for 1" in done.stdout and "nothing left to do" in done.stdout, done.stdout[-3000:]
    done = launch([*command, "--optim.learning_rate", "0.5"])
    assert done.returncode == 2 and "learning_rate" in done.stdout and "0.001" in done.stdout, done.stdout[-3000:]


def test_evaluate_and_export_agree_with_training(prepared):
    """The exported model, scored by one process without DeepSpeed, gives the last evaluation of the two-rank run."""
    config = config_of(prepared, output_dir=prepared / "unbroken")
    run_commands(prepared, [["export", *config], ["evaluate", *config]], num_ranks=1)
    found = json.loads((prepared / "unbroken" / "evaluation.json").read_text())["splits"]["eval"]
    wanted = read_metrics(prepared / "unbroken", "eval")[-1]
    assert wanted["step"] == 12
    for name in ("loss", "kl_raw", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/auc"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-5), name
    assert (prepared / "unbroken" / "metrics.png").stat().st_size > 10_000
    card = (prepared / "unbroken" / "export" / "README.md").read_text()
    assert "32 examples" in card and "| eval | loss |" in card
