"""What a resume compares, and what a checkpoint keeps beside weights: pure functions, and files without ranks."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import BaseModel

from kto_ds.artifacts import describe_folder, seal
from kto_ds.config import CheckpointConfig, RunConfig
from kto_ds.data.batch_plan import plan_batches
from kto_ds.errors import UserError
from kto_ds.runtime.retention import list_checkpoints, retain, sweep
from kto_ds.runtime.rng import derive_rng, restore_rng, rng_state
from kto_ds.runtime.unpickling import foreign_objects, weights_only
from kto_ds.stages.progress import Best, Progress, with_evaluation
from kto_ds.stages.resume import ALLOWED, FIXED, FREE, Change, changes, leaves

CPU = torch.device("cpu")


def dumped(**overrides) -> dict:
    given = {"output_dir": "runs/x", "model": {"path": "m"}, "data": {"train": [{"path": "rows.jsonl"}]}}
    return RunConfig.model_validate({**given, **overrides}).model_dump(mode="json")


# config


def config_keys(section: type[BaseModel], prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for name, field in section.model_fields.items():
        nested = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        keys |= config_keys(field.annotation, f"{prefix}{name}.") if nested else {prefix + name}
    return keys


def test_every_key_of_the_config_is_in_exactly_one_class():
    keys = config_keys(RunConfig)
    assert len(keys) > 50 and leaves(RunConfig, dumped()).keys() == keys
    assert FIXED | ALLOWED | FREE == keys, (keys - (FIXED | ALLOWED | FREE), (FIXED | ALLOWED | FREE) - keys)
    assert len(FIXED) + len(ALLOWED) + len(FREE) == len(keys)


def test_changes_are_found_by_key_and_what_is_newer_than_the_checkpoint_had_its_default():
    saved = dumped(optim={"learning_rate": 1e-3})
    assert changes(saved, saved) == []
    del saved["checkpoint"]["metric_for_best_model"]
    now = dumped(optim={"learning_rate": 2e-3}, report={"logging_steps": 5}, data={"train": [{"path": "other.jsonl"}]}, checkpoint={"metric_for_best_model": "eval/loss"})
    found = {change.key: (change.was, change.now) for change in changes(saved, now)}
    assert found.keys() == {"optim.learning_rate", "report.logging_steps", "data.train", "checkpoint.metric_for_best_model"}
    assert found["optim.learning_rate"] == (1e-3, 2e-3) and found["checkpoint.metric_for_best_model"] == (None, "eval/loss")
    assert str(Change("seed", 1, 2)) == "seed: was 1, now 2"


def test_a_plan_that_begins_alike_has_one_digest_up_to_there():
    groups = np.repeat(np.arange(8), 4)
    plan = lambda seed, epochs: plan_batches(groups, global_batch_size=8, num_train_epochs=epochs, max_steps=None, shuffle=True, seed=seed)  # noqa: E731
    short, long, other = plan(1, 2), plan(1, 5), plan(2, 2)
    assert short.digest_until(8) == long.digest_until(8) and long.digest_until(8) != long.digest_until(9)
    assert short.digest_until(3) != other.digest_until(3)


# progress


def test_progress_is_the_same_after_it_was_json():
    progress = Progress(step=7, examples=56, skipped=2, skipped_in_a_row=1, recent_losses=(0.1, 1 / 3), best=Best("eval/rewards/auc", True, 0.7, 4))
    assert Progress.from_json(json.loads(json.dumps(progress.to_json()))) == progress
    assert Progress.from_json(json.loads(json.dumps(Progress().to_json()))) == Progress()


@pytest.mark.parametrize(("settings", "values", "best"), [
    ({"metric_for_best_model": "eval/rewards/auc"}, [0.5, 0.7, 0.7, 0.6], Best("eval/rewards/auc", True, 0.7, 2)),
    ({"metric_for_best_model": "eval/loss"}, [0.5, 0.3, 0.3, 0.4], Best("eval/loss", False, 0.3, 2)),
    ({"metric_for_best_model": "eval/kl", "greater_is_better": False}, [3.0, 2.0, 1.0, 4.0], Best("eval/kl", False, 1.0, 3)),
    ({}, [0.5, 0.7], None),
])  # fmt: skip
def test_the_best_is_the_first_of_the_best(settings, values, best):
    checkpoint, progress = CheckpointConfig(**settings), Progress()
    name = (checkpoint.metric_for_best_model or "eval/loss").removeprefix("eval/")
    for step, value in enumerate(values, start=1):
        progress = with_evaluation(progress._replace(step=step), checkpoint, "eval", {name: value})
        progress = with_evaluation(progress, checkpoint, "eval/other", {name: 100.0 - value})
    assert progress.best == best


def test_greater_is_better_is_about_a_metric():
    with pytest.raises(ValueError, match="metric_for_best_model"):
        CheckpointConfig(greater_is_better=True)


# random generators


def draw() -> list[float]:
    return [torch.rand(()).item(), random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.standard_normal())]


def test_generators_go_on_where_they_were():
    derive_rng(3, 5, 0, CPU)
    draw()  # leaves half of a pair of normal deviates behind in two of them
    state = rng_state(CPU)
    wanted = [draw() for _ in range(3)]
    derive_rng(9, 9, 9, CPU)
    restore_rng(state, CPU)
    assert [draw() for _ in range(3)] == wanted


def test_generators_are_seeded_by_seed_step_and_rank():
    drawn = set()
    for place in [(1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0)]:
        derive_rng(*place, CPU)
        drawn.add(tuple(draw()))
    derive_rng(1, 0, 0, CPU)
    assert len(drawn) == 4 and tuple(draw()) in drawn


# folders


def checkpoint(root: Path, step: int) -> Path:
    folder = root / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "data").write_bytes(bytes(10))
    seal(folder, {"kind": "checkpoint", "step": step}, describe_folder(folder))
    return folder


def steps(root: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(root)]


def test_the_newest_and_the_best_are_kept_and_what_is_damaged_neither_counts_nor_goes(tmp_path):
    for step in range(1, 9):
        checkpoint(tmp_path, step)
    (tmp_path / "step-00000007" / "data").unlink()
    (tmp_path / "step-00000002.corrupt.1").mkdir()
    retain(tmp_path, save_total_limit=2, best_step=3)
    assert steps(tmp_path) == [3, 6, 7, 8] and (tmp_path / "step-00000002.corrupt.1").is_dir()
    retain(tmp_path, save_total_limit=2, best_step=None)
    assert steps(tmp_path) == [6, 7, 8]
    assert not list(tmp_path.glob(".del-*"))


def test_only_what_is_half_written_or_half_deleted_is_swept(tmp_path):
    kept = [checkpoint(tmp_path, 4), tmp_path / "step-00000002.corrupt.1", tmp_path / "notes"]
    for path in [*kept[1:], *(tmp_path / name for name in (".tmp-step-00000006", ".del-step-00000002", ".universal-step-00000004", ".tmp-universal-step-00000004"))]:
        (path / "state").mkdir(parents=True)
    for half_written in (tmp_path / ".latest.77.tmp", kept[0] / ".manifest.json.77.tmp"):
        half_written.write_text("step")
    whole = sorted(path.name for path in kept[0].iterdir() if not path.name.endswith(".tmp"))
    sweep(tmp_path)
    assert sorted(path.name for path in kept[0].iterdir()) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in kept)


# unpickling


class Payload:
    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return __import__("os").mknod, (self.marker,)


@pytest.mark.parametrize("wrap", [lambda payload: payload, lambda payload: {"state": [{"step": (payload, torch.ones(2))}]}], ids=["plain", "nested"])
def test_a_payload_is_named_and_not_run(tmp_path, wrap):
    marker, path = tmp_path / "marker", tmp_path / "state.pt"
    torch.save(wrap(Payload(marker)), path)
    assert foreign_objects(path) == ["'state.pt' would run 'posix.mknod'"]
    with weights_only(), pytest.raises(UserError, match="state.pt: cannot be read as tensors and plain values"):
        torch.load(path, weights_only=False)  # as DeepSpeed does
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the payload works where nobody stops it"


def test_what_deepspeed_saves_is_read(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    path = tmp_path / "state.pt"
    torch.save({"zero_stage": ZeroStageEnum.weights, "loss_scaler": LossScaler(1.0), "at": fragment_address(3, 4), "weights": torch.arange(5.0)}, path)
    assert foreign_objects(path) == []
    load = torch.load
    with weights_only():
        assert torch.load(path)["zero_stage"] is ZeroStageEnum.weights
    assert torch.load is load and LossScaler not in torch.serialization.get_safe_globals()
