"""The best step is known after any number of stops."""

import json

import pytest

from kto_ds.artifacts import seal
from tests.distributed import ranks
from tests.distributed.tiny_run import config_of
from tests.faults.fed import go_back_to
from tests.faults.state import newest_intact

pytestmark = pytest.mark.distributed


def best_of(run) -> dict | None:
    return json.loads((newest_intact(run) / "manifest.json").read_text())["progress"]["best"]


@pytest.mark.slow
def test_an_evaluation_that_is_newer_than_the_checkpoint_counts(tiny, tmp_path):
    """Stopped within the evaluation of step 4, so saved without it; started again, which made up for it; killed before the next save."""
    settings = dict(checkpoint__metric_for_best_model="eval/loss", train__max_steps=8)
    command = ["train", *config_of(tiny, output_dir=tmp_path / "run", **settings)]
    ranks.require_success(command, log=tmp_path / "log", num_ranks=1)
    wanted = best_of(tmp_path / "run")
    assert wanted["step"] == 4
    go_back_to(tmp_path / "run", 4)
    folder = tmp_path / "run" / "checkpoints" / "step-00000004"
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("format", "digest"):
        del manifest[name]
    files = manifest.pop("files")
    seal(folder, {**manifest, "progress": {**manifest["progress"], "best": None}}, files)
    ranks.require_success(command, log=tmp_path / "log", num_ranks=1)
    assert best_of(tmp_path / "run") == wanted
