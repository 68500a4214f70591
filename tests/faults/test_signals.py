"""R11: a run that is asked to stop saves once, ends with 75 within 30 s, and goes on as if nothing had been."""

import functools
import json
import signal
import time

import pytest

from tests.distributed import ranks
from tests.distributed.tiny_run import config_of, status_of
from tests.faults.injected import at_point, happened_at, messages, send
from tests.faults.ledger import record
from tests.faults.points import Point
from tests.faults.state import checkpoints_of, final_state, step_of

pytestmark = pytest.mark.distributed

BOTH = (0, 1)
STEP_5 = Point("in a step", "kto_ds.losses.reference_point", nth=6)  # once a step, and once in the evaluation of step 4
SAVE_4 = Point("in a save", "deepspeed.runtime.engine.DeepSpeedEngine.save_checkpoint", nth=2)
EVALUATION_4 = Point("in an evaluation", "kto_ds.stages.objective.evaluate_split", nth=1)
# where the signal comes, and the step that the run ends with
PLACES = {STEP_5: 5, SAVE_4: 4, EVALUATION_4: 4}
FAST = [(signal.SIGTERM, (1,), STEP_5), (signal.SIGUSR1, BOTH, SAVE_4)]
ALL = [(signum, victims, point) for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT) for victims in ((0,), (1,), BOTH) for point in PLACES]
CASES = [pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow, id=f"{case[0].name}-to-{case[1]}-{case[2].phase}") for case in ALL]


def start(command: list[str], folder, *, point: Point, victims: tuple[int, ...], action, num_ranks: int = 2) -> tuple[list[int], str, float]:
    """Run a command with a fault and return (exit codes, output, seconds from the fault to the end of all ranks)."""
    folder.mkdir(parents=True, exist_ok=True)
    before = functools.partial(at_point, point=point, victims=victims, action=action, folder=folder)
    exit_codes, output = ranks.run(command, log=folder / "log", before=before, num_ranks=num_ranks)
    return exit_codes, output, time.time() - happened_at(folder, victims)


@pytest.mark.parametrize("signum, victims, point", CASES)
def test_a_signal_saves_once_and_the_run_goes_on_bit_for_bit(tiny, unbroken, tmp_path, signum, victims, point):
    run, step = tmp_path / "run", PLACES[point]
    command = ["train", *config_of(tiny, output_dir=run)]
    exit_codes, output, seconds = start(command, tmp_path / "fault", point=point, victims=victims, action=functools.partial(send, signum, then=0.3))
    assert exit_codes == [75, 75], output[-4000:]
    assert seconds < 30
    [message] = messages(output)
    assert message.startswith(f"kto-ds: {signum.name}: stopped after step {step} of 12, which is saved"), message
    assert "Traceback" not in output
    status = status_of(run)
    assert (status["state"], status["exit_code"]) == ("preempted", 75) and signum.name in status["reason"]
    before = [2, step] if step == 4 else [4, step]
    assert [step_of(folder) for folder in checkpoints_of(run)] == before, "one save, at one step"
    evaluated = [line for line in (run / "metrics.jsonl").read_text().splitlines() if json.loads(line)["split"] == "eval"]
    assert (point is EVALUATION_4) == (not evaluated), "the evaluation was cut short, and only then"

    ranks.require_success(command, log=tmp_path / "log")
    assert final_state(run) == unbroken.state
    record("R11", f"{signum.name}, {point.phase}, to {'all ranks' if len(victims) > 1 else f'rank {victims[0]}'}", injected=1, survived=1, seconds=seconds)


def test_the_same_signal_again_ends_the_run_at_once(tiny, tmp_path):
    run = tmp_path / "run"
    action = functools.partial(send, signal.SIGTERM, signal.SIGTERM, pause=1.5, then=60)
    exit_codes, output, seconds = start(["train", *config_of(tiny, output_dir=run)], tmp_path / "fault", point=STEP_5, victims=BOTH, action=action)
    assert exit_codes == [143, 143] and seconds < 10, output[-4000:]
    [message] = messages(output)
    assert "SIGTERM came again" in message
    assert (status_of(run)["state"], status_of(run)["exit_code"]) == ("failed", 143)
    assert [step_of(folder) for folder in checkpoints_of(run)] == [2, 4]
    record("R11", "SIGTERM twice", injected=1, survived=1, seconds=seconds)


