"""Training as a user starts it: the ZeRO-3 trace, bfloat16, NaN, what an export is worth. Two ranks unless said otherwise; what ends and damages runs is in tests/faults."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from kto_ds.runtime.retention import list_checkpoints
from tests.distributed import ranks
from tests.distributed.runs import read_metrics, write_zero
from tests.distributed.tiny_run import RARE_TOKEN, config_of, status_of

pytestmark = pytest.mark.distributed


def test_one_process_group_of_runs(tiny, tmp_path):
    """What needs two ranks but no process of its own: the trace, a profile, a sampled reference point, bfloat16 at every stage."""
    plain = {"checkpoint__resume": "never"}
    commands = [
        ["train", *config_of(tiny, output_dir=tmp_path / "trace1", train__max_steps=1, **plain), "--profile"],
        ["train", *config_of(tiny, output_dir=tmp_path / "trace5", train__max_steps=5, report__wandb__mode="offline", **plain), "--profile"],
        ["train", *config_of(tiny, output_dir=tmp_path / "fraction", train__max_steps=5, loss__kl_fraction=0.5, **plain)],
        *(
            ["train", *config_of(tiny, output_dir=tmp_path / f"bf16-{stage}", deepspeed__config=write_zero(tmp_path, stage), model__dtype="bfloat16",
                                 reference__artifact=tmp_path / "reference_bf16", train__max_steps=3, **plain)]
            for stage in (0, 1, 2, 3)
        ),
    ]  # fmt: skip
    ranks.run_commands(tmp_path, [["precompute-ref", *config_of(tiny, model__dtype="bfloat16", reference__artifact=tmp_path / "reference_bf16")]], num_ranks=1)
    one, five, fraction, *_ = ranks.run_commands(tmp_path, commands, num_ranks=2)
    assert fraction["invalidations"] == five["invalidations"] == one["invalidations"], "the parameter trace is thrown away after step 1"
    assert not (tmp_path / "trace1" / "profile" / "rank0.json.gz").exists(), "no step was recorded"
    require_profile_of_three_steps(tmp_path / "trace5" / "profile" / "rank0.json.gz")
    require_sampled_reference_points(read_metrics(tmp_path / "fraction"), read_metrics(tmp_path / "trace5"))

    wanted = read_metrics(tmp_path / "trace5")
    assert list((tmp_path / "trace5" / "wandb").glob("offline-run-*/*.wandb"))
    for stage in (0, 1, 2, 3):
        found = read_metrics(tmp_path / f"bf16-{stage}")
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


@pytest.fixture(scope="module")
def broken(tiny, tmp_path_factory) -> Path:
    """The model with NaN in what one token looks up, which stands in line 6 of the rows only."""
    folder = Path(shutil.copytree(tiny / "model", tmp_path_factory.mktemp("broken") / "model"))
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][RARE_TOKEN] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_nan_stops_all_ranks_before_the_update_and_names_the_row(tiny, broken, tmp_path):
    run = tmp_path / "run"
    exit_codes, output = ranks.run(["train", *config_of(tiny, model__path=broken, reference__path=tiny / "model", output_dir=run)], log=tmp_path / "log")
    assert exit_codes == [3, 3], output[-4000:]
    errors = [line for line in output.splitlines() if "kto-ds: error" in line]
    assert len(errors) == 1 and "rows.jsonl:6" in errors[0], errors
    assert "Traceback" not in output
    status = status_of(run)
    assert (status["state"], status["exit_code"]) == ("failed", 3)
    bad_step = status["step"] + 1
    assert f"step {bad_step}" in errors[0]
    assert all(step < bad_step for step, _ in list_checkpoints(run / "checkpoints"))


def test_nan_in_the_reference_leaves_no_artefact(tiny, broken, tmp_path):
    target = tmp_path / "reference"
    exit_codes, output = ranks.run(["precompute-ref", *config_of(tiny, reference__path=broken, reference__artifact=target)], log=tmp_path / "log")
    assert exit_codes == [3, 3], output[-4000:]
    assert "rows.jsonl:6" in output and "Traceback" not in output
    assert not target.exists()


def test_evaluate_and_export_agree_with_training(tiny, unbroken, tmp_path):
    """The exported model, scored by one process without DeepSpeed, gives the last evaluation of the two-rank run."""
    run = Path(shutil.copytree(unbroken.run, tmp_path / "run"))
    for command in ("export", "evaluate"):
        ranks.require_success([command, *config_of(tiny, output_dir=run)], log=tmp_path / "log", num_ranks=1)
    found = json.loads((run / "evaluation.json").read_text())["splits"]["eval"]
    wanted = read_metrics(run, "eval")[-1]
    assert wanted["step"] == 12
    for name in ("loss", "kl_raw", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/auc"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-5), name
    assert (run / "metrics.png").stat().st_size > 10_000
    card = (run / "export" / "README.md").read_text()
    assert "32 examples" in card and "| eval | loss |" in card
