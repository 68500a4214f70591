"""Whether the hosts of a launch are what they are said to be: asked before anything is started, and told in one message with exit code 2.

    python launch/hosts.py check HOSTFILE              asks all hosts over ssh; prints "MASTER_ADDR INTERFACE"
    python launch/hosts.py here SLOTS NODES NODE_RANK  looks at this host, one of NODES; prints the interface
    python launch/hosts.py interface                   prints the interface through which this host reaches MASTER_ADDR
    python launch/hosts.py slots HOSTFILE              prints the slots of the hosts in order, and asks nobody
    python launch/hosts.py describe                    prints what this host is, as JSON, for `check`

Environment: MASTER_ADDR, MASTER_PORT, INTERFACE, SSH_PORT; launch/README.md says what they mean.
"""

import ipaddress
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

import kto_ds
from kto_ds.errors import UserError, excerpt, reading, run_script

# A stricter line than DeepSpeed's own, which takes `slots=8x` for 8, and names that pdsh reads as a list or a range.
HOSTFILE_LINE = re.compile(r"([A-Za-z0-9][\w.-]*)\s+slots=([1-9]\d{0,3})\s*(?:#.*)?")
CONNECT_SECONDS = 10
ANSWER_SECONDS = 120  # importing torch from a cold network file system
PORT = "29500"


class Host(NamedTuple):
    machine: str  # the same for two names of one machine
    version: str  # of kto_ds
    devices: int
    kind: str  # of the devices
    interfaces: dict[str, list[str]]  # those that are up, with their addresses
    reached_at: str  # address that the launching machine has come to, empty without ssh
    port_is_free: bool


def read_hostfile(path: Path) -> dict[str, int]:
    """Return the slots of every host, in order; UserError names the line that is wrong."""
    form = "give one host a line, as: node1 slots=8"
    try:
        with reading(path):
            lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise UserError("no such hostfile", where=str(path), remedy=form) from error  # DeepSpeed would go on with this machine alone
    except UnicodeDecodeError as error:
        raise UserError("the hostfile is no text", where=str(path), remedy=form) from error
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = HOSTFILE_LINE.fullmatch(line.strip())
        if found is None:
            raise UserError(f"found {excerpt(line.strip())}, which is no line of a hostfile", where=where, remedy=form)
        if found[1] in slots:
            raise UserError(f"{found[1]} is there already", where=where, remedy="give each host one line with all its slots")
        slots[found[1]] = int(found[2])
    if len(slots) < 2:
        raise UserError(f"{len(slots)} hosts, expected 2 or more", where=str(path), remedy=f"{form}; on one machine use launch/single_node.sh")
    return slots


def describe() -> Host:
    """Return what this host is, as the environment lets a rank see it."""
    ssh = os.environ.get("SSH_CONNECTION", "").split()
    # Machines may share a name. Hosts may be network namespaces of one machine.
    machine = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/net')}"
    return Host(machine, kto_ds.__version__, *devices(), interfaces_up(), ssh[2] if ssh else "", is_free(master_port()))


def interfaces_up() -> dict[str, list[str]]:
    """Return the addresses of every interface that is up."""
    stats = psutil.net_if_stats()
    return {name: [entry.address for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6)] for name, entries in psutil.net_if_addrs().items() if stats[name].isup}


def devices() -> tuple[int, str]:
    """Return how many ranks this host has a device for, and of which kind."""
    if os.environ.get("DS_ACCELERATOR") != "cpu":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.device_count(), "GPUs"
    return len(os.sched_getaffinity(0)), "CPU cores"


