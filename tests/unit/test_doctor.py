"""Each check of kto-ds doctor, good and bad, on real conditions where a process can make them."""

import http.server
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kto_ds.config import RunConfig, WandbConfig
from kto_ds.doctor import environment, machine, network, services, stack, storage, transfers
from kto_ds.doctor.facts import Device, Facts, facts_of, installed_version
from kto_ds.doctor.findings import Finding, in_ranges, odd_ranks, refuse_what_is_wrong, show, worst
from kto_ds.errors import UserError
from kto_ds.runtime.probes import Transfer
from kto_ds.stages.doctor import count_parameters
from kto_ds.stages.rehearsal import made_up_split
from tests.faults.test_disk import mounted

GIB = 1 << 30
H100 = Device("cuda", "NVIDIA H100 80GB HBM3", "GPU-0", 80 * GIB, 79 * GIB, 8, True, True)


@pytest.fixture(scope="module")
def mine() -> Facts:
    """What a rank on this machine sees."""
    return facts_of(0, 0, torch.device("cpu"), packages=stack.package_names(), configs={"RUN.yaml": "a"})


def on_gpus(mine: Facts, num_ranks: int, **device: object) -> list[Facts]:
    """Ranks with a GPU each, the last of which is as `device` says."""
    facts = [mine._replace(rank=rank, local_rank=rank, device=H100._replace(identity=f"GPU-{rank}")) for rank in range(num_ranks)]
    return [*facts[:-1], facts[-1]._replace(host="far", device=facts[-1].device._replace(**device))]


# what is told


def test_facts_arrive_as_they_were_told(mine):
    assert Facts.from_text(mine.to_text()) == mine
    assert "lo" in mine.interfaces and mine.available_bytes > 0 and mine.versions["torch"] == installed_version("torch")


