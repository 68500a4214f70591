"""How the ranks of a job find one another: what the launcher says, interfaces, clocks."""

import ipaddress
import socket
from collections import Counter
from collections.abc import Mapping, Sequence

from kto_ds.doctor.facts import Facts
from kto_ds.doctor.findings import Finding, in_ranges, worst

SKEW_SECONDS = 1.0
INTERFACE_VARIABLES = {"cuda": "NCCL_SOCKET_IFNAME", "cpu": "GLOO_SOCKET_IFNAME"}


def check_launch(variables: Mapping[str, str]) -> Finding:
    """Look at what this rank's launcher says, before anybody is called."""
    name, hostfile = "launch", "start it with deepspeed or torchrun, which set these variables, and look at the hostfile"
    if "RANK" not in variables:
        return Finding(name, "one process, without a launcher")
    absent = [key for key in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not variables.get(key)]
    if absent:
        return Finding(name, f"RANK is set, but {', '.join(absent)} {'are' if len(absent) > 1 else 'is'} not", "wrong", hostfile)
    numbers = {key: variables[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    if strange := [f"{key}={value!r}" for key, value in numbers.items() if not value.isdigit()]:
        return Finding(name, f"{', '.join(strange)}: expected a number", "wrong", hostfile)
    rank, world, local, num_local = int(variables["RANK"]), int(variables["WORLD_SIZE"]), int(variables["LOCAL_RANK"]), ranks_here(variables)
    findings = []
    if rank >= world:
        findings.append(Finding(name, f"rank {rank} of {world} ranks", "wrong", hostfile))
    if num_local and local >= num_local:
        findings.append(Finding(name, f"local rank {local} of {num_local} ranks on this machine", "wrong", hostfile))
    if num_local > world:
        findings.append(Finding(name, f"{num_local} ranks on this machine, of {world} in all", "wrong", hostfile))
    address = variables["MASTER_ADDR"]
    numeric = resolved(address)
    if not numeric:
        findings.append(Finding(name, f"MASTER_ADDR={address!r} is not known on {socket.gethostname()}", "wrong", "give rank 0's address as a number (--master_addr), or see to DNS or /etc/hosts"))
    elif has_several_hosts(variables) and ipaddress.ip_address(numeric).is_loopback:
        what = f"MASTER_ADDR={address!r} is {numeric}, every machine's own, and there are ranks on several"
        findings.append(Finding(name, what, "wrong", "give the address at which the other hosts see rank 0's (--master_addr)"))
    return worst(name, findings, otherwise=f"{world} ranks{f', {num_local} on this machine' if num_local else ''}, which meet at {address}:{variables['MASTER_PORT']}")


def ranks_here(variables: Mapping[str, str]) -> int:
    """Return how many ranks the launcher says it has started on this machine, 0 where it does not say."""
    said = variables.get("LOCAL_WORLD_SIZE") or variables.get("LOCAL_SIZE") or "0"  # of torchrun, of deepspeed
    return int(said) if said.isdigit() else 0


def has_several_hosts(variables: Mapping[str, str]) -> bool:
    """Whether the launcher has started fewer ranks here than there are."""
    return 0 < ranks_here(variables) < int(variables.get("WORLD_SIZE", "1"))


def resolved(address: str) -> str:
    """Return the numeric address of a name, or an empty text."""
    try:
        return socket.getaddrinfo(address, None)[0][4][0]
    except OSError:
        return ""


def check_ranks(facts: Sequence[Facts]) -> Finding:
    """Compare what the launchers of all hosts said with who has come."""
    findings, per_host = [], Counter(fact.host for fact in facts)
    fix = "look at the hostfile: each machine once, with as many slots as it has devices"
    for place, count in Counter((fact.host, fact.local_rank) for fact in facts).items():
        if count > 1:
            findings.append(Finding("ranks", f"{count} ranks have local rank {place[1]} on {place[0]}: it may stand in the hostfile under two names", "warn", fix))
    if len(set(per_host.values())) > 1:
        findings.append(Finding("ranks", f"hosts have unequal numbers of ranks: {', '.join(f'{host} {count}' for host, count in per_host.items())}", "warn", fix))
    return worst("ranks", findings, otherwise=f"{len(facts)} rank{'s' if len(facts) > 1 else ''} on {len(per_host)} host{'s' if len(per_host) > 1 else ''}")


def check_interfaces(facts: Sequence[Facts]) -> Finding:
    """Refuse an interface that a host does not have, and a host whose own name leads to itself: a process group would wait for it in vain."""
    findings, has_several = [], len({fact.host for fact in facts}) > 1 or any(has_several_hosts(fact.variables) for fact in facts)
    for fact in facts:
        own = INTERFACE_VARIABLES[fact.device.kind]
        usual = f"export {own}={fact.route or 'the interface to the other hosts'} on {fact.host}, or leave it out"
        for variable in sorted({own, *INTERFACE_VARIABLES.values()} & fact.variables.keys()):
            absent = _absent_interfaces(variable, fact.variables[variable], fact.interfaces)
            if absent:
                what = f"{variable} names {', '.join(absent)}, which {fact.host} does not have; it has {', '.join(fact.interfaces)}"
                findings.append(Finding("interfaces", what, "wrong" if variable == own else "warn", usual.replace(own, variable)))
        chosen = fact.variables.get(own, "")
        if has_several and fact.device.kind == "cpu" and not chosen and fact.own_address.startswith("127."):
            what = f"{fact.host} takes its own name for {fact.own_address}, so that gloo would offer other hosts an address of their own"
            findings.append(Finding("interfaces", what, "wrong", usual.removesuffix(", or leave it out")))
    chosen = [f"{name}={facts[0].variables[name]}" for name in INTERFACE_VARIABLES.values() if name in facts[0].variables]
    return worst("interfaces", findings, otherwise=", ".join(chosen) or f"none is named; {facts[0].route or 'the system'} leads to rank 0")


def _absent_interfaces(variable: str, value: str, interfaces: Sequence[str]) -> list[str]:
    """Return those named by a variable that no interface fits. NCCL takes beginnings of names, `=name` for a whole one, and `^name` for any other."""
    if variable.startswith("GLOO"):
        return [name for name in value.split(",") if name and name not in interfaces]
    if value.startswith("^"):
        return []
    whole, names = value.startswith("="), value.removeprefix("=").split(",")
    return [name for name in names if name and not any(one == name if whole else one.startswith(name) for one in interfaces)]


def check_clocks(unix_times: Sequence[float], facts: Sequence[Facts]) -> Finding:
    """`unix_times` were read by all ranks at one moment."""
    ordered = sorted(unix_times)
    usual = ordered[len(ordered) // 2]
    off = [rank for rank, found in enumerate(unix_times) if abs(found - usual) > SKEW_SECONDS]
    if off:
        hosts = ", ".join(sorted({facts[rank].host for rank in off}))
        what = f"the clock of {hosts} ({in_ranges(off)}) is {unix_times[off[0]] - usual:+.1f} s off"
        return Finding("clocks", what, "warn", "switch on time synchronisation (chrony); times in logs and ages of files cannot be compared")
    return Finding("clocks", f"within {ordered[-1] - ordered[0]:.2f} s of one another" if len(facts) > 1 else "one rank")
