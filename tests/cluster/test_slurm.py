"""The SLURM jobs on a SLURM of one machine: stopped, put back, ended, chained."""

import time
from pathlib import Path

import pytest

from tests.cluster.slurm import Slurm, slurm, what_is_missing
from tests.distributed.tiny_run import config_of, status_of
from tests.faults.state import checkpoints_of, final_state, newest_intact, steps_begun

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SIZE = ["--nodes=1", "--ntasks-per-node=2"]
TRAIN = "launch/slurm_train.sbatch"
SECONDS = 900  # on a machine that is busy with others


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Slurm:
    if missing := what_is_missing():
        pytest.skip(missing)
    with slurm(tmp_path_factory.mktemp("slurm")) as found:
        yield found


@pytest.fixture
def submitted(cluster, tmp_path):
    """Return a function that submits a job of slurm_train.sbatch and gives its id and log; no job outlives the test."""
    jobs: list[str] = []

    def submit(arguments: list[str], *options: str, **variables: str) -> tuple[str, Path]:
        log = tmp_path / f"job{len(jobs)}.log"
        jobs.append(cluster.run("sbatch", "--parsable", *SIZE, f"--output={log}", *options, TRAIN, *arguments, **variables))
        return jobs[-1], log

    yield submit
    for job in jobs:
        deadline = time.monotonic() + 120
        while cluster.field(job, "JobState") in ("PENDING", "RUNNING", "COMPLETING"):
            assert time.monotonic() < deadline, f"job {job} cannot be ended"
            cluster.run("scancel", job)  # again, as one that is being put back at this very moment comes back
            time.sleep(1)