def test_ranks_in_words():
    assert in_ranges([3]) == "rank 3"
    assert in_ranges([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"
    assert odd_ranks(["a", "b", "a", "c"]) == [1, 3] and odd_ranks(["a", "b"]) == [1] and odd_ranks(["a"]) == []


def test_all_that_is_wrong_is_listed_with_its_remedy(capsys, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "verysecretvalue")
    findings = [Finding("a", "fine"), Finding("b", "bad \x1b[31m verysecretvalue", "wrong", "mend b"), Finding("c", "slow", "warn", "speed up"), Finding("d", "worse", "wrong", "mend d")]
    show(findings)
    table = capsys.readouterr().out
    assert "\x1b[31m" not in table and "verysecretvalue" not in table and "mend b" in table and "speed up" in table
    with pytest.raises(UserError) as refused:
        refuse_what_is_wrong(findings)
    assert "2 things are wrong" in str(refused.value) and all(part in str(refused.value) for part in ("mend b", "worse", "mend d")) and "slow" not in str(refused.value)
    refuse_what_is_wrong(findings[::2])


def test_the_worst_of_a_check_counts():
    slow, bad, also = Finding("x", "slow", "warn", "w"), Finding("x", "bad", "wrong", "r"), Finding("x", "also bad", "wrong", "r")
    assert worst("x", [slow, bad, also], otherwise="fine") == Finding("x", "bad\nalso bad", "wrong", "r")
    assert worst("x", [slow], otherwise="fine") == slow and worst("x", [], otherwise="fine") == Finding("x", "fine")


# versions


def fake_package(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_versions_that_fit(mine):
    assert stack.check_versions([mine, mine]).verdict == "ok"


def test_an_old_deepspeed_is_refused_with_the_reason(mine, tmp_path, monkeypatch):
    fake_package(tmp_path, "deepspeed", "0.19.7")
    monkeypatch.syspath_prepend(tmp_path)
    found = stack.check_versions([facts_of(0, 0, torch.device("cpu"), packages=stack.package_names(), configs={})])
    assert found.verdict == "wrong" and "deepspeed 0.19.7" in found.found and "NaN" in found.found and "deepspeed>=0.19.8" in found.remedy


def test_versions_that_differ_name_the_rank_and_the_host(mine):
    other = mine._replace(rank=2, host="far", versions={**mine.versions, "transformers": "5.99"}, kto_ds="0.0.9")
    found = stack.check_versions([mine, mine, other])
    assert found.verdict == "wrong" and "transformers: 5.99 on rank 2 (host far)" in found.found and "kto_ds: 0.0.9 on rank 2" in found.found
    absent = mine._replace(versions={name: version for name, version in mine.versions.items() if name != "accelerate"})
    assert "accelerate is not installed" in stack.check_versions([absent]).found


def test_kernels(tmp_path, monkeypatch):
    check = lambda backend, kernels="torch", **options: stack.check_kernels("c", backend, kernels, **{"notice": "", "on_cuda": True, "is_free": True, **options})  # noqa: E731
    assert check("sdpa", on_cuda=False).verdict == "ok" and check("torch_varlen", is_free=False).verdict == "ok"
    assert "slow on a GPU" in check("sdpa").found and "liger-kernel" in check("torch_varlen").remedy and "padded" in check("sdpa", notice="padded").found
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    (tmp_path / "liger_kernel").mkdir()
    (tmp_path / "liger_kernel" / "transformers.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    found = check("flash_attention_2")
    assert found.verdict == "wrong" and "undefined symbol" in found.found and "torch_varlen" in found.remedy
    assert check("torch_varlen", "liger").verdict == "ok"


def test_configs_that_differ(mine):
    assert stack.check_configs([mine, mine]).verdict == "ok"
    found = stack.check_configs([mine, mine._replace(rank=1, host="far", configs={"RUN.yaml": "b"})])
    assert found.verdict == "wrong" and "RUN.yaml on rank 1 (host far)" in found.found


def test_a_driver_without_a_torch_for_it(mine):
    has_driver = mine._replace(driver="550.54.15", torch_cuda="")
    assert stack.check_driver([mine], is_cpu_wanted=True).verdict == "ok"
    found = stack.check_driver([has_driver], is_cpu_wanted=False)
    assert found.verdict == "wrong" and "550.54.15" in found.found and "built for CPUs" in found.found
    assert stack.check_driver([has_driver], is_cpu_wanted=True).verdict == "warn"
    assert stack.check_driver([mine, mine, has_driver], is_cpu_wanted=True).verdict == "warn"


# devices and limits


@pytest.mark.parametrize("device, verdict, words", [
    ({}, "ok", "4 x NVIDIA H100"),
    ({"identity": ""}, "wrong", "8 GPUs are visible"),
    ({"identity": "GPU-0"}, "wrong", "ranks 0, 3 use the same GPU"),
    ({"free_bytes": 60 * GIB}, "warn", "20.0 of 80.0 GiB of the GPU of rank 3 (host far)"),
    ({"has_bfloat16": False}, "wrong", "no bfloat16"),
    ({"name": "NVIDIA A100"}, "wrong", "NVIDIA A100 on rank 3"),
    ({"total_bytes": 40 * GIB, "free_bytes": 39 * GIB}, "warn", "40 GiB on rank 3"),
    ({"reaches_peers": False}, "warn", "GPUs of far do not reach each other"),
])  # fmt: skip
def test_devices(mine, device, verdict, words):
    found = machine.check_devices(on_gpus(mine, 4, **device), dtype="bfloat16")
    assert found.verdict == verdict and words in found.found, found


def test_devices_on_cpus(mine):
    assert machine.check_devices([mine, mine], dtype="bfloat16").verdict == "ok"
    mixed = machine.check_devices([mine, *on_gpus(mine, 2)], dtype="bfloat16")
    assert mixed.verdict == "wrong" and "rank 0" in mixed.found


def test_host_memory_counts_all_ranks_of_a_host(mine):
    facts = [mine._replace(rank=rank, host="ab"[rank // 2], available_bytes=10 * GIB) for rank in range(4)]
    assert machine.check_host_memory(facts, needed_per_rank=4 * GIB, why="x").verdict == "ok"
    found = machine.check_host_memory(facts, needed_per_rank=6 * GIB, why="offload")
    assert found.verdict == "wrong" and "12.0 GiB are needed" in found.found and "offload" in found.found


def test_limits(mine):
    assert machine.check_limits([mine._replace(open_files=65536, locked_bytes=-1)], pins_memory=True).verdict == "ok"
    found = machine.check_limits([mine._replace(open_files=1024, locked_bytes=65536, shm_bytes=64 << 20, device=H100)], pins_memory=True)
    assert found.verdict == "warn" and "1024 open files" in found.found and "64 KiB of locked" in found.found and "64 MiB" in found.found
    assert "ulimit -n" in found.remedy and "--shm-size" in found.remedy and "memlock" in found.remedy.lower()


# network

LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("variables, words", [
    ({}, ""),
    ({"MASTER_PORT": ""}, "MASTER_PORT is not"),
    ({"RANK": "2"}, "rank 2 of 2"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
    ({"LOCAL_RANK": "2"}, "local rank 2 of 2"),
    ({"LOCAL_SIZE": "4"}, "4 ranks on this machine, of 2"),
    ({"MASTER_ADDR": "no-such-host.invalid"}, "is not known"),
    ({"LOCAL_SIZE": "1", "LOCAL_RANK": "0"}, "every machine's own"),
])  # fmt: skip
def test_launch(variables, words):
    found = network.check_launch({**LAUNCHED, **variables})
    assert (found.verdict == "wrong" and words in found.found and found.remedy) if words else found.verdict == "ok", found
    assert network.check_launch({}).verdict == "ok"


@pytest.mark.parametrize("variable, value, is_cuda, verdict", [
    ("GLOO_SOCKET_IFNAME", "lo", False, "ok"),
    ("GLOO_SOCKET_IFNAME", "nope0", False, "wrong"),
    ("GLOO_SOCKET_IFNAME", "l", False, "wrong"),
    ("NCCL_SOCKET_IFNAME", "nope", False, "warn"),
    ("NCCL_SOCKET_IFNAME", "l", True, "ok"),
    ("NCCL_SOCKET_IFNAME", "=l", True, "wrong"),
    ("NCCL_SOCKET_IFNAME", "=lo", True, "ok"),
    ("NCCL_SOCKET_IFNAME", "^nope", True, "ok"),
])  # fmt: skip
def test_interfaces(mine, variable, value, is_cuda, verdict):
    facts = [mine._replace(variables={variable: value}, device=H100 if is_cuda else mine.device)]
    found = network.check_interfaces(facts)
    assert found.verdict == verdict
    if verdict == "wrong":
        assert value.strip("=") in found.found and "it has " in found.found and "lo" in found.found and variable in found.remedy


def test_a_host_whose_name_leads_to_itself(mine):
    facts = [mine._replace(host=host, own_address="127.0.1.1", route="eth7", variables={}) for host in ("a", "b")]
    found = network.check_interfaces(facts)
    assert found.verdict == "wrong" and "GLOO_SOCKET_IFNAME=eth7" in found.remedy
    assert network.check_interfaces(facts[:1]).verdict == "ok"
    assert network.check_interfaces([fact._replace(variables={"GLOO_SOCKET_IFNAME": "lo"}) for fact in facts]).verdict == "ok"


def test_ranks_of_one_machine_under_two_names(mine):
    twice = [mine, mine._replace(rank=1)]
    assert network.check_ranks(twice).verdict == "warn" and "two names" in network.check_ranks(twice).found
    assert network.check_ranks([mine, mine._replace(rank=1, local_rank=1)]).verdict == "ok"


def test_clocks(mine):
    facts = [mine._replace(rank=rank, host=f"h{rank}") for rank in range(3)]
    assert network.check_clocks([100.0, 100.2, 99.9], facts).verdict == "ok"
    found = network.check_clocks([100.0, 100.2, 160.0], facts)
    assert found.verdict == "warn" and "h2 (rank 2) is +59.8 s off" in found.found


def test_collectives_and_who_holds_them_up(mine):
    facts = [mine._replace(rank=rank, host=f"h{rank}") for rank in range(4)]
    good = [Transfer(4 << 10, 0.001, []), Transfer(64 << 20, 0.0671, [])]
    found = transfers.check_transfers("all-reduce", good, facts, bus_factor=1.5)
    assert found.verdict == "ok" and "64 MiB: 1.00 GB/s, 1.50 GB/s of bus; 4 KiB in 1.00 ms" in found.found
    bad = transfers.check_transfers("all-reduce", [good[0]._replace(wrong_ranks=[2]), good[1]], facts, bus_factor=1.5)
    assert bad.verdict == "wrong" and "rank 2 (host h2)" in bad.found
    assert transfers.check_links([0.1, 0.11, 0.09, 0.1], facts, num_bytes=1 << 20).verdict == "ok"
    slow = transfers.check_links([0.1, 0.9, 0.09, 0.1], facts, num_bytes=1 << 20)
    assert slow.verdict == "warn" and "from rank 0 to rank 1 (host h1)" in slow.found
    assert transfers.check_links([0.001, 0.009, 0.001, 0.001], facts, num_bytes=1 << 20).verdict == "ok", "noise"
    assert transfers.check_speeds([700.0, 690.0, 710.0, 705.0], facts).verdict == "ok"
    assert "rank 3 (host h3) 300 TFLOP/s" in transfers.check_speeds([700.0, 690.0, 710.0, 300.0], facts).found
    assert "rank 1" in transfers.check_speeds([700.0, 300.0], facts[:2]).found


# environment


@pytest.mark.parametrize("variables, words, verdict", [
    ({"OMP_NUM_THREADS": "1"}, "", "ok"),
    ({}, "OMP_NUM_THREADS is not set", "warn"),
    ({"OMP_NUM_THREADS": "1", "CUDA_LAUNCH_BLOCKING": "1"}, "CUDA_LAUNCH_BLOCKING", "warn"),
    ({"OMP_NUM_THREADS": "1", "NCCL_P2P_DISABLE": "1"}, "NCCL_P2P_DISABLE", "warn"),
    ({"OMP_NUM_THREADS": "1", "NCCL_DEBUG": "INFO"}, "NCCL_DEBUG", "warn"),
    ({"OMP_NUM_THREADS": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}, "waits for ever", "warn"),
    ({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, "name of the hub", "warn"),
    ({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0,0"}, "named twice", "wrong"),
    ({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, "hides every GPU", "warn"),
    ({"OMP_NUM_THREADS": "1", "http_proxy": "http://proxy:3128"}, "localhost", "warn"),
    ({"OMP_NUM_THREADS": "1", "http_proxy": "http://proxy:3128", "no_proxy": "localhost, 127.0.0.1"}, "", "ok"),
])  # fmt: skip
def test_variables(variables, words, verdict):
    found = environment.check_variables([variables] * 2, on_cuda=False, names_hub_model=True, num_local=2)
    assert found.verdict == verdict and words in found.found, found
    assert verdict == "ok" or found.remedy


def test_variables_on_gpus_and_between_ranks():
    fitting = {"OMP_NUM_THREADS": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    check = lambda *environments: environment.check_variables(environments, on_cuda=True, names_hub_model=False, num_local=1)  # noqa: E731
    assert check(fitting).verdict == "ok" and check({**fitting, "HF_HUB_OFFLINE": "1"}).verdict == "ok"
    assert "expandable_segments" in check({"OMP_NUM_THREADS": "1"}).remedy
    found = check({**fitting, "RANK": "0", "NCCL_ALGO": "Ring"}, {**fitting, "RANK": "1"})
    assert found.verdict == "warn" and "NCCL_ALGO: 'Ring' on rank 0, not set on rank 1" in found.found and "DS_ENV_FILE" in found.remedy


def test_secrets_are_no_facts(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://user:topsecretword@proxy:3128")
    monkeypatch.setenv("WANDB_API_KEY", "abcdefghijk")
    found = facts_of(0, 0, torch.device("cpu"), packages=[], configs={}).to_text()
    assert "topsecretword" not in found and "abcdefghijk" not in found and "proxy:3128" in found


def test_a_lock_is_stale_when_nobody_has_it_open(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    lock = tmp_path / "cpu_adam" / "lock"
    held = os.open(lock, os.O_CREAT | os.O_EXCL)
    assert environment.stale_locks(tmp_path) == []
    os.close(held)
    assert environment.stale_locks(tmp_path) == [str(lock)]
    assert environment.check_operators(tmp_path, is_needed=False, has_several_hosts=False).verdict == "warn"
    found = environment.check_operators(tmp_path, is_needed=True, has_several_hosts=False)
    assert found.verdict == "wrong" and str(lock) in found.found and f"rm {lock}" in found.remedy
    lock.unlink()
    assert environment.check_operators(tmp_path, is_needed=False, has_several_hosts=False).verdict == "ok"


def test_operators_need_a_compiler_and_a_place(tmp_path, monkeypatch):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("ninja", "c++", "nvcc"):
        (programs / name).write_text("#!/bin/sh\n")
        (programs / name).chmod(0o755)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ext"))
    check = lambda folder: environment.check_operators(folder, is_needed=True, has_several_hosts=False)  # noqa: E731
    assert check(tmp_path / "ext").verdict == "ok"
    (tmp_path / "file").touch()
    assert check(tmp_path / "file").verdict == "wrong" and "cannot be written to" in check(tmp_path / "file").found
    (programs / "ninja").unlink()
    assert "no ninja" in check(tmp_path / "ext").found
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    (programs / "ninja").write_text("#!/bin/sh\n")
    (programs / "ninja").chmod(0o755)
    assert check(tmp_path / "ext").verdict == "warn"


# folders


def test_a_folder_that_can_be_written_to(tmp_path):
    probe = storage.probe_writing(tmp_path / "new" / "run", 0)
    found = storage.check_writing(tmp_path / "new" / "run", [probe], ["here"])
    assert probe.problem == "" and probe.seconds > 0 and found.verdict in ("ok", "warn"), found
    assert list((tmp_path / "new" / "run").iterdir()) == [], "nothing of the probe stays"


def test_folders_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=1m", "kto-doctor") as small:
        probes = [storage.probe_writing(folder, 0) for folder in (tmp_path / "file" / "run", small, Path("/proc/run"))]
        assert list(small.iterdir()) == []
    assert "Not a directory" in probes[0].problem and "No space left" in probes[1].problem and probes[2].problem
    found = storage.check_writing(tmp_path, probes, ["a", "b", "c"])
    assert found.verdict == "wrong" and "rank 1 (host b)" in found.found and "No space left" in found.found


def test_a_mark_tells_folders_apart(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    storage.place_mark(tmp_path / "a", "t")
    assert storage.sees_mark(tmp_path / "a", "t")
    began = time.monotonic()
    assert not storage.sees_mark(tmp_path / "b", "t") and time.monotonic() - began < 10
    storage.remove_mark(tmp_path / "a", "t")
    assert list((tmp_path / "a").iterdir()) == []
    found = storage.check_sharing(tmp_path, [True, False], ["/x/run", "/y/run"], ["h0", "h1"])
    assert found.verdict == "wrong" and "/y/run of rank 1 (host h1) is another folder than /x/run of rank 0" in found.found
    assert storage.check_sharing(tmp_path, [True, True], ["/x", "/x"], ["h0", "h1"]).verdict == "ok"


def test_space_for_checkpoints(tmp_path):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=10m", "kto-doctor") as disk:
        check = lambda **sizes: storage.check_space(disk / "run", **{"export_bytes": 1 << 20, "kept": 3, "present_bytes": 0, **sizes}).verdict  # noqa: E731
        assert check(checkpoint_bytes=2 << 20) == "ok"
        assert check(checkpoint_bytes=3 << 20) == "warn"
        assert check(checkpoint_bytes=3 << 20, present_bytes=3 << 20) == "ok", "what lies there goes"
        assert check(checkpoint_bytes=11 << 20) == "wrong"


# wandb


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(404)
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as answering:
        threading.Thread(target=answering.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{answering.server_port}"
        answering.shutdown()


def test_wandb(server, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", server)
    check: Callable[[str], Finding] = lambda mode: services.check_wandb(WandbConfig(mode=mode), tmp_path)  # noqa: E731
    assert check("disabled").verdict == check("offline").verdict == "ok"
    assert check("online").verdict == "warn" and "no API key" in check("online").found
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password abc\n")
    assert check("online").verdict == "ok", check("online")
    (tmp_path / "wandb").touch()
    assert check("offline").verdict == "warn"


def test_a_server_that_does_not_answer_costs_a_bounded_time(tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began = time.monotonic()
        assert not services.reaches(f"http://127.0.0.1:{silent.getsockname()[1]}", seconds=1.0)
        assert time.monotonic() - began < 30
    assert not services.reaches("http://127.0.0.1:1", seconds=1.0), "nobody listens there"


# the dry run


def test_parameters_are_counted_without_memory_for_them():
    shape = LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    assert count_parameters(shape) == sum(parameter.numel() for parameter in LlamaForCausalLM(shape).parameters())
    large = LlamaConfig(vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8)
    assert count_parameters(large) == 70_553_706_496


@pytest.mark.parametrize("num_ranks", [1, 8])
def test_made_up_rows_fill_a_micro_batch_of_every_rank(num_ranks):
    config = RunConfig(output_dir="run", model={"path": "x"}, data={"train": [{"path": "y"}], "max_length": 100}, batch={"max_tokens_per_microbatch": 250, "global_batch_size": 12})
    split = made_up_split(config, LlamaConfig(vocab_size=61, max_position_embeddings=4096), num_ranks)
    assert split.longest_pair_tokens == 100 and split.num_examples == min(12, max(2, 2 * num_ranks))
    lengths = split.prompt_lengths[split.pair_prompts] + split.pair_lengths
    assert set(lengths) == {100} and (split.mismatched_prompt_of != split.prompt_of).all()
    assert all(len(split.completion(pair)) == 50 and 0 <= split.completion(pair).min() <= split.completion(pair).max() < 61 for pair in range(2 * split.num_examples))
    short = made_up_split(config, LlamaConfig(vocab_size=61, max_position_embeddings=33), num_ranks)
    assert short.longest_pair_tokens == 33
