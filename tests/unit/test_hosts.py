"""What launch/hosts.py makes of a hostfile and of hosts that are not what they are said to be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kto_ds.errors import UserError
from launch import hosts
from launch.hosts import Host

ROOT = Path(__file__).parents[2]
GOOD = Host("machine 1", "1.0", 8, "GPUs", {"lo": ["127.0.0.1"], "eth0": ["10.0.0.1"], "ib0": ["10.1.0.1"]}, "10.0.0.1", True)
OTHER = GOOD._replace(machine="machine 2", interfaces={"lo": ["127.0.0.1"], "eth0": ["10.0.0.2"], "ib0": ["10.1.0.2"]}, reached_at="10.0.0.2")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in ("INTERFACE", "MASTER_ADDR", "MASTER_PORT", "SSH_PORT"):
        monkeypatch.delenv(name, raising=False)


def refusal(action) -> str:
    with pytest.raises(UserError) as refused:
        action()
    assert refused.value.where and refused.value.remedy
    return str(refused.value)


def test_a_good_hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# two nodes\n\nnode-1.cluster slots=8\n  10.0.0.2   slots=4  # half of it\n")
    assert hosts.read_hostfile(path) == {"node-1.cluster": 8, "10.0.0.2": 4}


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "0 hosts"),
        ("# only a remark\n", "0 hosts"),
        ("node1 slots=8\n", "1 hosts"),
        ("node1 slots=8\nnode2\n", ":2: found 'node2'"),
        ("node1 slots=8\nnode2 slots=8x\n", ":2: found"),
        ("node1 slots=8\nnode2 slots=0\n", ":2: found"),
        ("node1 slots=8\nnode2 slots=-1\n", ":2: found"),
        ("node1 slots=8\nnode[2-9] slots=8\n", ":2: found"),
        ("node1 slots=8\nnode2,node3 slots=8\n", ":2: found"),
        ("node1 slots=8\n-oProxyCommand=x slots=8\n", ":2: found"),
        ("node1 slots=8\nnode2 slots=8\nnode1 slots=8\n", ":3: node1 is there already"),
        ("node1 slots=8\nnode2 slots=8\x1b[2J\n", "x1b"),
    ],
)
def test_a_bad_hostfile_is_refused_with_its_line(tmp_path, text, said):
    path = tmp_path / "hosts"
    path.write_text(text)
    message = refusal(lambda: hosts.read_hostfile(path))
    assert str(path) in message and said in message and "\x1b" not in message


def test_a_hostfile_that_is_not_there_is_refused(tmp_path):
    assert "no such hostfile" in refusal(lambda: hosts.read_hostfile(tmp_path / "none"))


@pytest.mark.parametrize(
    "second, slots, said",
    [
        (GOOD, 8, "one and two are the same machine"),
        (OTHER, 9, "two: slots=9, found 8 GPUs"),
        (OTHER._replace(version="0.9"), 8, "versions of kto_ds differ: one: 1.0; two: 0.9"),
    ],
)
def test_hosts_that_do_not_fit_the_hostfile_are_refused(second, slots, said):
    assert said in refusal(lambda: hosts.require_equal_hosts({"one": GOOD, "two": second}, {"one": 8, "two": slots}, where="hosts"))


def answering(monkeypatch, tmp_path, *answers: Host | str) -> Path:
    """Let the hosts of a hostfile give these answers."""
    path = tmp_path / "hosts"
    path.write_text("".join(f"node{number} slots=8\n" for number in range(len(answers))))
    monkeypatch.setattr(hosts, "ask", lambda name: answers[int(name.removeprefix("node"))])
    return path


def test_good_hosts_meet_where_ssh_came_to(monkeypatch, tmp_path):
    assert hosts.check(answering(monkeypatch, tmp_path, GOOD, OTHER)) == ("10.0.0.1", "eth0")


def test_good_hosts_meet_on_the_interface_that_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("INTERFACE", "ib0")
    assert hosts.check(answering(monkeypatch, tmp_path, GOOD, OTHER)) == ("10.1.0.1", "ib0")


@pytest.mark.parametrize(
    "second, variables, said",
    [
        ("No route to host", {}, "node1: No route to host"),
        (OTHER, {"INTERFACE": "ib1"}, "no interface 'ib1' that is up: node0 has eth0, ib0, lo; node1 has eth0, ib0, lo"),
        (OTHER._replace(interfaces={"lo": ["127.0.0.1"], "eth0": ["10.0.0.2"]}), {"INTERFACE": "ib0"}, "no interface 'ib0' that is up: node1 has eth0, lo"),
        (OTHER._replace(interfaces={"lo": ["127.0.0.1"], "ens5": ["10.0.0.2"]}), {}, "different names: node0: eth0; node1: ens5"),
        (OTHER, {"MASTER_ADDR": "10.0.0.2"}, "10.0.0.2 is no address of the first host"),
        (OTHER, {"MASTER_ADDR": "127.0.0.1"}, "127.0.0.1 means this host on every host"),
        (OTHER, {"MASTER_ADDR": "localhost"}, "localhost means this host on every host"),
    ],
)
def test_hosts_that_cannot_meet_are_refused(monkeypatch, tmp_path, second, variables, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert said in refusal(lambda: hosts.check(answering(monkeypatch, tmp_path, GOOD, second)))


def test_a_port_that_is_taken_is_refused(monkeypatch, tmp_path):
    path = answering(monkeypatch, tmp_path, GOOD._replace(port_is_free=False), OTHER)
    assert "port 29500 of the first host is taken" in refusal(lambda: hosts.check(path))
    monkeypatch.setenv("MASTER_PORT", "65536")
    assert "no port" in refusal(lambda: hosts.check(path))


@pytest.mark.parametrize(
    "arguments, variables, said",
    [
        ((1, 2, 2), {"MASTER_ADDR": "10.0.0.1"}, "NODE_RANK: found 2, expected 0 to 1"),
        ((100_000, 1, 0), {}, "100000 ranks on this host, found"),
        ((1, 2, 1), {}, "MASTER_ADDR: not set"),
        ((1, 2, 1), {"MASTER_ADDR": "127.0.0.1"}, "means this host on every host"),
        ((1, 2, 1), {"MASTER_ADDR": "no.such.host.invalid"}, "MASTER_ADDR: 'no.such.host.invalid'"),
        ((1, 1, 0), {"INTERFACE": "nic7"}, "no interface 'nic7'"),
    ],
)
def test_a_host_that_cannot_take_part_refuses(monkeypatch, arguments, variables, said):
    for name, value in {"DS_ACCELERATOR": "cpu", **variables}.items():
        monkeypatch.setenv(name, value)
    assert said in refusal(lambda: hosts.here(*arguments))


def test_a_host_that_is_alone_needs_no_interface(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("MASTER_PORT", "0" + str(20_000 + os.getpid() % 10_000))
    assert hosts.here(1, 1, 0) == ""
    monkeypatch.setenv("INTERFACE", "lo")
    assert hosts.here(1, 1, 0) == "lo"


def test_a_host_is_asked_over_ssh(monkeypatch, tmp_path):
    """With a stand-in for ssh that runs the command here, after a line that a login file prints."""
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/bash\n[ "${*: -2:1}" = node1 ] || { echo "ssh: no such host" >&2; exit 255; }\necho welcome\nSSH_CONNECTION="9.9.9.9 1 127.0.0.1 22" bash -c "${*: -1}"\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert hosts.ask("node1") == hosts.describe()._replace(reached_at="127.0.0.1")
    assert hosts.ask("node2") == "'ssh: no such host'"


def test_the_refusal_is_one_message_with_exit_code_2(tmp_path):
    command = [sys.executable, str(ROOT / "launch" / "hosts.py"), "check", str(tmp_path / "none")]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert ended.returncode == 2
    assert ended.stderr.startswith("kto-ds: error: ") and "remedy:" in ended.stderr and "Traceback" not in ended.stderr