def master_port() -> int:
    text = os.environ.get("MASTER_PORT") or PORT
    if not text.isdigit() or not 0 < int(text) < 2**16:
        raise UserError(f"found {excerpt(text)}, which is no port", where="MASTER_PORT", remedy=f"give a number below 65536, or leave it out for {PORT}")
    return int(text)


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does: the connections of a launch that has just ended do not count
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def ask(name: str) -> Host | str:
    """Return what a host says of itself over ssh, or why it says nothing."""
    passed = {variable: os.environ[variable] for variable in ("DS_ACCELERATOR", "MASTER_PORT", "PYTHONPATH") if variable in os.environ}
    variables = " ".join(f"{variable}={shlex.quote(value)}" for variable, value in passed.items())
    command = f"cd {shlex.quote(os.getcwd())} && {variables} {shlex.quote(sys.executable)} {shlex.quote(os.path.abspath(__file__))} describe"
    port = ["-p", os.environ["SSH_PORT"]] if os.environ.get("SSH_PORT") else []
    try:
        # stdin: ssh would read what is typed for the run.
        done = subprocess.run(
            ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}", *port, name, command],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=ANSWER_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"gives no answer within {ANSWER_SECONDS} s"
    with suppress(ValueError, TypeError, IndexError):  # what login files print comes first
        return Host(**json.loads(done.stdout.splitlines()[-1]))
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return excerpt(said[-1]) if said else f"ssh ended with {done.returncode}"


def check(hostfile: Path) -> tuple[str, str]:
    """Return (address of rank 0's host, interface) once every host of the hostfile has said that it can take part."""
    slots = read_hostfile(hostfile)
    with ThreadPoolExecutor(min(len(slots), 64)) as pool:
        answers = dict(zip(slots, pool.map(ask, slots), strict=True))
    hosts = {name: answer for name, answer in answers.items() if isinstance(answer, Host)}
    if len(hosts) < len(slots):
        remedy = "each host needs ssh without a password, and this folder and this Python at the same paths; or take it out of the hostfile"
        raise UserError(listed(f"{name}: {answer}" for name, answer in answers.items() if not isinstance(answer, Host)), where=str(hostfile), remedy=remedy)
    require_equal_hosts(hosts, slots, where=str(hostfile))
    first = next(iter(hosts.values()))
    wanted = os.environ.get("INTERFACE")
    address = os.environ.get("MASTER_ADDR") or (next(iter(first.interfaces.get(wanted, [])), "") if wanted else "") or first.reached_at
    interface = wanted or common_interface(hosts)
    if missing := [f"{name} has {', '.join(sorted(host.interfaces))}" for name, host in hosts.items() if interface not in host.interfaces]:
        raise UserError(f"no interface {excerpt(interface)} that is up: {listed(missing)}", where="INTERFACE", remedy="name the one through which the hosts reach each other")
    require_master(address, first)
    return address, interface


def require_equal_hosts(hosts: dict[str, Host], slots: dict[str, int], *, where: str) -> None:
    """Refuse names of one machine, more slots than devices, and different versions."""
    names: dict[str, str] = {}
    for name, host in hosts.items():
        if names.setdefault(host.machine, name) != name:
            raise UserError(f"{names[host.machine]} and {name} are the same machine", where=where, remedy="give each machine one line with all its slots")
    if too_few := [f"{name}: slots={slots[name]}, found {host.devices} {host.kind}" for name, host in hosts.items() if slots[name] > host.devices]:
        raise UserError(listed(too_few), where=where, remedy="lower the slots, or look for the missing devices on that host")
    if len({host.version for host in hosts.values()}) > 1:
        found = listed(f"{name}: {host.version}" for name, host in hosts.items())
        raise UserError(f"the versions of kto_ds differ: {found}", where=where, remedy="install one version on all hosts")


def common_interface(hosts: dict[str, Host]) -> str:
    """Return the name that the interface which ssh came through has on every host."""
    names = {name: interface_of(host.reached_at, host.interfaces) for name, host in hosts.items()}
    [(name, count)] = Counter(names.values()).most_common(1)
    if count < len(hosts) or name is None:
        raise UserError(
            f"the hosts are reached through interfaces of different names: {listed(f'{host}: {name}' for host, name in names.items())}", where="INTERFACE",
            remedy="set INTERFACE to one that all hosts have, or start each with launch/multi_node_no_ssh.sh and an INTERFACE of its own",
        )  # fmt: skip
    return name


