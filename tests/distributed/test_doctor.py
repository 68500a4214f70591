"""kto-ds doctor on two ranks: what it says of a good job, and of one where something is wrong on one rank only. The checks themselves are in tests/unit/test_doctor.py."""

import functools
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from kto_ds import cli
from tests.distributed import ranks
from tests.distributed.runs import write_zero
from tests.distributed.tiny_run import config_of

pytestmark = pytest.mark.distributed

SECONDS = 5


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def found(output: str) -> str:
    """What the table says was found, as one line: the second column, whose cells may take several lines."""
    return " ".join(" ".join(line.split("│")[2] for line in output.splitlines() if line.startswith("│")).split())


def verdicts(output: str) -> set[str]:
    return {line.split("│")[3].strip() for line in output.splitlines() if line.startswith("│")} - {""}


def doctor(tiny, folder: Path, *options: str, **variables) -> tuple[list[int], str]:
    started = ["doctor", *config_of(tiny, output_dir=folder / "run"), *options]
    exit_codes, output = ranks.run(started, log=folder / "log", **variables)
    assert "Traceback" not in output, output[-4000:]
    return exit_codes, output


@pytest.fixture(scope="module")
def left(tiny, tmp_path_factory) -> Path:
    """A folder with what a run has left."""
    run = tmp_path_factory.mktemp("doctor") / "run"
    (run / "checkpoints" / "step-00000002").mkdir(parents=True)
    for name in ("status.json", "metrics.jsonl", "config.yaml", "checkpoints/step-00000002/file"):
        (run / name).write_text(name)
    return run


def test_a_good_job(tiny, left):
    before = tree(left)
    exit_codes, output = doctor(tiny, left.parent)
    assert exit_codes == [0, 0], output[-6000:]
    said = found(output)
    for part in ("2 ranks on 1 host", "all ranks see one output_dir", "the same files on all ranks", "the rows of step 1", "resumed to the bit"):
        assert part in said, output
    assert said.count("right on all ranks; 64 MiB") == 2, "summed, and gathered"
    assert verdicts(output) <= {"ok", "warn"}
    after = tree(left)
    assert {name: content for name, content in after.items() if name in before} == before and after.keys() - before.keys() == {".doctor.lock"}


def break_rank_1(rank: int, *, folder: Path) -> None:
    """Another interface, another version of a library, and other variables than rank 0 has."""
    if rank == 1:
        os.environ.update(GLOO_SOCKET_IFNAME="nope0", NCCL_ALGO="Ring")
        info = folder / "accelerate-0.0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: accelerate\nVersion: 0.0.1\n")
        sys.path.insert(0, str(folder))


def test_all_that_is_wrong_is_told_before_anything_can_hang(tiny, tmp_path):
    began = time.monotonic()
    exit_codes, output = doctor(tiny, tmp_path, "--quick", before=functools.partial(break_rank_1, folder=tmp_path))
    assert exit_codes == [2, 2] and time.monotonic() - began < 60, output[-6000:]
    message = output[output.index("kto-ds: error: doctor: 2 things are wrong") :]
    assert "GLOO_SOCKET_IFNAME names nope0" in message and "lo" in message and "accelerate: 0.0.1 on rank 1" in message and message.count("remedy: ") >= 2
    assert "NCCL_ALGO: not set on rank 0, 'Ring' on rank 1" in found(output) and not (tmp_path / "run").exists()


def test_a_rank_that_never_comes_is_named(tiny, tmp_path):
    began = time.monotonic()
    exit_codes, output = doctor(tiny, tmp_path, "--quick", "--timeout-seconds", str(SECONDS), WORLD_SIZE="3", LOCAL_SIZE="3")
    assert exit_codes == [2, 2] and time.monotonic() - began < 60, output[-6000:]
    assert f"1 of 3 ranks have not come within {SECONDS} s: 2" in output and "firewall" in output


def hang_in_all_gather(rank: int) -> None:
    """All may take as long as it takes, but for the gather, in which rank 1 hangs."""
    import torch.distributed as dist

    from kto_ds.runtime import probes

    ending_within = probes.ending_within
    probes.ending_within = lambda seconds, phase, **rest: ending_within(SECONDS if phase == "all-gather" else seconds, phase, **rest)
    if rank == 1:
        dist.all_gather_into_tensor = lambda *tensors: time.sleep(300)


