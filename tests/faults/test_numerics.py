"""NaN in one row, in one rank's loss or in one rank's gradient, and a loss spike: the run stops before the update, or goes on as if the step had never been."""

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.utils._pytree import tree_leaves

from kto_ds.runtime import engine as engines
from kto_ds.stages import objective, step_work, train
from tests.distributed import ranks
from tests.distributed.runs import read_metrics, write_zero
from tests.distributed.tiny_run import config_of, status_of, without_timings
from tests.faults.injected import messages
from tests.faults.ledger import record
from tests.faults.state import checkpoints_of

pytestmark = pytest.mark.distributed

ROW, LOSS, GRADIENT, SPIKE = "log-prob", "loss", "gradient", "spike"
FAULTS = {3: ROW, 5: LOSS, 7: GRADIENT}  # by step; the steps between them are sound


class _BrokenBackward(torch.autograd.Function):
    @staticmethod
    def forward(context, values):
        return values.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * float("nan")


def poison(rank: int, *, faults: dict[int, str], notes: Path, is_left_out: bool = False) -> None:
    """Put faults by step into this rank, and note every step's digest of weights and moments before and after; or leave those steps out of the plan."""
    now = {"step": 0, "pair": -1}
    note = (notes / f"rank{rank}.jsonl").open("a", buffering=1)
    whole_step, score, terms_of, ahead = train.train_step, engines.Engine.__call__, objective.kto_terms, step_work.StepPlanner.ahead

    def noted_step(engine, work, *arguments, **named):
        now.update(step=work.step, pair=int(work.examples[0]))
        before = digest_of_state(engine)
        outcome = whole_step(engine, work, *arguments, **named)
        note.write(json.dumps({"step": work.step, "before": before, "after": digest_of_state(engine)}) + "\n")
        now.update(step=0)
        return outcome

    def injected(kind: str) -> bool:
        if faults.get(now["step"]) != kind:
            return False
        note.write(json.dumps({"injected": kind, "step": now["step"]}) + "\n")
        return True

    def poisoned_score(self, batch):
        logps = score(self, batch)
        at = torch.from_numpy(batch.pair_ids == now["pair"])
        return torch.where(at, float("nan"), logps) if at.any() and injected(ROW) else logps

    def poisoned_terms(*, logratios, desirable, **named):
        if logratios.requires_grad and injected(SPIKE):
            logratios = logratios + torch.where(desirable, -30.0, 30.0)
        terms = terms_of(logratios=logratios, desirable=desirable, **named)
        if rank == 1 and logratios.requires_grad and injected(LOSS):
            return terms._replace(losses=terms.losses * float("nan"))
        if rank == 1 and logratios.requires_grad and injected(GRADIENT):
            return terms._replace(losses=_BrokenBackward.apply(terms.losses))
        return terms

    def shortened(self, done: int) -> Iterator:
        return (work for work in ahead(self, done) if work.step not in faults)

    train.train_step, train.plot_metrics = noted_step, lambda *paths: None
    if is_left_out:
        step_work.StepPlanner.ahead = shortened
    else:
        engines.Engine.__call__, objective.kto_terms = poisoned_score, poisoned_terms


def digest_of_state(engine) -> str:
    """SHA-256 over all that an update changes: weights, master weights, moments, Adam's steps, and the learning rate."""
    digest = hashlib.sha256(repr(engine.learning_rate).encode())
    state = [engine.deepspeed.optimizer.state_dict(), list(engine.deepspeed.module.parameters())]
    for tensor in tree_leaves(state):
        if isinstance(tensor, torch.Tensor):
            digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Done(NamedTuple):
    """A run with faults, ended."""

    exit_codes: list[int]
    output: str
    run: Path
    steps: dict[int, list[dict]]  # by step, what each rank has noted
    injected: list[tuple[int, str]]  # ascending
    numerics: list[dict]


