"""R14: a run that makes no progress ends by itself, says which rank lags, and leaves the stacks of all that can write them."""

import contextlib
import functools
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kto_ds.runtime import collectives
from kto_ds.runtime import watch as watches
from tests.distributed import ranks
from tests.distributed.tiny_run import config_of, status_of
from tests.faults.fed import go_back_to
from tests.faults.injected import at_point, happened_at, messages, stop_for_good
from tests.faults.ledger import record
from tests.faults.points import Point
from tests.faults.test_world_size import write_small_groups

pytestmark = pytest.mark.distributed

TIMEOUT = 6
STEP_6 = Point("in a step", "kto_ds.runtime.engine.Engine.step", nth=6)
LOADER_6 = Point("in the thread that lays out the next step", "kto_ds.stages.step_work.StepPlanner.work_of", nth=6)
MAIN_RANK_SAVES = Point("while the others wait for rank 0", "kto_ds.artifacts.seal", nth=3)
SET_UP = Point("in set-up", "kto_ds.model.load.load_policy")


def train_with(tiny, folder, *, point: Point, victim: int, action) -> tuple[list[int], str, float]:
    before = functools.partial(at_point, point=point, victims=(victim,), action=action, folder=folder)
    # Reading the model takes its time too, but none of it this long.
    config = config_of(tiny, output_dir=folder / "run", train__step_timeout_seconds=TIMEOUT, train__setup_timeout_seconds=60 if point != SET_UP else 2 * TIMEOUT)
    exit_codes, output = ranks.run(["train", *config], log=folder / "log", before=before)
    return exit_codes, output, time.time() - happened_at(folder, (victim,))


def require_failure(folder, output: str, victim: int, *, lags: bool = True) -> str:
    """Return the message, after looking at what any hang must leave behind; `lags` where the files of the ranks can tell who is behind."""
    assert (status_of(folder / "run")["state"], status_of(folder / "run")["exit_code"]) == ("failed", 1)
    assert len(messages(output)) == 1 and "Traceback" not in output, output[-4000:]
    message = output[output.index(messages(output)[0]) :]
    assert f"no progress for {TIMEOUT} s" in message or f"no progress for {2 * TIMEOUT} s" in message
    lines = [line for line in message.splitlines() if line.startswith("  rank ")]
    assert len(lines) == 2 and (not lags or lines[0].startswith(f"  rank {victim} ")), f"the one that lags comes first: {lines}"
    assert str(folder / "run" / "stacks") in message
    return message


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_stopped_rank_is_named_by_the_other_and_ended(tiny, tmp_path, victim):
    exit_codes, output, seconds = train_with(tiny, tmp_path, point=STEP_6, victim=victim, action=stop_for_good)
    assert exit_codes[1 - victim] == 1 and exit_codes[victim] == -9, output[-4000:]
    assert seconds < TIMEOUT + 20
    assert "gives no sign of life" in require_failure(tmp_path, output, victim)
    stacks = (tmp_path / "run" / "stacks" / f"rank{1 - victim}.txt").read_text()
    assert "no progress for" in stacks and "train_step" in stacks
    record("R14", f"SIGSTOP of rank {victim}", injected=1, survived=1, seconds=seconds, stock=f"15.0 s for a timeout of 15 s, here {TIMEOUT} s")


HANGS = [(LOADER_6, 1), (LOADER_6, 0), (STEP_6, 1), (MAIN_RANK_SAVES, 0), (SET_UP, 1)]


@pytest.mark.parametrize("point, victim", [pytest.param(*case, marks=pytest.mark.slow, id=f"{case[0].phase}-{case[1]}") for case in HANGS])
def test_a_sleeping_rank_leaves_the_stacks_of_all(tiny, tmp_path, point, victim):
    exit_codes, output, seconds = train_with(tiny, tmp_path, point=point, victim=victim, action=functools.partial(time.sleep, 300))
    assert exit_codes == [1, 1] and seconds < 2 * TIMEOUT + 20, output[-4000:]
    require_failure(tmp_path, output, victim, lags=point not in (STEP_6, SET_UP))  # within these only the stacks can
    for rank in (0, 1):
        stacks = (tmp_path / "run" / "stacks" / f"rank{rank}.txt").read_text()
        assert "no progress for" in stacks and ("_noted" in stacks) == (rank == victim), "the stack shows where it sleeps"
    record("R14", f"sleep {point.phase}, rank {victim}", injected=1, survived=1, seconds=seconds)


@pytest.mark.slow
def test_sigusr2_writes_the_stacks_of_a_run_that_goes_on(tiny, tmp_path):
    before = functools.partial(at_point, point=STEP_6, victims=(0, 1), action=functools.partial(signal.raise_signal, signal.SIGUSR2), folder=tmp_path)
    exit_codes, output = ranks.run(["train", *config_of(tiny, output_dir=tmp_path / "run")], log=tmp_path / "log", before=before)
    assert exit_codes == [0, 0], output[-4000:]
    for rank in (0, 1):
        assert "in train_step" in (tmp_path / "run" / "stacks" / f"rank{rank}.txt").read_text()


PATIENCE = 8  # beyond twice the seconds between two signs of life
WORK_SECONDS = 1.5 * PATIENCE


