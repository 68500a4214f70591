"""A SLURM of one machine: its three daemons with settings, keys and ports of a folder of their own."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from tests.distributed.runs import ROOT, environment, free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
# A job that was put back waits until the credentials of its last start have run out: two minutes with SLURM's own settings.
CREDENTIAL_SECONDS = 10
SETTINGS = """
ClusterName=kto
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={expire}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
JobRequeue=1
KillWait=30
SchedulerParameters=batch_sched_delay=1,sched_interval=5
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


class Slurm(NamedTuple):
    folder: Path
    variables: dict[str, str]

    def run(self, *command: str, **variables: str) -> str:
        """Run a command of SLURM, or one that uses them, and return what it printed."""
        done = subprocess.run(command, env={**self.variables, **variables}, cwd=ROOT, text=True, capture_output=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def field(self, job: str, name: str) -> str:
        """Return what SLURM says of a job: JobState, Restarts, ExitCode, ..."""
        return dict(part.split("=", 1) for part in self.run("scontrol", "show", "job", job).split() if "=" in part)[name]

    def wait_for(self, job: str, *states: str, seconds: float) -> str:
        """Wait until a job is in one of these states, and return it."""
        deadline = time.monotonic() + seconds
        while (state := self.field(job, "JobState")) not in states:
            assert time.monotonic() < deadline, f"job {job} is {state} after {seconds:g} s\n{self.run('scontrol', 'show', 'job', job)}"
            time.sleep(0.5)
        return state


def what_is_missing() -> str:
    """Return what a SLURM needs that is not here, or an empty string."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=path()) is None]
    if missing:
        return f"{', '.join(missing)} not installed: tests/cluster/install.sh"
    return "" if os.geteuid() == 0 else "only root can start slurmd for other users"


def path() -> str:
    return f"{environment()['PATH']}:/usr/sbin:/sbin"


@contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    folder.chmod(0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    settings = folder / "slurm.conf"
    settings.write_text(SETTINGS.format(host=socket.gethostname().split(".")[0], folder=folder, expire=CREDENTIAL_SECONDS, ports=(free_port(), free_port()), cores=os.cpu_count()))
    found = Slurm(folder, {**environment(), "PATH": path(), "SLURM_CONF": str(settings)})
    files = [f"--{name}={folder}/munge.{end}" for name, end in (("key-file", "key"), ("socket", "socket"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"))]
    daemons: list[subprocess.Popen] = []
    try:
        # --force: it would not run as root, nor in a folder that others may write above.
        for command in (["munged", "--foreground", "--force", *files], ["slurmctld", "-D"], ["slurmd", "-D"]):
            daemons.append(subprocess.Popen(command, env=found.variables, stdout=open(folder / f"{command[0]}.out", "wb"), stderr=subprocess.STDOUT))
            if command[0] == "munged":
                wait_until((folder / "munge.socket").exists)
        wait_until(lambda: "idle" in sinfo(found))
        yield found
    finally:
        with suppress(AssertionError):
            for job in found.run("squeue", "--noheader", "--format", "%A").split():
                found.run("scancel", "--signal=KILL", "--full", job)
                found.run("scancel", job)
            wait_until(lambda: not found.run("squeue", "--noheader"))
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(60)


def sinfo(found: Slurm) -> str:
    return subprocess.run(["sinfo", "--noheader", "--format", "%t"], env=found.variables, text=True, capture_output=True).stdout


def wait_until(has_come, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not has_come():
        assert time.monotonic() < deadline, "SLURM does not come up, or does not come to rest"
        time.sleep(0.2)