def test_a_hang_ends_with_the_phase_and_the_remedy(tiny, tmp_path):
    exit_codes, output = doctor(tiny, tmp_path, "--quick", before=hang_in_all_gather)
    assert exit_codes == [2, 2], output[-6000:]
    assert f"1. all-gather: not done within {SECONDS} s" in output and "set GLOO_SOCKET_IFNAME to" in output, output[-6000:]
    assert "19,424 parameters" in found(output) and found(output).count("right on all ranks; 64 MiB") == 1, "what was found before is told"


def add_wrongly_elsewhere(rank: int, *, folder: Path) -> None:
    """A rank whose sums are wrong in one element, and which stands in another folder."""
    import torch.distributed as dist

    place = folder / f"host{rank}"
    place.mkdir()
    os.chdir(place)
    if rank == 1:
        all_reduce = dist.all_reduce

        def wrong(values, *arguments, **named):
            all_reduce(values, *arguments, **named)
            values[-1] += len(values) > 1000

        dist.all_reduce = wrong


def test_wrong_sums_other_folders_and_a_job_that_does_not_fit_the_ranks(tiny, tmp_path):
    config = config_of(tiny, output_dir="run")
    exit_codes, output = ranks.run(["doctor", *config, "--quick", "--batch.sequence_parallel_size", "4"], log=tmp_path / "log", before=functools.partial(add_wrongly_elsewhere, folder=tmp_path))
    assert exit_codes == [2, 2], output[-6000:]
    message = output[output.index("kto-ds: error") :]
    assert "3 things are wrong" in message and "job: batch.sequence_parallel_size: 2 ranks cannot be shared out to groups of 4 ranks" in message, message
    assert "all-reduce: rank 1 (host " in message, message
    assert f"{tmp_path}/host1/run of rank 1" in message and output.count("kto-ds: error") == 1


def forget_a_moment(rank: int) -> None:
    """A resume that brings back all but one element of rank 1."""
    from kto_ds.runtime.engine import Engine

    load = Engine.load

    def badly(self, folder, *, is_universal):
        load(self, folder, is_universal=is_universal)
        if rank == 1:
            state = next(iter(self.deepspeed.basic_optimizer.state.values()))
            state["exp_avg"].flatten()[0] += 1e-3

    Engine.load = badly


@pytest.mark.slow
def test_a_resume_that_is_not_what_was_saved(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    exit_codes, output = doctor(tiny, tmp_path, "--data.artifact", str(tmp_path / "none"), before=forget_a_moment)
    assert exit_codes == [2, 2], output[-6000:]
    assert "dry run: after the resume the state is not what was saved, on ranks 1" in output
    assert not (tmp_path / "run" / ".doctor").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage, dtype", [(0, "float32"), (1, "bfloat16"), (2, "float32"), (3, "bfloat16")])
def test_every_stage_resumes_to_the_bit(tiny, tmp_path, stage, dtype):
    options = ["--deepspeed.config", write_zero(tmp_path, stage), "--model.dtype", dtype]
    if dtype == "float32":
        options += ["--data.artifact", str(tmp_path / "none")]
    exit_codes, output = doctor(tiny, tmp_path, *options)
    said = found(output)
    assert exit_codes == [0, 0] and "resumed to the bit" in said and "made-up rows of 64 tokens" in said, output[-6000:]
    assert ("the artefacts do not serve this run" in said) == (dtype == "bfloat16"), "the reference there is one in float32"


def test_one_process_lists_what_is_wrong_with_the_config(tiny, tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    shutil.copytree(tiny / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    assert cli.run(["doctor", *config_of(tiny, output_dir=tmp_path / "run", model__path=tmp_path / "model"), "--quick"]) == 2
    printed = capfd.readouterr()
    assert "1. model: " in printed.err and "no safetensors weights" in printed.err and "was not tried" in printed.out
    assert not (tmp_path / "run").exists()
