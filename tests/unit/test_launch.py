"""The launch scripts with stand-ins for python, deepspeed and ssh: a signal in any phase reaches what runs, and ends the script with 75."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = ["prepare", "precompute-ref", "doctor", "train", "export"]
# What it is started as: `python -c`, the count of ranks; `python -m kto_ds STAGE`; `deepspeed ... --module kto_ds STAGE`, which starts `python rank STAGE`,
# and so does `python torchrun.py ... -m kto_ds STAGE`, in a session of its own; `python hosts.py`, which finds nothing wrong; `ssh HOST bash`, which stays here.
# A stage listens 0.3 s after its start, as one that imports torch first, and ends 0.3 s later; $WAITS is one that is about to be signalled.
STAND_IN = f"""#!{sys.executable} -S
import os, signal, subprocess, sys, time

def note(what):
    with open(os.environ["NOTES"], "a") as notes:
        notes.write(what + "\\n")

def hear(signum, frame):
    note(f"{{stage}} heard {{signal.Signals(signum).name}}")
    sys.exit(75)

name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
if name == "ssh":
    os.execvp("bash", ["bash", "-s"])
if arguments[0].endswith("hosts.py"):
    print({{"check": "10.0.0.1 eth0", "slots": "1 1", "here": "eth0"}}[arguments[1]])
    sys.exit()
stage = next((stage for stage in {STAGES} if stage in arguments), "count")
if name == "deepspeed" or arguments[0].endswith("torchrun.py"):
    note(f"{{stage}} launcher")
    with open(os.environ["NOTES"] + f".{{stage}}", "w") as file:
        file.write("\\0".join(arguments))
    if "DS_ENV_FILE" in os.environ:
        with open(os.environ["DS_ENV_FILE"]) as variables, open(os.environ["NOTES"] + ".variables", "w") as file:
            file.write(variables.read())
    time.sleep(0.3)
    sys.exit(subprocess.run(["python", "rank", stage], start_new_session=name == "python").returncode)
note(f"{{stage}} begins")
time.sleep(0.3)
if stage == "count":
    print(2)
else:
    if os.environ.get("FAILS") == stage:
        sys.exit(2)
    signal.signal(signal.SIGUSR1, hear)
    note(f"{{stage}} listens")
    time.sleep(20 if os.environ.get("WAITS") == stage else 0.3)
    note(f"{{stage}} ends")
