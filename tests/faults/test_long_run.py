"""What grows with the number of steps and saves, and what a save costs above DeepSpeed's own."""

import functools
import json
import os
import time
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.distributed import ranks
from tests.distributed.runs import number_tokenizer
from tests.distributed.tiny_run import config_of
from tests.faults.ledger import tally
from tests.faults.points import Point, call_at
from tests.faults.state import checkpoints_of, is_intact, steps_begun

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS, SAVE_EVERY, KEPT = 2000, 10, 3
WARM = 0.25  # share of the run that caches and pools have to fill
MIB = 1 << 20


class Sample(NamedTuple):
    step: int
    descriptors: int  # of all ranks
    threads: int
    rss_mib: float
    shared_memory: int  # entries of /dev/shm that the ranks have open or mapped
    checkpoints: int


def sample(run: Path, processes: list[psutil.Process]) -> Sample:
    known = [process.as_dict(["num_fds", "num_threads", "memory_info"]) for process in processes]
    return Sample(
        steps_begun(run), sum(each["num_fds"] for each in known), sum(each["num_threads"] for each in known),
        sum(each["memory_info"].rss for each in known) / MIB, sum(len(shared_memory_of(process.pid)) for process in processes), len(list((run / "checkpoints").glob("*step-*"))),
    )  # fmt: skip


def shared_memory_of(pid: int) -> set[str]:
    """Return the entries of /dev/shm that a process has, by name; what else lies there is of other programs, and of killed ones."""
    mapped = {line.split(maxsplit=5)[5].strip() for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "/dev/shm/" in line}
    return mapped | {target for file in os.scandir(f"/proc/{pid}/fd") if (target := _target(file.path)).startswith("/dev/shm/")}


def _target(link: str) -> str:
    try:
        return os.readlink(link)
    except FileNotFoundError:  # closed in the meantime
        return ""


def test_shared_memory_is_seen():
    before = shared_memory_of(os.getpid())
    with open("/dev/shm/kto-ds-test", "wb") as file:
        assert len(shared_memory_of(os.getpid()) - before) == 1
    os.unlink(file.name)
    memory = SharedMemory(create=True, size=1)
    try:
        assert len(shared_memory_of(os.getpid()) - before) == 1
    finally:
        memory.close()
        memory.unlink()
    assert shared_memory_of(os.getpid()) == before


def test_nothing_grows(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    overrides = dict(train__num_train_epochs=STEPS // 4, checkpoint__save_steps=SAVE_EVERY, checkpoint__save_total_limit=KEPT, report__logging_steps=5, eval__eval_steps=100)
    samples: list[Sample] = []
    with tally("R23", f"{STEPS:,} steps on 2 ranks, a save every {SAVE_EVERY}: descriptors, threads, memory, /dev/shm, number of checkpoints") as counts:
        with ranks.Ranks(["train", *config_of(tiny, output_dir=run, **overrides)], log=tmp_path / "log") as started:
            processes = [psutil.Process(process.pid) for process in started.processes]
            while started.is_running():
                if started.is_running() and steps_begun(run) >= WARM * STEPS:
                    try:
                        samples.append(sample(run, processes))
                    except (psutil.Error, TypeError, AttributeError, OSError):  # it has just ended
                        break
                time.sleep(1)
            assert started.wait(1200) == [0, 0], started.output()[-3000:]
        samples = [each for each in samples if each.step <= 0.98 * STEPS]  # what ends the run is not the run
        assert len(samples) >= 20
        counts.injected += STEPS // SAVE_EVERY
        steps = [each.step for each in samples]
        slopes = {name: float(np.polyfit(steps, [vars_of[name] for vars_of in map(Sample._asdict, samples)], 1)[0]) * 1000 for name in Sample._fields[1:]}
        with capsys.disabled():
            print(f"\n{STEPS:,} steps, growth in 1,000 steps: {', '.join(f'{name} {slope:+.2f}' for name, slope in slopes.items())}; last: {samples[-1]}")
        assert abs(slopes["descriptors"]) < 2 and abs(slopes["threads"]) < 2 and slopes["shared_memory"] < 1, slopes
        assert slopes["rss_mib"] < 8, "MiB in 1,000 steps, both ranks together"
        assert max(each.checkpoints for each in samples) <= KEPT + 2, "those kept, one that is written, one that is deleted"
        assert [path.name for path in checkpoints_of(run)] == [f"step-{step:08d}" for step in range(STEPS, STEPS - KEPT * SAVE_EVERY, -SAVE_EVERY)][::-1]
        assert all(map(is_intact, checkpoints_of(run)))
        counts.survived += STEPS // SAVE_EVERY


def time_saves(rank: int, *, folder: Path) -> None:
    """Note, on every rank, when a save begins and ends, and DeepSpeed's part of it."""
    for name, target in (("all", "kto_ds.runtime.checkpoint.save_checkpoint"), ("deepspeed", "deepspeed.runtime.engine.DeepSpeedEngine.save_checkpoint")):
        for number in range(1, NUM_SAVES + 1):
            for when in ("before", "after"):
                call_at(Point("", target, when, nth=number), functools.partial(_note, folder / f"rank{rank}.jsonl", name, when))


def _note(path: Path, name: str, when: str) -> None:
    with path.open("a") as file:
        file.write(json.dumps([name, when, time.perf_counter()]) + "\n")


NUM_SAVES = 6


def test_what_a_save_costs(tiny, tmp_path, capsys):
    """Sync, digest, manifest, rename and retention beside DeepSpeed's own writing, for a model of 7 million weights."""
    torch.manual_seed(0)
    shape = dict(vocab_size=61, hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256)
    LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=1, eos_token_id=2, pad_token_id=0)).save_pretrained(tmp_path / "model")
    number_tokenizer(61).save_pretrained(tmp_path / "model")
    run = tmp_path / "run"
    places = dict(model__path=tmp_path / "model", output_dir=run, data__artifact=tmp_path / "dataset", reference__artifact=tmp_path / "reference")
    for command, num_ranks in (("prepare", 1), ("precompute-ref", 2)):
        ranks.require_success([command, *config_of(tiny, **places)], log=tmp_path / "log", num_ranks=num_ranks)
    with tally("R27", "") as counts:
        command = ["train", *config_of(tiny, **places, train__max_steps=NUM_SAVES, checkpoint__save_steps=1)]
        exit_codes, output = ranks.run(command, log=tmp_path / "log", before=functools.partial(time_saves, folder=tmp_path))
        assert exit_codes == [0, 0], output[-3000:]
        seconds = {"all": [], "deepspeed": []}
        begun: dict[str, float] = {}
        for name, when, at in map(json.loads, (tmp_path / "rank0.jsonl").read_text().splitlines()):
            if when == "before":
                begun[name] = at
            else:
                seconds[name].append(at - begun[name])
        assert [len(times) for times in seconds.values()] == [NUM_SAVES, NUM_SAVES]
        whole, own = (float(np.median(times[1:])) for times in seconds.values())
        size = sum(path.stat().st_size for path in checkpoints_of(run)[-1].rglob("*") if path.is_file()) / 1e6
        counts.injected = counts.survived = NUM_SAVES
        counts.method = f"{whole:.2f} s for {size:.0f} MB where DeepSpeed's part takes {own:.2f} s: {whole - own:+.2f} s, {100 * (whole / own - 1):+.0f} % (median of {NUM_SAVES - 1} saves)"
    with capsys.disabled():
        print(f"\na save: {counts.method}")
    assert whole - own < 2, "seconds above DeepSpeed's own"