def train_with(tiny: Path, run: Path, faults: dict[int, str], *, is_left_out: bool = False, **overrides) -> Done:
    run.mkdir()
    before = partial(poison, faults=faults, notes=run, is_left_out=is_left_out)
    command = ["train", *config_of(tiny, output_dir=run, eval__eval_steps=100, **overrides)]
    exit_codes, output = ranks.run(command, log=run / "log", before=before)
    noted = [json.loads(line) for rank in range(2) for line in (run / f"rank{rank}.jsonl").read_text().splitlines()]
    steps: dict[int, list[dict]] = {}
    for entry in noted:
        if "before" in entry:
            steps.setdefault(entry["step"], []).append(entry)
    injected = sorted({(entry["step"], entry["injected"]) for entry in noted if "injected" in entry})
    numerics = [json.loads(line) for line in (run / "numerics.jsonl").read_text().splitlines()] if (run / "numerics.jsonl").exists() else []
    return Done(exit_codes, output, run, steps, injected, numerics)


def rows_of(entry: dict) -> list[str]:
    return [f"rows.jsonl:{example + 1}" for example in entry["examples"]]


def of_dtype(tiny: Path, dtype: str) -> dict:
    """Overrides for a dtype; the reference has to be of the same one."""
    if dtype == "bfloat16" and not (tiny / "reference_bf16").exists():
        ranks.require_success(["precompute-ref", *config_of(tiny, model__dtype=dtype, reference__artifact=tiny / "reference_bf16")], log=tiny / "log", num_ranks=1)
    return {"model__dtype": dtype, "reference__artifact": tiny / "reference_bf16"} if dtype == "bfloat16" else {}


CASES = [(stage, dtype) for dtype in ("float32", "bfloat16") for stage in range(4)]


@pytest.mark.parametrize(("stage", "dtype"), [case if case == (3, "float32") else pytest.param(*case, marks=pytest.mark.slow) for case in CASES])
def test_a_skipped_step_leaves_no_trace(tiny, tmp_path, stage, dtype):
    """Three faults in one run; its sound steps are those of a run that never saw the others, bit for bit, on both ranks."""
    began = time.monotonic()
    overrides = {"deepspeed__config": write_zero(tiny, stage), "train__on_nonfinite": "skip", **of_dtype(tiny, dtype)}
    done = train_with(tiny, tmp_path / "skipped", FAULTS, **overrides)
    assert done.exit_codes == [0, 0], done.output[-3000:]
    assert done.injected == sorted(FAULTS.items())
    assert [(entry["step"], entry["what"], entry["action"]) for entry in done.numerics] == [(step, what, "skip") for step, what in FAULTS.items()]
    for entry in done.numerics:
        assert len(entry["examples"]) == 8 and [name.rpartition("/")[2] for name in entry["rows"]] == rows_of(entry)
    assert done.numerics[0]["bad_rows"] == done.numerics[0]["rows"][:1], "the poisoned row, and no other"

    for step, noted in done.steps.items():
        assert len(noted) == 2 and all((entry["before"] == entry["after"]) is (step in FAULTS) for entry in noted), f"step {step}"
    wanted = train_with(tiny, tmp_path / "left_out", FAULTS, is_left_out=True, **overrides)
    assert wanted.exit_codes == [0, 0] and not wanted.injected
    assert {step: noted for step, noted in done.steps.items() if step not in FAULTS} == wanted.steps
    assert len(wanted.steps) == 12 - len(FAULTS)

    found = without_timings(read_metrics(done.run))
    assert [entry for entry in found if entry["step"] not in FAULTS] == without_timings(read_metrics(wanted.run))
    assert [entry["step"] for entry in found] == list(range(1, 13))
    for entry in found:
        assert entry.get("skipped_steps") == (1 if entry["step"] in FAULTS else None) and ("loss" in entry) is (entry["step"] not in FAULTS)
    assert status_of(done.run)["state"] == "completed"
    record("R15", f"skip: NaN in a row, a rank's loss, a rank's gradient; ZeRO {stage}, {dtype}", injected=3, survived=len(done.numerics), seconds=time.monotonic() - began)


STOPS = [(what, stage, dtype) for what in (ROW, LOSS, GRADIENT) for stage, dtype in CASES]
STOPS_TRIED_ALWAYS = ((GRADIENT, 0, "float32"),)


@pytest.mark.parametrize(("what", "stage", "dtype"), [case if case in STOPS_TRIED_ALWAYS else pytest.param(*case, marks=pytest.mark.slow) for case in STOPS])
def test_the_run_stops_before_the_update(tiny, tmp_path, what, stage, dtype):
    began = time.monotonic()
    done = train_with(tiny, tmp_path / "run", {3: what}, deepspeed__config=write_zero(tiny, stage), **of_dtype(tiny, dtype))
    assert done.exit_codes == [3, 3] and done.injected == [(3, what)]
    require_stop(done, at=3, what=what)
    assert [path.name for path in checkpoints_of(done.run)] == ["step-00000002"]
    record("R15", f"stop: {what}; ZeRO {stage}, {dtype}", injected=1, survived=len(done.numerics), seconds=time.monotonic() - began)


