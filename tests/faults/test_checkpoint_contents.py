"""Checkpoints that hold code are refused wherever they are read, and a config that has changed takes effect or is refused."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch

from kto_ds.artifacts import canonical_json, describe_folder, digest_of, read_manifest, seal
from tests.distributed import ranks
from tests.distributed.tiny_run import config_of
from tests.faults.fed import go_back_to
from tests.faults.ledger import tally
from tests.faults.state import newest_intact, step_of

pytestmark = pytest.mark.distributed

READERS = {"resume": ("train", 2), "conversion": ("train", 1), "export": ("export", 1), "verify": ("verify", 1)}


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return __import__("os").mknod, (self.marker,)


def poison(run: Path, pattern: str, marker: Path) -> None:
    """Put a payload into a file of the newest checkpoint, with digests that fit."""
    folder = newest_intact(run)
    manifest = read_manifest(folder, kind="checkpoint", remedy="")
    path = next((folder / "state").glob(pattern))
    torch.save({**torch.load(path, map_location="cpu", weights_only=False), "more": [{"nested": Payload(marker)}]}, path)
    seal(folder, {key: value for key, value in manifest.items() if key not in ("format", "files", "digest")}, describe_folder(folder))


def look_at_nothing(rank: int) -> None:
    """Leave out what looks for code ahead of the reading: the reading itself must not run it either."""
    from kto_ds.runtime import restore

    restore.foreign_objects = lambda path: []


@pytest.mark.parametrize(("reader", "looks_ahead"), [("resume", True), ("conversion", False), ("export", False), *(pytest.param(reader, ahead, marks=pytest.mark.slow)
    for reader, ahead in [("resume", False), ("conversion", True), ("export", True), ("verify", True)])])  # fmt: skip
def test_a_payload_with_fitting_digests_is_refused_and_not_run(tiny, unbroken, tmp_path, reader, looks_ahead):
    run, marker = tmp_path / "run", tmp_path / "marker"
    shutil.copytree(unbroken.run, run)
    go_back_to(run, 10)
    poison(run, "*_0_*model_states.pt" if reader == "export" else "*_0_*optim_states.pt", marker)
    command, num_ranks = READERS[reader]
    with tally("R21", "pickle payload in a checkpoint with fitting digests: resume, conversion, export, verify", stock="the payload ran") as counts:
        counts.injected += 1
        exit_codes, output = ranks.run([command, *config_of(tiny, output_dir=run)], log=tmp_path / "log", num_ranks=num_ranks, before=ranks.nothing if looks_ahead else look_at_nothing)
        assert 2 in exit_codes and 0 not in exit_codes, f"{exit_codes}\n{output[-3000:]}"
        assert "states.pt" in output and ("posix.mknod" in output) and not marker.exists(), output[-3000:]
        counts.survived += 1
    folder = newest_intact(run)
    torch.load(next((folder / "state").glob("*_0_*model_states.pt" if reader == "export" else "*_0_*optim_states.pt")), weights_only=False)
    assert marker.exists(), "the payload works where nobody stops it"


@pytest.mark.parametrize("change", [pytest.param({"format": 99}, id="format"), pytest.param({"progress": None}, id="fields", marks=pytest.mark.slow)])
def test_a_checkpoint_of_another_version_is_refused_and_stays(tiny, unbroken, tmp_path, change):
    """It is whole, and somebody can still read it: to set it aside and go on from an older one would lose steps without need."""
    run = tmp_path / "run"
    shutil.copytree(unbroken.run, run)
    path = newest_intact(run) / "manifest.json"
    manifest = {key: value for key, value in json.loads(path.read_text()).items() if key != "digest"} | change
    path.write_text(json.dumps({**manifest, "digest": digest_of(canonical_json(manifest))}))
    with tally("R25", "a checkpoint of another version: refused, and left as it is") as counts:
        counts.injected += 1
        exit_codes, output = ranks.run(["train", *config_of(tiny, output_dir=run)], log=tmp_path / "log", num_ranks=1)
        assert exit_codes == [2] and "version" in output and path.exists() and not list(run.glob("checkpoints/*.corrupt.*")), output[-3000:]
        counts.survived += 1


def saved_groups(run: Path) -> list[dict]:
    saved = torch.load(next((newest_intact(run) / "state").glob("*_0_*optim_states.pt")), map_location="cpu", weights_only=False)
    return saved["optimizer_state_dict"]["optimizer_state_dict"]["param_groups"]


def test_a_changed_config_is_refused_or_takes_effect(tiny, unbroken, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unbroken.run, run)
    go_back_to(run, 10)
    start = functools.partial(ranks.run, log=tmp_path / "log")
    exit_codes, output = start(["train", *config_of(tiny, output_dir=run, loss__beta=0.2, optim__adam_beta2=0.9)])
    assert exit_codes == [2, 2] and "loss.beta: this run has 0.2, the checkpoint has 0.1" in output, output[-3000:]
    changed = config_of(tiny, output_dir=run, optim__adam_beta2=0.9, optim__weight_decay=0.3, optim__learning_rate=5e-4, report__logging_steps=2)
    exit_codes, output = start(["train", *changed])
    assert exit_codes == [2, 2] and "optim.adam_beta2: was 0.999, now 0.9" in output and "--accept-changes" in output and "logging_steps" not in output, output[-3000:]
    assert step_of(newest_intact(run)) == 10

    exit_codes, output = start(["train", *changed, "--accept-changes"])
    assert exit_codes == [0, 0], output[-3000:]
    lines = {line for line in output.splitlines() if line.startswith("changed since step-00000010: ")}
    assert {line.split(": ", 1)[1] for line in lines if "output_dir" not in line} == {
        "optim.learning_rate: was 0.001, now 0.0005", "optim.adam_beta2: was 0.999, now 0.9", "optim.weight_decay: was 0.0, now 0.3", "report.logging_steps: was 1, now 2",
    }  # fmt: skip
    [now], [was] = saved_groups(run), saved_groups(unbroken.run)
    assert (tuple(now["betas"]), now["weight_decay"]) == ((0.9, 0.9), 0.3) and tuple(was["betas"]) == (0.9, 0.999)
    rates = [json.loads(line).get("learning_rate") for line in (run / "metrics.jsonl").read_text().splitlines()]
    before = [json.loads(line).get("learning_rate") for line in (unbroken.run / "metrics.jsonl").read_text().splitlines()]
    assert [rate for rate in rates if rate][-1] == pytest.approx([rate for rate in before if rate][-1] / 2, rel=1e-12), "half the peak, the same schedule"


@pytest.mark.slow
def test_the_best_step_is_saved_kept_and_exported(tiny, tmp_path):
    run = tmp_path / "run"
    settings = config_of(tiny, output_dir=run, checkpoint__metric_for_best_model="eval/logps/chosen", checkpoint__greater_is_better="true", eval__eval_steps=3, checkpoint__save_steps=2)
    ranks.require_success(["train", *settings], log=tmp_path / "log")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = max((record for record in records if record["split"] == "eval"), key=lambda record: record["logps/chosen"])
    newest = newest_intact(run)
    assert {path.suffix for path in newest.rglob("*") if path.is_file()} == {".pt", ".json", ".safetensors"}, "no scripts"
    found = json.loads((newest / "manifest.json").read_text())["progress"]
    assert found["best"] == {"metric": "eval/logps/chosen", "is_greatest": True, "value": best["logps/chosen"], "step": best["step"]} and found["examples"] == 96 and found["step"] == 12
    kept = sorted(step_of(folder) for folder in (run / "checkpoints").glob("step-*"))
    assert kept == sorted({best["step"], 10, 12}), (kept, best)
    assert best["step"] in (3, 9), "a step that no save_steps would have saved, and that is not among the newest"
    output = ranks.require_success(["export", *settings, "--checkpoint", "best"], log=tmp_path / "log", num_ranks=1)
    assert f"exported step {best['step']} to" in output
    exit_codes, output = ranks.run(["train", *settings, "--checkpoint.metric_for_best_model", "eval/rewards/auk"], log=tmp_path / "log")
    assert exit_codes == [2, 2] and "eval/rewards/auc" in output, output[-2000:]


@pytest.mark.slow
def test_a_checkpoint_under_another_name_is_set_aside(tiny, unbroken, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unbroken.run, run)
    (run / "checkpoints" / "step-00000010").rename(run / "checkpoints" / "step-00000014")
    output = ranks.require_success(["train", *config_of(tiny, output_dir=run)], log=tmp_path / "log")
    assert "it is the checkpoint of step 10, under another name" in output and "nothing left to do" in output, output[-2000:]
