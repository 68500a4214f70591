"""Two hosts on one machine: network namespaces that are joined by a cable of their own, a real sshd in each, and nothing outside them."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from tests.distributed.runs import ROOT, environment

ADDRESSES = ("10.77.0.1", "10.77.0.2")
SSH_PORT = "2222"
SSHD = """
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
MaxStartups 100
SetEnv PATH={folder}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
"""
SSH = """
Host *
    IdentityFile {folder}/key
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""


class TwoHosts(NamedTuple):
    folder: Path
    names: tuple[str, str]  # of the namespaces

    def start(self, host: int, command: list[str], log: Path, **variables: str) -> subprocess.Popen:
        """Start a command on a host, 0 or 1; what it prints is added to `log`."""
        path = os.pathsep.join([str(self.folder / "bin"), environment()["PATH"]])
        inside = ["ip", "netns", "exec", self.names[host], *command]
        with open(log, "ab") as file:
            return subprocess.Popen(inside, env={**environment(), "PATH": path, "SSH_PORT": SSH_PORT, **variables}, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=file)

    def cut(self) -> None:
        self._link("down")

    def mend(self) -> None:
        self._link("up")

    def _link(self, state: str) -> None:
        ip("-n", self.names[1], "link", "set", "eth0", state)

    def hostfile(self, slots: int = 1) -> Path:
        path = self.folder / f"hosts{slots}"
        path.write_text("".join(f"{address} slots={slots}\n" for address in ADDRESSES))
        return path

    def pkills(self) -> list[str]:
        """Return the arguments of every call of pkill on the hosts, where it does nothing."""
        path = self.folder / "pkills"
        return path.read_text().splitlines() if path.exists() else []


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def what_is_missing() -> str:
    """Return what two hosts need that is not here, or an empty string."""
    missing = [name for name in ("ip", "ssh", "ssh-keygen", "sshd", "pdsh") if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    if missing:
        return f"{', '.join(missing)} not installed: tests/cluster/install.sh"
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    with suppress(subprocess.CalledProcessError):
        name = f"kto{os.getpid()}p"
        ip("netns", "add", name)
        ip("netns", "delete", name)
        return ""
    return "this machine does not allow network namespaces"


@contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    hosts = TwoHosts(folder, (f"kto{os.getpid()}a", f"kto{os.getpid()}b"))
    write_files(folder)
    sshds: list[subprocess.Popen] = []
    try:
        for name in hosts.names:
            ip("netns", "add", name)
        # Both ends are made where they belong: nothing of it is ever in the namespace of the machine.
        ip("link", "add", "eth0", "netns", hosts.names[0], "type", "veth", "peer", "name", "eth0", "netns", hosts.names[1])
        for name, address in zip(hosts.names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "eth0", "up")
            sshds.append(subprocess.Popen(["ip", "netns", "exec", name, shutil.which("sshd", path="/usr/sbin:/usr/bin"), "-D", "-e", "-f", str(folder / "sshd_config")], stderr=open(folder / "sshd.log", "ab")))
        wait_for_ssh(hosts)
        yield hosts
    finally:
        for name in hosts.names:
            end_processes(name)
            with suppress(subprocess.CalledProcessError):
                ip("netns", "delete", name)
        for sshd in sshds:
            sshd.wait()


def write_files(folder: Path) -> None:
    """Write keys, settings, and the programs that come first in the PATH of the hosts."""
    Path("/run/sshd").mkdir(exist_ok=True)  # which sshd wants to be there
    for name in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "sshd_config").write_text(SSHD.format(folder=folder, port=SSH_PORT))
    (folder / "ssh_config").write_text(SSH.format(folder=folder))
    (folder / "bin").mkdir()
    programs = {
        "ssh": f'exec {shutil.which("ssh")} -F {folder}/ssh_config "$@"',
        # Namespaces share process ids. DeepSpeed's pdsh runner ends a run by a pkill for every launcher of this Python, those of other tests among them.
        "pkill": f'echo "$*" >>{folder}/pkills',
    }
    for name, line in programs.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / "bin" / name).chmod(0o755)


def wait_for_ssh(hosts: TwoHosts) -> None:
    """Wait for both sshds, and make sure that pkill does nothing there."""
    for address in ADDRESSES:
        command = ["ip", "netns", "exec", hosts.names[0], str(hosts.folder / "bin" / "ssh"), "-p", SSH_PORT, address, "command -v pkill"]
        deadline = time.monotonic() + 30
        while (said := subprocess.run(command, capture_output=True, text=True)).returncode:
            assert time.monotonic() < deadline, said.stderr
            time.sleep(0.2)
        assert said.stdout.strip() == str(hosts.folder / "bin" / "pkill")


def end_processes(namespace: str) -> None:
    """Kill what runs in a namespace, process by process, until nothing does."""
    for _ in range(50):
        with suppress(subprocess.CalledProcessError):
            pids = ip("netns", "pids", namespace).split()
            if not pids:
                return
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.1)