def start_a_wandb_that_never_ends(rank: int, *, folder: Path, faults: dict[int, str], notes: Path) -> None:
    poison(rank, faults=faults, notes=notes)
    program = folder / f"python{rank}"
    program.write_text("#!/bin/bash\nexec sleep 30\n")
    program.chmod(0o755)
    sys.executable = str(program)


@pytest.mark.slow
def test_rank_0_tells_it_without_waiting_for_wandb(tiny, tmp_path):
    before = partial(start_a_wandb_that_never_ends, folder=tmp_path, faults={3: LOSS}, notes=tmp_path)
    exit_codes, output = ranks.run(["train", *config_of(tiny, output_dir=tmp_path / "run", report__wandb__mode="offline")], log=tmp_path / "log", before=before)
    assert exit_codes == [3, 3], output[-3000:]
    [message] = messages(output)
    assert message.startswith("kto-ds: error: step 3: the loss is nan") and "[rank " not in output, output[-3000:]
    assert "wandb has not taken everything yet and is left to itself" in output
    status = status_of(tmp_path / "run")
    assert (status["state"], status["exit_code"]) == ("failed", 3) and status["reason"].startswith("NumericsError: step 3: ")


def require_stop(done: Done, *, at: int, what: str) -> None:
    """One message, the rows on disk, and neither weight nor moment changed by the last step, on both ranks."""
    errors = [line for line in done.output.splitlines() if "kto-ds: error" in line]
    assert f"step {at}: " in errors[0] and "Traceback" not in done.output, done.output[-3000:]
    assert len({line.partition("] ")[2] or line for line in errors}) == 1, errors
    assert max(done.steps) == at and all(entry["before"] == entry["after"] for entry in done.steps[at])
    last = done.numerics[-1]
    assert (last["step"], last["what"], last["action"]) == (at, what, "stop") and len(last["rows"]) == 8
    status = status_of(done.run)
    assert (status["state"], status["exit_code"]) == ("failed", 3) and f"step {at}: " in status["reason"]


@pytest.mark.slow
def test_too_many_skips_in_a_row_stop_the_run(tiny, tmp_path):
    faults = {2: ROW, 4: ROW, 5: LOSS, 6: ROW}
    done = train_with(tiny, tmp_path / "run", faults, train__on_nonfinite="skip", train__max_skipped_steps=2)
    assert done.exit_codes == [3, 3] and done.injected == sorted(faults.items())
    assert [(entry["step"], entry["action"]) for entry in done.numerics] == [(2, "skip"), (4, "skip"), (5, "skip"), (6, "stop")]
    require_stop(done, at=6, what=ROW)
    assert "3 steps in a row, train.max_skipped_steps allows 2" in done.output


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_a_loss_spike_is_a_bad_step_where_that_is_asked_for(tiny, tmp_path, policy):
    guarded = {"train__num_train_epochs": 6, "train__on_nonfinite": policy, "train__loss_spike_sigmas": 6}
    done = train_with(tiny, tmp_path / "run", {20: SPIKE}, **guarded)
    assert done.injected == [(20, SPIKE)]
    assert [(entry["step"], entry["what"], entry["action"]) for entry in done.numerics] == [(20, SPIKE, policy)]
    assert all(entry["before"] == entry["after"] for entry in done.steps[20])
    if policy == "stop":
        assert done.exit_codes == [3, 3]
        require_stop(done, at=20, what=SPIKE)
    else:
        assert done.exit_codes == [0, 0] and max(done.steps) == 24
    record("R15", f"loss spike, {policy}", injected=1, survived=len(done.numerics), seconds=0.0)


@pytest.mark.slow
def test_without_a_guard_a_spike_is_trained_on(tiny, tmp_path):
    done = train_with(tiny, tmp_path / "run", {9: SPIKE})
    assert done.exit_codes == [0, 0] and done.injected == [(9, SPIKE)] and not done.numerics
    assert all(entry["before"] != entry["after"] for entry in done.steps[9])