def wait_for_step(cluster: Slurm, job: str, run: Path, step: int, log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while steps_begun(run) < step:
        assert cluster.field(job, "JobState") in ("PENDING", "RUNNING") and time.monotonic() < deadline, log.read_text()[-6000:]
        time.sleep(0.1)


def exit_code(cluster: Slurm, job: str) -> str:
    """Return `exit code:signal` of the batch script."""
    return cluster.field(job, "ExitCode")


def test_a_job_that_is_signalled_saves_goes_back_into_the_queue_and_completes(cluster, submitted, medium, in_peace):
    run, arguments = medium
    job, log = submitted(arguments)
    wait_for_step(cluster, job, run, 5, log)
    cluster.run("scancel", "--signal=USR1", job)
    cluster.wait_for(job, "PENDING", seconds=SECONDS)
    assert status_of(run)["state"] == "preempted" and newest_intact(run) is not None, log.read_text()[-6000:]

    assert cluster.wait_for(job, "COMPLETED", "FAILED", seconds=SECONDS) == "COMPLETED", log.read_text()[-6000:]
    assert cluster.field(job, "Restarts") == "1"
    assert "stopped with 75" in log.read_text() and "start 2 of job" in log.read_text()
    assert final_state(run) == in_peace


def test_a_job_that_slurm_itself_puts_back_saves_and_completes(cluster, submitted, medium, in_peace):
    """As preemption does: SIGTERM for everything, the batch script too."""
    run, arguments = medium
    job, log = submitted(arguments)
    wait_for_step(cluster, job, run, 5, log)
    cluster.run("scontrol", "requeue", job)
    assert cluster.wait_for(job, "COMPLETED", "FAILED", seconds=SECONDS) == "COMPLETED", log.read_text()[-6000:]
    assert cluster.field(job, "Restarts") == "1", "it is not put back twice"
    assert "resuming at step" in log.read_text()
    assert final_state(run) == in_peace


def test_a_job_is_signalled_before_its_time_is_over(cluster, submitted, tiny, tmp_path):
    """By the setting of the script, 300 s before; SLURM looks at limits once in a while, and so signals up to a minute early."""
    run = tmp_path / "run"
    endless = [str(tiny / "run.yaml"), *config_of(tiny, output_dir=run, train__num_train_epochs=100_000, checkpoint__save_steps=10**6, eval__eval_steps=10**6)[2:]]
    job, log = submitted(endless, "--time=10")
    wait_for_step(cluster, job, run, 1, log)
    assert cluster.wait_for(job, "PENDING", "TIMEOUT", "FAILED", seconds=600) == "PENDING", log.read_text()[-6000:]
    assert "SIGUSR1: stopped after step" in log.read_text() and newest_intact(run) is not None


def test_a_job_that_is_cancelled_saves_and_stays_ended(cluster, submitted, medium):
    """scontrol would put back a cancelled job too, while it is on its way out."""
    run, arguments = medium
    job, log = submitted(arguments)
    wait_for_step(cluster, job, run, 5, log)
    cluster.run("scancel", job)
    assert cluster.wait_for(job, "CANCELLED", seconds=60) == "CANCELLED"
    deadline = time.monotonic() + 60
    while "is not put back from here" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()[-6000:]
        time.sleep(0.5)
    time.sleep(3)
    assert cluster.field(job, "JobState") == "CANCELLED" and cluster.field(job, "Restarts") == "0"
    assert status_of(run)["state"] == "preempted" and len(checkpoints_of(run)) >= 1


def test_a_job_with_a_mistake_is_not_put_back(cluster, submitted, medium):
    run, arguments = medium
    job, log = submitted([*arguments, "--reference.artifact", str(run / "none")])
    assert cluster.wait_for(job, "COMPLETED", "FAILED", seconds=SECONDS) == "FAILED"
    assert exit_code(cluster, job) == "2:0" and cluster.field(job, "Restarts") == "0"
    assert log.read_text().count("kto-ds: error:") == 1 and "reference artefact is missing" in log.read_text()


def test_a_job_that_gets_nowhere_ends(cluster, submitted, medium):
    """Stopped in its set-up again and again, there is never a step to save."""
    run, arguments = medium
    job, log = submitted(arguments, KTO_MAX_IDLE_RESTARTS="1")
    for start in (1, 2):
        deadline = time.monotonic() + SECONDS
        while f"start {start} of job" not in (log.read_text() if log.exists() else "") or " on 2 ranks" not in log.read_text().rpartition("start ")[2]:
            assert time.monotonic() < deadline, log.read_text()[-6000:]
            time.sleep(0.2)
        time.sleep(2)  # for the ranks to be able to hear
        cluster.run("scancel", "--signal=USR1", job)
        cluster.wait_for(job, "PENDING", "FAILED", seconds=SECONDS)
    assert cluster.wait_for(job, "COMPLETED", "FAILED", seconds=SECONDS) == "FAILED"
    assert exit_code(cluster, job) == "1:0" and cluster.field(job, "Restarts") == "2"
    assert "no progress in 2 restarts" in log.read_text() and not checkpoints_of(run)


def test_the_pipeline_runs_as_a_chain_of_jobs(cluster, tiny, tmp_path):
    """From rows to an exported model, with artefacts of its own."""
    run = tmp_path / "run"
    arguments = [str(tiny / "run.yaml"), *config_of(tiny, output_dir=run, data__artifact=run / "dataset", reference__artifact=run / "reference")[2:]]
    logs = f"--output={tmp_path}/%x.log"
    said = cluster.run("bash", "launch/slurm_pipeline.sbatch", *SIZE, logs, *arguments)
    jobs = [word for word in said.split() if word.isdigit()]
    assert len(jobs) == 3 and cluster.field(jobs[1], "Dependency").startswith(f"afterok:{jobs[0]}")
    for job, log in zip(jobs, ("kto-reference", "kto-train", "kto-export"), strict=True):
        assert cluster.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", seconds=SECONDS) == "COMPLETED", (tmp_path / f"{log}.log").read_text()[-6000:]
    assert (run / "export" / "model.safetensors").exists() and status_of(run)["state"] == "completed"


def test_a_chain_ends_with_the_job_that_fails(cluster, tiny, tmp_path):
    run = tmp_path / "run"
    arguments = [str(tiny / "run.yaml"), *config_of(tiny, output_dir=run, data__artifact=run / "dataset", data__max_length=1)[2:]]
    said = cluster.run("bash", "launch/slurm_pipeline.sbatch", *SIZE, f"--output={tmp_path}/%x.log", *arguments)
    jobs = [word for word in said.split() if word.isdigit()]
    assert cluster.wait_for(jobs[0], "COMPLETED", "FAILED", seconds=SECONDS) == "FAILED"
    assert exit_code(cluster, jobs[0]) == "2:0"
    for job in jobs[1:]:
        cluster.wait_for(job, "CANCELLED", seconds=60)