@pytest.mark.slow
def test_signals_of_several_kinds_or_within_moments_are_one(tiny, tmp_path):
    run = tmp_path / "run"
    action = functools.partial(send, signal.SIGINT, signal.SIGINT, signal.SIGTERM, pause=0.3)
    exit_codes, output, _ = start(["train", *config_of(tiny, output_dir=run)], tmp_path / "fault", point=STEP_5, victims=BOTH, action=action)
    assert exit_codes == [75, 75] and len(messages(output)) == 1, output[-4000:]
    assert step_of(checkpoints_of(run)[-1]) == 5


@pytest.mark.parametrize("victims", [(1,), pytest.param((0,), marks=pytest.mark.slow), pytest.param(BOTH, marks=pytest.mark.slow)])
def test_a_signal_in_set_up_ends_all_ranks_with_nothing_to_save(tiny, tmp_path, victims):
    run = tmp_path / "run"
    point = Point("in set-up", "kto_ds.model.load.load_policy")
    exit_codes, output, seconds = start(["train", *config_of(tiny, output_dir=run)], tmp_path / "fault", point=point, victims=victims, action=functools.partial(send, signal.SIGTERM, then=60))
    assert exit_codes == [75, 75] and seconds < 30, output[-4000:]
    [message] = messages(output)
    assert "SIGTERM in set-up: there is nothing to save" in message
    assert status_of(run)["state"] == "preempted" and not checkpoints_of(run)


@pytest.mark.slow
def test_wall_time_saves_and_stops(tiny, unbroken, tmp_path):
    """The set-up alone takes longer than the limit, so that the first step is the last."""
    run = tmp_path / "run"
    command = ["train", *config_of(tiny, output_dir=run)]
    exit_codes, output = ranks.run([*command, "--max-wall-time", "0.5"], log=tmp_path / "log")
    assert exit_codes == [75, 75], output[-4000:]
    [message] = messages(output)
    assert message.startswith("kto-ds: --max-wall-time is almost over: stopped after step 1 of 12")
    assert [step_of(folder) for folder in checkpoints_of(run)] == [1]
    ranks.require_success(command, log=tmp_path / "log")
    assert final_state(run) == unbroken.state


@pytest.mark.parametrize("placement, victims", [("replica", (1,)), ("sharded", (0,)), pytest.param("replica", (0,), marks=pytest.mark.slow)])
def test_precompute_stops_at_the_next_micro_batch_and_goes_on(tiny, tmp_path, placement, victims):
    overrides = dict(output_dir=tmp_path / "run", reference__artifact=tmp_path / "reference", reference__placement=placement, reference__max_tokens_per_microbatch=64)
    command = ["precompute-ref", *config_of(tiny, **overrides)]
    point = Point("while scoring", "kto_ds.model.scoring.score", nth=2)
    exit_codes, output, seconds = start(command, tmp_path / "fault", point=point, victims=victims, action=functools.partial(send, signal.SIGTERM, then=0.5))
    assert exit_codes == [75, 75] and seconds < 30, output[-4000:]
    [message] = messages(output)
    assert message.startswith("kto-ds: SIGTERM: stopped; ") and "kept; start the same command again" in message
    assert not (tmp_path / "reference").exists()
    ranks.require_success(command, log=tmp_path / "log")
    assert (tmp_path / "reference" / "manifest.json").is_file()
    record("R11", f"SIGTERM to rank {victims[0]} in precompute-ref, {placement}", injected=1, survived=1, seconds=seconds)


@pytest.mark.slow
def test_evaluate_ends_at_once(tiny, unbroken, tmp_path):
    config = config_of(tiny, output_dir=tmp_path / "run", eval__path=tiny / "model")
    point = Point("in an evaluation", "kto_ds.stages.objective.evaluate_split")
    exit_codes, output, seconds = start(["evaluate", *config], tmp_path / "fault", point=point, victims=(1,), action=functools.partial(send, signal.SIGTERM, then=60))
    assert exit_codes == [75, 75] and seconds < 30, output[-4000:]
    assert len(messages(output)) == 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_prepare_keeps_its_work(tiny, tmp_path, signum):
    command = ["prepare", *config_of(tiny, output_dir=tmp_path / "run", data__artifact=tmp_path / "dataset")]
    point = Point("after tokenizing", "kto_ds.data.ingest.summarize")
    exit_codes, output, _ = start(command, tmp_path / "fault", point=point, victims=(0,), action=functools.partial(send, signum, then=60), num_ranks=1)
    assert exit_codes == [75], output[-4000:]
    [message] = messages(output)
    assert message.startswith(f"kto-ds: {signum.name}: what is tokenized so far is kept")
    assert "its work is gone on with" in ranks.require_success(command, log=tmp_path / "log", num_ranks=1)
