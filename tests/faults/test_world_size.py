"""A run that goes on with another number of ranks: the same examples a step, and the same losses but for the order of sums."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.distributed import ranks
from tests.distributed.runs import TINY_ZERO3, read_metrics
from tests.distributed.tiny_run import NUM_STEPS, config_of
from tests.faults.fed import fed_by_step, go_back_to, record_fed
from tests.faults.ledger import tally
from tests.faults.state import newest_intact

pytestmark = pytest.mark.distributed

# The ranks it goes on with, and after which step: saved on 2 at the beginning.
CHAIN, SHORT_CHAIN = [(4, 1), (6, 4), (8, 2)], [(8, 1), (10, 2)]
TOLERANCE = 1e-6  # of a loss, relative, in float32
STOCK = "ZeRO-3, two groups: 1.3393555 for 1.3411922; Adam step 4 becomes 16"


def write_small_groups(folder: Path, stage: int) -> Path:
    """A ZeRO section that cuts the tiny model into many sub-groups."""
    path = folder / f"zero{stage}-small.json"
    path.write_text(json.dumps({"zero_optimization": {**TINY_ZERO3, "sub_group_size": 3000} if stage == 3 else {"stage": stage}}))
    return path


def prepare_rank(rank: int, *, folder: Path, is_stock: bool) -> None:
    """Train with two parameter groups of other learning rate and decay, and without our corrections of DeepSpeed's loading where `is_stock`."""
    import deepspeed

    from kto_ds.runtime import engine

    initialize = deepspeed.initialize

    def with_two_groups(*, model, model_parameters, **named):
        names = {parameter: name for name, parameter in model.named_parameters()}
        norms, others = ([parameter for parameter in model_parameters if ("norm" in names[parameter]) == is_norm] for is_norm in (True, False))
        assert norms and others
        groups = [{"params": others, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0, "lr": 5e-4}]
        return initialize(model=model, model_parameters=groups, **named)

    deepspeed.initialize = with_two_groups
    if is_stock:
        engine._separate_steps = lambda optimizer: None
        engine.Engine._set_hyperparameters = lambda self: None
    record_fed(rank, folder=folder)


def hyperparameters_and_steps(run: Path) -> tuple[list, set[float]]:
    """Return (decay and learning rate of every parameter group, all step counters) of the last checkpoint, over all its ranks."""
    groups, steps = [], set()
    for path in sorted((newest_intact(run) / "state").glob("*optim_states.pt")):
        saved = torch.load(path, map_location="cpu", weights_only=False)["optimizer_state_dict"]
        adam = saved.get("optimizer_state_dict") or saved["base_optimizer_state"]
        groups = [(group["weight_decay"], group["lr"]) for group in adam["param_groups"]]
        steps |= {float(state["step"]) for state in adam["state"].values()}
    return groups, steps


def worst_difference(found: Path, wanted: Path) -> float:
    pairs = list(zip(read_metrics(found), read_metrics(wanted), strict=True))
    assert [have["step"] for have, _ in pairs] == list(range(1, NUM_STEPS + 1))
    return max(abs(have["loss"] / want["loss"] - 1) for have, want in pairs)


def go_along(chain: list[tuple[int, int]], tiny: Path, folder: Path, stage: int, *, is_stock: bool) -> tuple[Path, dict[int, list[int]], str]:
    """Go on from the unbroken run along a chain; return (the run, ids of the steps, what was printed)."""
    run = folder / ("stock" if is_stock else "chain")
    shutil.copytree(folder / "unbroken", run)
    command = ["train", *config_of(tiny, output_dir=run, deepspeed__config=write_small_groups(folder, stage), checkpoint__save_total_limit=NUM_STEPS)]
    fed, printed = {}, ""
    for step, num_ranks in chain:
        go_back_to(run, step)
        exit_codes, output = ranks.run(command, log=folder / "log", num_ranks=num_ranks, before=functools.partial(prepare_rank, folder=folder, is_stock=is_stock))
        assert exit_codes == [0] * num_ranks, output[-4000:]
        assert f"resuming at step {step + 1} of {NUM_STEPS}" in output
        fed.update(fed_by_step(folder))
        printed += output
    return run, fed, printed


@pytest.mark.parametrize(("stage", "chain"), [(3, SHORT_CHAIN), *(pytest.param(stage, CHAIN, marks=pytest.mark.slow) for stage in (1, 2, 3))])
def test_other_numbers_of_ranks_and_the_first_again(tiny, tmp_path, stage, chain):
    command = ["train", *config_of(tiny, output_dir=tmp_path / "unbroken", deepspeed__config=write_small_groups(tmp_path, stage), checkpoint__save_total_limit=NUM_STEPS)]
    exit_codes, output = ranks.run(command, log=tmp_path / "log", before=functools.partial(prepare_rank, folder=tmp_path, is_stock=False))
    assert exit_codes == [0, 0], output[-4000:]
    wanted_ids, wanted_state = fed_by_step(tmp_path), hyperparameters_and_steps(tmp_path / "unbroken")
    with tally("R16", "2 ranks, on with 1, 4 and 2; two parameter groups, many sub-groups: losses, ids, hyper-parameters, steps", stock=STOCK) as counts:
        counts.injected += len(chain)
        run, ids, printed = go_along(chain, tiny, tmp_path, stage, is_stock=False)
        before = [2, *(num_ranks for _, num_ranks in chain)]
        converted = [f"converted step-{step:08d} of {had} ranks for {num_ranks}" for had, (step, num_ranks) in zip(before, chain)]
        assert [line.split(" in ")[0] for line in printed.splitlines() if line.startswith("converted")] == converted
        assert ids == {step: wanted_ids[step] for step in range(chain[0][0] + 1, NUM_STEPS + 1)}
        assert worst_difference(run, tmp_path / "unbroken") < TOLERANCE
        assert hyperparameters_and_steps(run) == wanted_state and wanted_state[1] == {float(NUM_STEPS)}
        assert not list((run / "checkpoints").glob(".*"))
        counts.survived += len(chain)
    if stage == 3:
        stock, _, _ = go_along(chain, tiny, tmp_path, stage, is_stock=True)
        found = hyperparameters_and_steps(stock)
        assert worst_difference(stock, tmp_path / "unbroken") > 10 * TOLERANCE, "DeepSpeed's own loading was mended: the corrections are not needed any more"
        assert found[0] != wanted_state[0] and max(found[1]) > NUM_STEPS, found
