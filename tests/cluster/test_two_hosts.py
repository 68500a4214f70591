"""The launch scripts over two hosts: what is trained there, how it is stopped, and what becomes of it when the cable is cut."""

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.cluster.namespaces import ADDRESSES, SSH_PORT, TwoHosts
from tests.distributed.runs import ROOT
from tests.distributed.tiny_run import status_of
from tests.faults.state import final_state, newest_intact, steps_begun

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

LAUNCH = ROOT / "launch"
SECONDS = 900  # on a machine that is busy with others
TIMEOUT_SECONDS = 60  # train.step_timeout_seconds of the runs that are cut


def multi_node(hosts: TwoHosts, arguments: list[str], log: Path) -> list[subprocess.Popen]:
    return [hosts.start(0, ["bash", str(LAUNCH / "multi_node.sh"), str(hosts.hostfile()), *arguments], log)]


def multi_node_no_ssh(hosts: TwoHosts, arguments: list[str], log: Path) -> list[subprocess.Popen]:
    command = ["bash", str(LAUNCH / "multi_node_no_ssh.sh"), str(hosts.hostfile()), *arguments]
    return [hosts.start(host, command, log, NODE_RANK=str(host), MASTER_ADDR=ADDRESSES[0]) for host in (0, 1)]


def torchrun(hosts: TwoHosts, arguments: list[str], log: Path) -> list[subprocess.Popen]:
    command = ["bash", str(LAUNCH / "torchrun.sh"), *arguments]
    return [hosts.start(host, command, log, NNODES="2", NODE_RANK=str(host), MASTER_ADDR=ADDRESSES[0], NUM_RANKS="1") for host in (0, 1)]


WAYS = [multi_node, multi_node_no_ssh, torchrun]


def ended(scripts: list[subprocess.Popen], log: Path, seconds: float = SECONDS) -> list[int]:
    """Return the exit codes, in the order of the hosts."""
    deadline = time.monotonic() + seconds
    try:
        return [script.wait(max(0.1, deadline - time.monotonic())) for script in scripts]
    except subprocess.TimeoutExpired as late:
        raise AssertionError(f"still runs after {seconds:g} s:\n{log.read_text(errors='replace')[-6000:]}") from late


