"""The launch scripts with stand-ins for python and deepspeed: a signal in any phase reaches what runs, and ends the script with 75."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = ["prepare", "precompute-ref", "train", "export"]
# What it is started as: `python -c`, the count of ranks; `python -m kto_ds STAGE`; `deepspeed ... --module kto_ds STAGE`, which starts `python rank STAGE`.
# A stage listens 0.3 s after its start, as one that imports torch first, and ends 0.3 s later.
STAND_IN = f"""#!{sys.executable} -S
import os, signal, subprocess, sys, time

def note(what):
    with open(os.environ["NOTES"], "a") as notes:
        notes.write(what + "\\n")

def hear(signum, frame):
    note(f"{{stage}} heard {{signal.Signals(signum).name}}")
    sys.exit(75)

name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
stage = next((stage for stage in {STAGES} if stage in arguments), "count")
if name == "deepspeed":
    note(f"{{stage}} launcher")
    time.sleep(0.3)
    sys.exit(subprocess.run(["python", "rank", stage]).returncode)
note(f"{{stage}} begins")
time.sleep(0.3)
if stage == "count":
    print(2)
else:
    signal.signal(signal.SIGUSR1, hear)
    note(f"{{stage}} listens")
    time.sleep(0.3)
    note(f"{{stage}} ends")
"""
PHASES = ["count begins", "prepare begins", "prepare listens", "precompute-ref launcher", "precompute-ref begins", "precompute-ref listens", "export begins", "export listens"]


@pytest.fixture
def variables(tmp_path) -> dict[str, str]:
    for name in ("python", "deepspeed"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "NOTES": str(tmp_path / "notes")}


def run_script(name: str, variables: dict[str, str], *, phase: str = "", signum: int = 0) -> tuple[int, list[str]]:
    """Run a launch script to its end, with a signal in a phase; return its exit code and what the stand-ins noted."""
    notes = Path(variables["NOTES"])
    # A background job of a shell ignores SIGINT, and bash hands that on.
    with subprocess.Popen(["bash", str(ROOT / "launch" / name), "run.yaml"], env=variables, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)) as script:
        deadline = time.monotonic() + 30
        while phase and not (notes.exists() and phase in notes.read_text().splitlines()):
            assert script.poll() is None and time.monotonic() < deadline, f"never came to: {phase}"
            time.sleep(0.005)
        if signum:
            script.send_signal(signum)
        return script.wait(30), notes.read_text().splitlines()


def test_the_pipeline_without_a_signal(variables):
    exit_code, notes = run_script("pipeline.sh", variables)
    assert exit_code == 0
    assert [note for note in notes if note.endswith("ends")] == [f"{stage} ends" for stage in STAGES]


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