"""
PHASES = ["count begins", "prepare begins", "prepare listens", "precompute-ref launcher", "precompute-ref begins", "precompute-ref listens", "export begins", "export listens"]


@pytest.fixture
def variables(tmp_path) -> dict[str, str]:
    for name in ("python", "deepspeed", "ssh", "pdsh"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "NOTES": str(tmp_path / "notes")}


def run_script(name: str, variables: dict[str, str], *arguments: str, phase: str = "", signum: int = 0) -> tuple[int, list[str]]:
    """Run a launch script to its end, with a signal in a phase; return its exit code and what the stand-ins noted."""
    notes = Path(variables["NOTES"])
    command = ["bash", str(ROOT / "launch" / name), *(arguments or ["run.yaml"])]
    variables = {**variables, "WAITS": phase.split()[0] if signum else ""}
    # A background job of a shell ignores SIGINT, and bash hands that on.
    with subprocess.Popen(command, env=variables, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)) as script:
        deadline = time.monotonic() + 120
        while phase and not (notes.exists() and phase in notes.read_text().splitlines()):
            assert script.poll() is None and time.monotonic() < deadline, f"never came to: {phase}"
            time.sleep(0.005)
        if signum:
            script.send_signal(signum)
        return script.wait(120), notes.read_text().splitlines()


def test_the_pipeline_without_a_signal(variables):
    exit_code, notes = run_script("pipeline.sh", variables)
    assert exit_code == 0
    assert [note for note in notes if note.endswith("ends")] == [f"{stage} ends" for stage in STAGES if stage != "doctor"]


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_ends_the_pipeline_in_any_phase(variables, phase):
    """The stage that it comes in hears it once, as soon as it can, and no stage follows."""
    signum = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)[PHASES.index(phase) % 3]
    exit_code, notes = run_script("pipeline.sh", variables, phase=phase, signum=signum)
    stage = phase.split()[0]
    assert exit_code == 75
    assert notes[-1] == (f"{stage} heard SIGUSR1" if stage != "count" else phase), notes
    assert sum("heard" in note for note in notes) == (stage != "count")


@pytest.mark.parametrize("phase, signum", [("count begins", signal.SIGTERM), ("train launcher", signal.SIGUSR1), ("train begins", signal.SIGINT), ("train listens", signal.SIGTERM)])
def test_a_signal_ends_training_alone_in_any_phase(variables, phase, signum):
    exit_code, notes = run_script("single_node.sh", variables, phase=phase, signum=signum)
    assert exit_code == 75
    assert sum(note == "train heard SIGUSR1" for note in notes) == (phase != "count begins")


# The scripts for several hosts: their arguments before RUN.yaml, and what they are told in the environment.
SEVERAL_HOSTS = [("multi_node.sh", ["hosts"], {}), ("multi_node_no_ssh.sh", ["hosts"], {"NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}), ("torchrun.sh", [], {"NUM_RANKS": "1"})]


@pytest.fixture
def hostfile(tmp_path) -> str:
    (tmp_path / "hosts").write_text("10.0.0.1 slots=1\n")
    return str(tmp_path / "hosts")


@pytest.mark.parametrize("name, before, told", SEVERAL_HOSTS, ids=[name for name, *_ in SEVERAL_HOSTS])
def test_the_doctor_comes_first_and_may_refuse(variables, hostfile, name, before, told):
    arguments = [hostfile] * len(before) + ["run.yaml"]
    exit_code, notes = run_script(name, {**variables, **told}, *arguments)
    assert exit_code == 0 and [note for note in notes if note.endswith("ends")] == ["doctor ends", "train ends"]
    Path(variables["NOTES"]).unlink()
    exit_code, notes = run_script(name, {**variables, **told, "FAILS": "doctor"}, *arguments)
    assert exit_code == 2 and notes[-1] == "doctor begins"


@pytest.mark.parametrize("name, before, told", SEVERAL_HOSTS, ids=[name for name, *_ in SEVERAL_HOSTS])
@pytest.mark.parametrize("phase, signum", [("doctor begins", signal.SIGUSR1), ("train launcher", signal.SIGTERM), ("train listens", signal.SIGINT)])
def test_a_signal_reaches_the_ranks_of_several_hosts(variables, hostfile, name, before, told, phase, signum):
    exit_code, notes = run_script(name, {**variables, **told}, *[hostfile] * len(before), "run.yaml", phase=phase, signum=signum)
    assert exit_code == 75
    assert notes[-1] == f"{phase.split()[0]} heard SIGUSR1" and sum("heard" in note for note in notes) == 1, notes


def test_arguments_come_through_the_shells_of_the_hosts(variables, hostfile):
    """DeepSpeed quotes what has a space, pdsh joins all and takes %n for the number of the host, and a shell reads the rest."""
    values = ["plain", "two words", "$HOME `id` \\ \"q\" 'q'", '{"mode": "offline"}', "*", "50%n", "é", ""]
    exit_code, _ = run_script("multi_node.sh", variables, hostfile, "run.yaml", *(f"--report.wandb.name={value}" for value in values))
    handed = Path(f"{variables['NOTES']}.train").read_text().split("\0")
    handed = handed[handed.index("--config") + 2 :]
    assert exit_code == 0 and not [argument for argument in handed if " " in argument or "%" in argument]
    read = subprocess.run(["bash", "-c", f"printf '%s\\0' {' '.join(handed)}"], capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
    assert read == [f"--report.wandb.name={value}" for value in values]


def test_the_variables_that_are_named_travel(variables, hostfile):
    set_here = {"OMP_NUM_THREADS": "3", "NCCL_DEBUG": "INFO", "PLAIN": "two words", "OTHER": "stays", "GLOO_SOCKET_IFNAME": "", "INTERFACE": "eth0"}
    assert run_script("multi_node.sh", {**variables, "EXPORT": "PLAIN", **set_here}, hostfile, "run.yaml")[0] == 0
    travelled = Path(f"{variables['NOTES']}.variables").read_text().splitlines()
    assert {"OMP_NUM_THREADS=3", "NCCL_DEBUG=INFO", "PLAIN=two words", "GLOO_SOCKET_IFNAME=eth0", "NCCL_SOCKET_IFNAME=eth0"} <= set(travelled)
    assert [line for line in travelled if line.startswith("KTO_LAUNCH=")] and not [line for line in travelled if line.startswith("OTHER")]


@pytest.mark.parametrize("name, value", [("WANDB_API_KEY", "abc"), ("HF_TOKEN", "abc"), ("PLAIN", "$(id)"), ("PLAIN", "two\nlines")])
def test_variables_that_must_not_travel_are_refused(variables, hostfile, name, value):
    command = ["bash", str(ROOT / "launch" / "multi_node.sh"), hostfile, "run.yaml"]
    ended = subprocess.run(command, env={**variables, "EXPORT": name, name: value}, capture_output=True, text=True)
    assert ended.returncode == 2 and name in ended.stderr and value not in ended.stdout + ended.stderr
    assert not Path(variables["NOTES"]).exists(), "nothing was started"


@pytest.mark.slow
def test_torchrun_ends_with_the_exit_code_of_a_rank(tmp_path):
    script = tmp_path / "ends.py"
    script.write_text("import os, sys\nsys.exit(75)\n")
    command = [sys.executable, str(ROOT / "launch" / "torchrun.py"), "--standalone", "--nproc_per_node", "1", str(script)]
    assert subprocess.run(command, capture_output=True).returncode == 75
    script.write_text("import os\nos.kill(os.getpid(), 9)\n")
    assert subprocess.run(command, capture_output=True).returncode == 137


# What SLURM's commands are for launch/slurm.sh: srun ends with $SRUN_CODE, squeue says $STATE, scontrol notes that it puts a job back.
SLURM = {
    "srun": '[[ "$*" != *"slurm_rank.sh train"* ]] || exit "$SRUN_CODE"',
    "squeue": 'echo "$STATE"',
    "scontrol": 'if [ "$1" = show ]; then echo node1; else echo "$1" >>"$NOTES"; fi',
}


@pytest.fixture
def job(tmp_path) -> dict[str, str]:
    """The variables of a SLURM job of one node, with stand-ins first in PATH."""
    for name, line in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    said = dict(SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_NODELIST="node1", SLURM_JOB_NUM_NODES="1", SLURM_NTASKS="2", SLURM_TASKS_PER_NODE="2")
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "NOTES": str(tmp_path / "notes"), "STATE": "RUNNING", "SRUN_CODE": "0", **said}


def run_job(job: dict[str, str], folder: Path) -> tuple[int, str, bool]:
    """Run slurm_train.sbatch as SLURM would; return its exit code, what it said, and whether it was put back into the queue."""
    (folder / "run.yaml").write_text(f"output_dir: {folder / 'run'}\nmodel: {{path: m}}\ndata: {{train: [{{path: rows}}]}}\n")
    ended = subprocess.run(["bash", str(ROOT / "launch" / "slurm_train.sbatch"), str(folder / "run.yaml")], env=job, cwd=folder, capture_output=True, text=True)
    return ended.returncode, ended.stdout + ended.stderr, (folder / "notes").exists()


@pytest.mark.parametrize(
    "srun_code, state, is_put_back", [(0, "RUNNING", False), (75, "RUNNING", True), (75, "COMPLETING", False), (2, "RUNNING", False), (1, "RUNNING", False), (137, "RUNNING", False)]
)
def test_a_job_is_put_back_on_75_alone(job, tmp_path, srun_code, state, is_put_back):
    exit_code, said, was_put_back = run_job({**job, "SRUN_CODE": str(srun_code), "STATE": state}, tmp_path)
    assert (exit_code, was_put_back) == (srun_code, is_put_back), said


def test_restarts_without_progress_end_the_job(job, tmp_path):
    stopped = {**job, "SRUN_CODE": "75", "KTO_MAX_IDLE_RESTARTS": "1"}
    assert [run_job(stopped, tmp_path)[0] for _ in range(2)] == [75, 75]
    (tmp_path / "run" / "checkpoints" / "step-00000010").mkdir(parents=True)
    assert [run_job(stopped, tmp_path)[0] for _ in range(2)] == [75, 75], "a saved step begins the count anew"
    (tmp_path / "notes").unlink()
    exit_code, said, was_put_back = run_job(stopped, tmp_path)
    assert exit_code == 1 and not was_put_back and "no progress in 2 restarts" in said and "saved step 10" in said
    assert run_job({**stopped, "SLURM_JOB_ID": "8"}, tmp_path)[0] == 75, "another job has a count of its own"


def test_nodes_of_different_numbers_of_tasks_are_refused(job, tmp_path):
    exit_code, said, _ = run_job({**job, "SLURM_TASKS_PER_NODE": "8,4"}, tmp_path)
    assert exit_code == 2 and "--ntasks-per-node" in said


def test_a_config_with_a_mistake_ends_the_job_at_once(job, tmp_path):
    (tmp_path / "notes").touch()
    (tmp_path / "bad.yaml").write_text("output_dri: x\n")
    ended = subprocess.run(["bash", str(ROOT / "launch" / "slurm_train.sbatch"), str(tmp_path / "bad.yaml")], env=job, capture_output=True, text=True)
    assert ended.returncode == 2 and "output_dri" in ended.stderr and not (tmp_path / "notes").read_text()
