"""The tiny run that several tests start from or put faults into, and how it ends without any: a fault in it must not show in the end."""

import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.distributed import ranks
from tests.distributed.tiny_run import config_of, make_tiny_run
from tests.faults.state import final_state


class Unbroken(NamedTuple):
    run: Path
    state: dict
    seconds: float  # from the start to the end
    step_seconds: float  # from the first record to the last


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with model, run.yaml, dataset and reference artefact; see make_tiny_run."""
    folder = make_tiny_run(tmp_path_factory.mktemp("tiny"))
    ranks.require_success(["precompute-ref", *config_of(folder)], log=folder / "log", num_ranks=1)
    return folder


@pytest.fixture(scope="session")
def unbroken(tiny) -> Unbroken:
    """The run on two ranks without a fault."""
    run = tiny / "unbroken"
    ranks.require_success(["train", *config_of(tiny, output_dir=tiny / "warm", train__max_steps=1)], log=tiny / "log")  # the first start is slower
    began = time.monotonic()
    with ranks.Ranks(["train", *config_of(tiny, output_dir=run)], log=tiny / "log") as started:
        while started.is_running() and not (run / "metrics.jsonl").exists():
            time.sleep(0.005)
        first = time.time()
        assert started.wait() == [0, 0], started.output()[-4000:]
    state = final_state(run)
    assert state["checkpoints"] == ["step-00000010", "step-00000012"], "retention keeps two"
    return Unbroken(run, state, time.monotonic() - began, (run / "metrics.jsonl").stat().st_mtime - first)
