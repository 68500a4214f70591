"""A run with eval.generate is, to the bit, the run without it; asked to stop while it generates, it makes up for that, once."""

import functools
import signal

import pytest

from kto_ds.report.samples_file import read_samples
from tests.distributed import ranks
from tests.distributed.tiny_run import config_of, status_of
from tests.faults.injected import at_point, messages, send
from tests.faults.points import Point
from tests.faults.state import checkpoints_of, final_state, step_of

pytestmark = pytest.mark.distributed

SETTINGS = {"eval__generate__num_prompts": 3, "eval__generate__max_new_tokens": 5, "eval__generate__temperature": 1.0}


@pytest.fixture(scope="module")
def sampled(tiny):
    """The run on two ranks without a fault, with samples."""
    run = tiny / "sampled"
    ranks.require_success(["train", *config_of(tiny, output_dir=run, **SETTINGS)], log=tiny / "log")
    return run


def stopped_at(run, tiny, folder, *, nth: int) -> str:
    """Run until rank 1 gets SIGTERM at the n-th generation, which must end both ranks with 75, and return the one message."""
    folder.mkdir()
    point = Point("while generating", "kto_ds.model.generate.generate", nth=nth)
    before = functools.partial(at_point, point=point, victims=(1,), action=functools.partial(send, signal.SIGTERM, then=2), folder=folder)
    exit_codes, output = ranks.run(["train", *config_of(tiny, output_dir=run, **SETTINGS)], log=folder / "log", before=before)
    assert exit_codes == [75, 75], output[-4000:]
    [message] = messages(output)
    return message


def test_training_does_not_notice(unbroken, sampled):
    assert final_state(sampled) == unbroken.state
    samples = read_samples(sampled / "samples.jsonl")
    assert [(sample["split"], sample["step"]) for sample in samples] == [("eval", step) for step in (0, 4, 8, 12) for _ in range(3)]
    assert len({sample["completion"] for sample in samples}) > 6, "draws hang on step and row"


def test_a_signal_while_it_generates_leaves_no_half_and_nothing_twice(tiny, unbroken, sampled, tmp_path):
    run = tmp_path / "run"
    assert stopped_at(run, tiny, tmp_path / "fault", nth=2).startswith("kto-ds: SIGTERM: stopped after step 4 of 12, which is saved")
    assert step_of(checkpoints_of(run)[-1]) == 4
    assert {sample["step"] for sample in read_samples(run / "samples.jsonl")} == {0}
    ranks.require_success(["train", *config_of(tiny, output_dir=run, **SETTINGS)], log=tmp_path / "log")
    assert final_state(run) == unbroken.state
    assert read_samples(run / "samples.jsonl") == read_samples(sampled / "samples.jsonl")


@pytest.mark.slow
def test_a_signal_before_the_first_step_ends_at_once(tiny, tmp_path):
    run = tmp_path / "run"
    assert "SIGTERM in generation: there is nothing to save" in stopped_at(run, tiny, tmp_path / "fault", nth=1)
    assert status_of(run)["state"] == "preempted" and not checkpoints_of(run) and not read_samples(run / "samples.jsonl")