def lose_patience() -> None:
    """From now on neither watch nor collective of this rank waits for longer."""
    [watch] = watches._current
    watch.limit(PATIENCE)
    collectives.limit_waits(PATIENCE - collectives.GRACE_SECONDS)


def convert_slowly(rank: int, *, folder: Path) -> None:
    """A conversion on rank 0 that writes a file now and then, for longer than the other ranks have patience."""
    from kto_ds.runtime import restore

    converted, save = restore.converted, torch.save

    def slow_save(*arguments, **named):
        time.sleep(0.07)
        save(*arguments, **named)

    @contextlib.contextmanager
    def slowly(*arguments, **named):
        lose_patience()
        began, torch.save = time.monotonic(), slow_save if rank == 0 else save
        with converted(*arguments, **named) as universal:
            torch.save = save
            (folder / f"seconds{rank}").write_text(str(time.monotonic() - began))
            yield universal

    restore.converted = slowly


@pytest.mark.slow
def test_ranks_wait_for_a_long_conversion(tiny, unbroken, tmp_path):
    run = Path(shutil.copytree(unbroken.run, tmp_path / "run"))
    go_back_to(run, 10)
    config = config_of(tiny, output_dir=run, deepspeed__config=write_small_groups(tmp_path, 3))
    exit_codes, output = ranks.run(["train", *config], log=tmp_path / "log", before=functools.partial(convert_slowly, folder=tmp_path))
    assert exit_codes == [0, 0], output[-4000:]
    seconds = float((tmp_path / "seconds1").read_text())
    assert seconds > WORK_SECONDS and "resuming at step 11 of 12" in output
    record("R14", "no hang: a conversion longer than the timeout", injected=1, survived=1, seconds=seconds)


def score_unevenly(rank: int, *, folder: Path, action: Callable[[float], None]) -> None:
    """Rank 0 is done with its share at once; rank 1 does `action` for every micro-batch."""
    from kto_ds.stages import precompute_ref

    score_all, score_shard = precompute_ref._score_all, precompute_ref.score_shard

    def impatiently(*arguments):
        lose_patience()
        began = time.monotonic()
        score_all(*arguments)
        (folder / f"seconds{rank}").write_text(str(time.monotonic() - began))

    def slowly(shard, *arguments, is_over):
        def look() -> bool:
            action(PATIENCE / 4)
            return is_over()

        return score_shard(shard, *arguments, is_over=look if rank == 1 else is_over)

    precompute_ref._score_all, precompute_ref.score_shard = impatiently, slowly


def precompute_with(tiny, folder, action: Callable[[float], None]) -> tuple[list[int], str]:
    config = config_of(tiny, output_dir=folder / "run", reference__artifact=folder / "reference", reference__max_tokens_per_microbatch=128, reference__placement="replica")
    return ranks.run(["precompute-ref", *config], log=folder / "log", before=functools.partial(score_unevenly, folder=folder, action=action))


def test_a_rank_that_is_done_waits_for_one_that_still_scores(tiny, tmp_path):
    exit_codes, output = precompute_with(tiny, tmp_path, time.sleep)
    assert exit_codes == [0, 0] and (tmp_path / "reference" / "manifest.json").exists(), output[-4000:]
    seconds = float((tmp_path / "seconds0").read_text())
    assert seconds > WORK_SECONDS
    record("R14", "no hang: a rank scores for longer than the timeout after the other is done", injected=1, survived=1, seconds=seconds)


def sleep_for_good(seconds: float) -> None:
    time.sleep(300)


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_one_that_waits_for_it(tiny, tmp_path):
    began = time.monotonic()
    exit_codes, output = precompute_with(tiny, tmp_path, sleep_for_good)
    assert exit_codes == [1, 1] and time.monotonic() - began < 60, output[-4000:]
    lines = [line for line in output.splitlines() if line.startswith("  rank ")]
    assert f"no progress for {PATIENCE} s" in output and lines[0].startswith("  rank 1 "), output[-4000:]
    record("R14", "a rank hangs while another one waits for it", injected=1, survived=1, seconds=time.monotonic() - began)


def score_slowly(rank: int) -> None:
    """A model whose micro-batches take seconds, though no one of them takes long."""
    from kto_ds.model.policy import Policy

    forward = Policy.forward

    def slow(*arguments, **named):
        time.sleep(TIMEOUT / 2)
        return forward(*arguments, **named)

    Policy.forward = slow


@pytest.mark.slow
def test_a_long_evaluation_is_no_hang(tiny, tmp_path):
    began = time.monotonic()
    config = config_of(tiny, output_dir=tmp_path / "run", eval__path=tiny / "model", train__setup_timeout_seconds=2 * TIMEOUT, reference__max_tokens_per_microbatch=32)
    exit_codes, output = ranks.run(["evaluate", *config], log=tmp_path / "log", num_ranks=1, before=score_slowly)
    assert exit_codes == [0], output[-4000:]
    assert time.monotonic() - began > 2 * 2 * TIMEOUT, "each half of the pairs takes longer than the timeout"
    record("R14", "no hang: an evaluation longer than the timeout", injected=1, survived=1, seconds=time.monotonic() - began)