def wait_for_step(run: Path, step: int, scripts: list[subprocess.Popen], log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while steps_begun(run) < step:
        assert all(script.poll() is None for script in scripts) and time.monotonic() < deadline, log.read_text(errors="replace")[-6000:]
        time.sleep(0.02)


@pytest.mark.parametrize("launch, stopped", list(zip(WAYS, (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR1), strict=True)), ids=[way.__name__ for way in WAYS])
def test_a_run_over_two_hosts_is_stopped_and_goes_on(hosts, medium, in_peace, tmp_path, launch, stopped):
    """It ends as on two ranks of one machine that nobody disturbed, to the bit."""
    (run, arguments), log = medium, tmp_path / "log"
    scripts = launch(hosts, arguments, log)
    wait_for_step(run, 5, scripts, log)
    scripts[-1].send_signal(stopped)
    assert ended(scripts, log) == [75] * len(scripts), log.read_text()[-6000:]
    assert status_of(run)["state"] == "preempted" and newest_intact(run) is not None
    assert steps_begun(run) < in_peace["step"]

    assert ended(launch(hosts, arguments, log), log) == [0] * len(scripts), log.read_text()[-6000:]
    assert final_state(run) == in_peace
    assert hosts.pkills() == []


@pytest.mark.parametrize("launch, codes", [(multi_node_no_ssh, [1, 1]), (multi_node, [255])], ids=["multi_node_no_ssh", "multi_node"])
def test_a_host_that_is_cut_off_ends_the_run_on_both_sides_and_it_goes_on(hosts, medium, in_peace, tmp_path, launch, codes):
    (run, arguments), log = medium, tmp_path / "log"
    scripts = launch(hosts, [*arguments, "--train.step_timeout_seconds", str(TIMEOUT_SECONDS)], log)
    try:
        wait_for_step(run, 15, scripts, log)
        ranks = [json.loads((run / "ranks" / f"rank{rank}.json").read_text())["pid"] for rank in (0, 1)]
        hosts.cut()
        began = time.monotonic()
        while any(psutil.pid_exists(pid) for pid in ranks):
            assert time.monotonic() - began < TIMEOUT_SECONDS + 30, log.read_text(errors="replace")[-6000:]
            time.sleep(0.2)
        status = status_of(run)
        assert (status["state"], status["exit_code"]) == ("failed", 1)
        assert f"no progress for {TIMEOUT_SECONDS} s" in status["reason"] and "rank 0 (host" in status["reason"] and "rank 1 (host" in status["reason"]
        # pdsh gives up on its dead connection after a minute.
        assert ended(scripts, log, seconds=90) == codes
        assert log.read_text().count("no progress for") == 1
    finally:
        hosts.mend()

    assert ended(launch(hosts, arguments, log), log) == [0] * len(scripts), log.read_text()[-6000:]
    assert "resuming at step" in log.read_text()
    assert final_state(run) == in_peace
    assert hosts.pkills() == []


def test_the_page_from_config_to_export(hosts, tiny, tmp_path):
    """The commands of docs/cluster.md in their order, on two hosts, but for its first block, which makes the environment; a tiny model stands for the large one."""
    section = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8").split("\n## ")[1]
    [config] = re.findall(r"^```yaml\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    _, *blocks = re.findall(r"^```bash\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    program = "".join(blocks)
    for command in ("plan", "prepare", "inspect", "doctor", "precompute-ref", "multi_node.sh /shared/hosts", "export --config", "evaluate"):
        assert command in program, command
    places = {
        "/shared/models/Qwen3-32B": tiny / "model", "/shared/data/feedback.jsonl": tiny / "rows.jsonl", "/shared/": f"{tmp_path}/", "node1": ADDRESSES[0], "node2": ADDRESSES[1],
        "slots=8": "slots=1", "deepspeed --hostfile": f"deepspeed --ssh_port {SSH_PORT} --hostfile", "--num_accelerators 8": "--num_accelerators 1",
        "global_batch_size: 128": "global_batch_size: 8", "held_out_fraction: 0.02": "held_out_fraction: 0.2", "max_length: 4096": "max_length: 64",
    }  # fmt: skip
    for shown, here in places.items():
        assert shown in program + config, shown
        program, config = program.replace(shown, str(here)), config.replace(shown, str(here))
    (tmp_path / "run.yaml").write_text(config)
    (tmp_path / "ds_env").write_text("".join(f"{name}={value}\n" for name, value in {"GLOO_SOCKET_IFNAME": "eth0", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}.items()))
    log = tmp_path / "log"
    assert ended([hosts.start(0, ["bash", "-euo", "pipefail", "-c", program], log)], log) == [0], log.read_text(errors="replace")[-6000:]
    run = tmp_path / "runs" / "qwen3-32b-kto"
    assert status_of(run)["state"] == "completed" and (run / "export" / "model.safetensors").is_file()
    assert json.loads((run / "evaluation.json").read_text())["splits"]["eval/held_out"]["count/chosen"] >= 0
    text = log.read_text(errors="replace")
    assert text.count("right on all ranks") == 2 * 3, "an all-reduce and an all-gather of doctor by itself, and before each of the two launches"
    assert re.search(r"ranks +2, ZeRO 3", text) and hosts.pkills() == []


def test_arguments_and_folders_with_any_character_reach_both_hosts(hosts, medium, tmp_path):
    (_, arguments), log = medium, tmp_path / "log"
    run = tmp_path / "it's \"one\" run, $HOME 100%n"
    arguments = [*arguments, "--output_dir", str(run), "--train.max_steps", "2"]
    assert ended(multi_node(hosts, arguments, log), log) == [0], log.read_text()[-6000:]
    assert status_of(run) == {"state": "completed", "step": 2, "exit_code": 0, "reason": ""}


@pytest.mark.parametrize(
    "lines, variables, said",
    [
        (["10.77.0.1 slots=1", "10.77.0.9 slots=1"], {}, "10.77.0.9: "),
        (["10.77.0.1 slots=1", "no-such-host slots=1"], {}, "no-such-host: "),
        (["10.77.0.1 slots=1", "10.77.0.2 slots=4096"], {}, "10.77.0.2: slots=4096, found "),
        (["10.77.0.1 slots=1", "127.0.0.1 slots=1"], {}, "10.77.0.1 and 127.0.0.1 are the same machine"),
        (["10.77.0.1 slots=1", "10.77.0.2 slots=1"], {"INTERFACE": "eth7"}, "no interface 'eth7' that is up: 10.77.0.1 has eth0, lo; 10.77.0.2 has eth0, lo"),
        (["10.77.0.1 slots=1", "10.77.0.2 slots=1"], {"MASTER_ADDR": "10.77.0.2"}, "10.77.0.2 is no address of the first host"),
    ],
)
def test_hosts_that_are_not_what_the_hostfile_says_are_refused(hosts, tmp_path, lines, variables, said):
    log = tmp_path / "log"
    (tmp_path / "hosts").write_text("".join(f"{line}\n" for line in lines))
    script = hosts.start(0, ["bash", str(LAUNCH / "multi_node.sh"), str(tmp_path / "hosts"), "run.yaml"], log, **variables)
    assert ended([script], log) == [2]
    assert log.read_text().count("kto-ds: error:") == 1 and said in log.read_text() and "remedy:" in log.read_text()
    assert "multi_node: doctor" not in log.read_text(), "nothing was started"