def here(slots: int, nodes: int, node_rank: int) -> str:
    """Return the interface through which this host reaches that of rank 0; an empty string when it is alone and INTERFACE is not set."""
    if not 0 <= node_rank < nodes:
        raise UserError(f"found {node_rank}, expected 0 to {nodes - 1}", where="NODE_RANK", remedy="number the hosts from 0 on, each once")
    host, interface, address = describe(), os.environ.get("INTERFACE", ""), os.environ.get("MASTER_ADDR", "")
    if slots > host.devices:
        raise UserError(f"{slots} ranks on this host, found {host.devices} {host.kind}", where=socket.gethostname(), remedy="start fewer ranks here")
    if nodes > 1 and not address:
        raise UserError("not set", where="MASTER_ADDR", remedy="set it to the address of the host with NODE_RANK=0, the same on all hosts")
    if nodes > 1:
        require_reachable(address)
        interface = interface or interface_towards(address, host.interfaces)
    if interface and interface not in host.interfaces:
        found = ", ".join(sorted(host.interfaces))
        remedy = "name the one through which the hosts reach each other"
        raise UserError(f"no interface {excerpt(interface)} that is up on {socket.gethostname()}, which has {found}", where="INTERFACE", remedy=remedy)
    if node_rank == 0:
        require_master(address if nodes > 1 else "", host)
    return interface


def interface_towards(address: str, interfaces: dict[str, list[str]]) -> str:
    """Return the interface of this host whose address it would send to another from; nothing is sent."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            own_address = probe.getsockname()[0]
    except OSError as error:
        raise UserError(f"{excerpt(address)}: {error.strerror or error}", where="MASTER_ADDR", remedy="give the address of the host with NODE_RANK=0, and see to the network") from error
    require_reachable(own_address, f"{address} is {own_address} here, by /etc/hosts or DNS, which")
    return interface_of(own_address, interfaces) or ""


def interface_of(address: str, interfaces: dict[str, list[str]]) -> str | None:
    return next((name for name, addresses in interfaces.items() if address in addresses), None)


def require_master(address: str, host: Host) -> None:
    """Refuse an address that the others cannot reach or that is not of this host, and a port that is taken. An empty one is of a host that is alone."""
    if address:
        require_reachable(address)
    if is_number(address) and address not in [own for addresses in host.interfaces.values() for own in addresses]:
        found = ", ".join(own for addresses in host.interfaces.values() for own in addresses)
        raise UserError(f"{address} is no address of the first host, which has {found}", where="MASTER_ADDR", remedy="rank 0 runs on the first host: give an address of it")
    if not host.port_is_free:
        raise UserError(f"port {master_port()} of the first host is taken", where="MASTER_PORT", remedy="set MASTER_PORT to a free one, the same on all hosts; two runs need two")


def require_reachable(address: str, what: str = "") -> None:
    if is_loopback(address):
        remedy = "set MASTER_ADDR to the address by which the other hosts reach the first one"
        raise UserError(f"{what or address} means this host on every host", where="MASTER_ADDR", remedy=remedy)


def is_loopback(address: str) -> bool:
    return address == "localhost" or is_number(address) and ipaddress.ip_address(address).is_loopback


def is_number(address: str) -> bool:
    with suppress(ValueError):
        return bool(ipaddress.ip_address(address))
    return False


def listed(parts) -> str:
    return "; ".join(parts)


def main(command: str, *arguments: str) -> None:
    match command:
        case "check":
            print(*check(Path(arguments[0])))
        case "here":
            print(here(*map(int, arguments)))
        case "interface":
            print(interface_towards(os.environ["MASTER_ADDR"], interfaces_up()))
        case "slots":
            print(*read_hostfile(Path(arguments[0])).values())
        case "describe":
            print(json.dumps(describe()._asdict()))


if __name__ == "__main__":
    run_script(main)
