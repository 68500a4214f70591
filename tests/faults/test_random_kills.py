"""kill -9 of all ranks at random moments, again and again: nothing that was done is lost, and the end is the one of a run that nobody killed."""

import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kto_ds import cli
from kto_ds.artifacts import incomplete_path
from kto_ds.data.keys import find
from kto_ds.data.reference import read_shards
from tests.distributed import ranks
from tests.distributed.runs import number_tokenizer, write_config, write_rows, write_zero
from tests.distributed.tiny_run import SAVE_STEPS, config_of
from tests.faults.ledger import tally
from tests.faults.state import final_state, newest_intact, step_of, steps_begun

pytestmark = pytest.mark.distributed

SEED = 20261121


def exit_codes_after(started: ranks.Ranks, seconds: float | None) -> list[int]:
    """Kill the ranks after some seconds, if any are given, and return their exit codes; a kill may meet a rank that has just ended."""
    if seconds is None:
        return started.wait()
    deadline = time.monotonic() + seconds
    while started.is_running() and time.monotonic() < deadline:
        time.sleep(0.005)
    started.kill(signal.SIGKILL)
    return started.wait()


def written_at(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


@pytest.mark.parametrize("num_kills", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_train(tiny, unbroken, tmp_path, capsys, num_kills):
    """Three of ten moments are spread evenly over the whole time of an unbroken run, seven over that of its steps. A run that is done is compared, and the next one begins."""
    chance = random.Random(f"{SEED} train {num_kills}")
    run, command = tmp_path / "run", ["train", *config_of(tiny, output_dir=tmp_path / "run")]
    killed, open_kills, half_saves, worst = 0, 0, 0, 0
    with tally("R3", f"kill -9 of both ranks at random moments, seed {SEED}, until the run is done; then the next run") as counts:
        while killed < num_kills or open_kills:
            before = written_at(run / "metrics.jsonl")
            with ranks.Ranks(command, log=tmp_path / "log") as started:
                seconds = unbroken.seconds
                if chance.random() < 0.7:
                    seconds = unbroken.step_seconds
                    while started.is_running() and written_at(run / "metrics.jsonl") == before:  # the record is opened right before the first step
                        time.sleep(0.005)
                exit_codes = exit_codes_after(started, chance.uniform(0, seconds) if killed < num_kills else None)
                if set(exit_codes) == {0}:
                    assert final_state(run) == unbroken.state
                    counts.survived, open_kills = counts.survived + open_kills, 0
                    shutil.rmtree(run)
                    continue
                assert set(exit_codes) <= {0, -9}, started.output()[-3000:]
            killed, open_kills, counts.injected = killed + 1, open_kills + 1, counts.injected + 1
            newest = newest_intact(run)
            lost = steps_begun(run) - (step_of(newest) if newest else 0)
            assert lost <= SAVE_STEPS, f"{lost} steps are lost after kill {killed}"
            worst = max(worst, lost)
            half_saves += bool(list((run / "checkpoints").glob(".tmp-step-*")))
    with capsys.disabled():
        print(f"\ntrain: {killed} kills (seed {SEED}), {half_saves} of them within a save, at most {worst} steps lost")
    assert half_saves or num_kills < 50, "no kill hit a save"


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A prepared run whose scoring takes some seconds, in many shards; and the artefact that one rank makes in peace."""
    folder = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    shape = dict(vocab_size=61, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
    LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=1, eos_token_id=2, pad_token_id=0)).save_pretrained(folder / "model")
    number_tokenizer(61).save_pretrained(folder / "model")
    generator = np.random.default_rng(0)
    draw = lambda low, high: "".join(f" t{token}" for token in generator.integers(3, 61, generator.integers(low, high)))  # noqa: E731
    write_rows(folder / "rows.jsonl", [{"prompt": draw(20, 60), "completion": draw(40, 200), "label": number % 2 == 0} for number in range(400)])
    write_config(
        folder / "run.yaml",
        output_dir=str(folder / "run"),
        model={"path": str(folder / "model"), "dtype": "float32"},
        data={"train": [{"path": str(folder / "rows.jsonl")}], "max_length": 512},
        reference={"max_tokens_per_microbatch": 512, "artifact": str(folder / "whole")},
        deepspeed={"config": write_zero(folder, 3)},
    )
    assert cli.run(["prepare", *config_of(folder)]) == 0
    ranks.require_success(["precompute-ref", *config_of(folder)], log=folder / "log", num_ranks=1)
    return folder


def shards_of(staging: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in staging.glob("scored-*")} if staging.is_dir() else {}


def require_same(artefact: Path, whole: Path, placement: str) -> None:
    """The shards are those of one rank that was not interrupted; of a partitioned model, which may round otherwise, the values are."""
    one, two = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (artefact, whole))
    if placement == "replica":
        assert one == two
    rows, others = (read_shards(folder.glob("*.safetensors")) for folder in (artefact, whole))
    np.testing.assert_allclose(rows.logps[find(rows.keys, others.keys)], others.logps, rtol=1e-6)


@pytest.mark.parametrize(("placement", "num_kills"), [("replica", 3), *(pytest.param(way, 25, marks=pytest.mark.slow) for way in ("replica", "sharded"))])
def test_precompute_ref(work, tmp_path, capsys, num_kills, placement):
    """One rank or two by turns. What was committed stays, to the byte and to the time of its writing."""
    chance = random.Random(f"{SEED} {placement} {num_kills}")
    artefact = tmp_path / "reference"
    command = ["precompute-ref", *config_of(work, reference__placement=placement, reference__artifact=artefact)]
    killed, open_kills, in_scoring, starts = 0, 0, 0, 0
    with tally("R4", f"kill -9 of all ranks of precompute-ref at random moments, seed {SEED}, {placement}") as counts:
        while killed < num_kills or open_kills:
            starts += 1
            before = shards_of(incomplete_path(artefact))
            with ranks.Ranks(command, log=tmp_path / "log", num_ranks=1 + starts % 2) as started:
                if killed < num_kills and chance.random() < 0.7:  # most kills fall into the scoring, the others anywhere
                    while started.is_running() and len(shards_of(incomplete_path(artefact))) <= len(before):
                        time.sleep(0.005)
                exit_codes = exit_codes_after(started, chance.uniform(0, 2) if killed < num_kills else None)
                if set(exit_codes) == {0}:
                    require_same(artefact, work / "whole", placement)
                    counts.survived, open_kills = counts.survived + open_kills, 0
                    shutil.rmtree(artefact)
                    continue
                assert set(exit_codes) <= {0, -9}, started.output()[-3000:]
            killed, open_kills, counts.injected = killed + 1, open_kills + 1, counts.injected + 1
            after = shards_of(artefact if artefact.exists() else incomplete_path(artefact))
            in_scoring += len(after) > len(before)
            assert before.items() <= after.items(), "a committed shard was lost or written again"
    with capsys.disabled():
        print(f"\n{placement}: {killed} kills (seed {SEED}), {in_scoring} of them while ranks were scoring")
    assert in_scoring > num_kills // 4
