"""One training step of every family on two ranks under ZeRO-3, which route their tokens to different experts, against transformers on one."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kto_ds.config import LossConfig, ModelConfig, OptimConfig
from kto_ds.data.batch_plan import plan_batches
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.sharding import Sharding
from kto_ds.model.flops import model_shape
from kto_ds.model.load import load_policy
from kto_ds.model.scoring import choose_serving
from kto_ds.model.support import num_experts, read_model_config
from kto_ds.report.throughput import HOST_CLOCK, StepTimer
from kto_ds.runtime.collectives import World, gather_objects, start, stop
from kto_ds.runtime.deepspeed_config import complete_deepspeed_config
from kto_ds.runtime.engine import Engine
from kto_ds.stages.objective import train_step
from kto_ds.stages.step_work import StepPlanner
from tests.distributed.ranks import Ranks
from tests.distributed.runs import TINY_ZERO3
from tests.unit.test_families import FAMILIES, plain_model, save_model
from tests.unit.test_policy import random_split

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

COEF = 0.3  # of the load-balancing loss, large enough to show in the norm of the gradient
LOSS = LossConfig(beta=0.1, desirable_weight=1.3, undesirable_weight=0.7)
MAX_TOKENS = 30  # of a micro-batch: several a rank


def split_of_the_step() -> TokenizedSplit:
    split = random_split(1)
    return dataclasses.replace(split, desirable=np.arange(split.num_examples) % 3 == 0)


# on the ranks


def train_all(arguments: list[str]) -> None:
    folder, world = Path(arguments[0]), start(timeout_seconds=300)
    found = {name: one_step(folder / name, world) for name in FAMILIES}
    if world.is_main:
        (folder / "found.json").write_text(json.dumps(found))
    stop()


def one_step(folder: Path, world: World) -> dict:
    """Take a step as kto-ds train does, and return what it came to."""
    model, optim = ModelConfig(path=str(folder), dtype="float32"), OptimConfig(max_grad_norm=0.0)
    config = read_model_config(model)
    serving = choose_serving(model, config, world.device)
    deepspeed_config = complete_deepspeed_config({"zero_optimization": TINY_ZERO3}, optim=optim, dtype="float32", on_cuda=False)
    policy = load_policy(model, config, layout=serving.layout, backend=serving.backend, gradient_checkpointing=True, partition_for=deepspeed_config)
    shape = model_shape(policy, config)
    engine = Engine(policy, deepspeed_config, optim, num_steps=1)
    split = split_of_the_step()
    plan = plan_batches(split.kl_group_of, global_batch_size=split.num_examples, num_train_epochs=1, max_steps=1, shuffle=False, seed=0)
    sharding = Sharding(serving.layout, MAX_TOKENS, world.rank, world.num_ranks, world.device)
    work = StepPlanner(split, plan, 0, 1.0, sharding, sharding, shape, recomputed_layers=1.0, balances_experts=True).work_of(1)
    assert len(work.examples) == split.num_examples and len(work.policy_batches) > 1
    engine.warm_up(sharding.batch([], split), balances_experts=bool(num_experts(config)))

    experts_hit = []
    if num_experts(config):
        with torch.no_grad():
            experts_hit = [engine(batch, with_load=True)[1].assignments.gt(0).tolist() for batch in work.policy_batches]
    outcome = train_step(
        engine, work, split, np.load(folder / "reference.npy"), loss=LOSS, num_ranks=world.num_ranks, timer=StepTimer(HOST_CLOCK), limit=np.inf,
        wants_to_stop=lambda: False, aux_coef=COEF if num_experts(config) else None,
    )  # fmt: skip
    theirs = gather_objects(experts_hit)
    return {
        "problem": outcome.problem, "loss": outcome.loss, "grad_norm": outcome.grad_norm, "kl": outcome.result.kl,
        "aux_loss": outcome.result.router and outcome.result.router.aux_loss, "routed_alike": theirs[0] == theirs[1],
    }  # fmt: skip


# alone, naively


def forward(plain: PreTrainedModel, split: TokenizedSplit, pair: int) -> tuple[Tensor, list[Tensor]]:
    """Return the log-prob [] of one pair and the routers' logits of its tokens, a [T, N] for each layer."""
    prompt, completion = (torch.tensor(np.array(part), dtype=torch.int64) for part in (split.prompt(split.pair_prompts[pair]), split.completion(pair)))
    routes = {"output_router_logits": True} if num_experts(plain.config) else {}
    outputs = plain(input_ids=torch.cat([prompt, completion])[None], use_cache=False, **routes)
    logps = torch.log_softmax(outputs.logits[0, len(prompt) - 1 : -1], dim=-1)
    return logps.gather(1, completion[:, None]).sum(), list(outputs.router_logits) if routes else []


def shares_and_probabilities(plain: PreTrainedModel, routed: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """Return how often a token goes to each expert, and the mean probabilities, [N] both, over all layers and tokens alike."""
    probabilities = torch.cat([logits for of_pair in routed for logits in of_pair]).softmax(dim=-1)
    chosen = probabilities.topk(plain.config.num_experts_per_tok, dim=-1).indices
    return torch.zeros_like(probabilities).scatter(1, chosen, 1.0).mean(dim=0), probabilities.mean(dim=0)


def naive_step(plain: PreTrainedModel, split: TokenizedSplit, folder: Path) -> dict:
    """Choose reference log-probs, and return what a step of all examples should come to."""
    size = split.num_examples
    pairs = [forward(plain, split, pair) for pair in range(2 * size)]
    logps = torch.stack([logp for logp, _ in pairs])
    noise = torch.randn(2 * size, generator=torch.Generator().manual_seed(2)).double() * 4
    reference = (logps.detach() - 2 + noise).float()
    np.save(folder / "reference.npy", reference.numpy())

    ratios = logps - reference.double()
    kl = ratios[size:].mean().detach().clamp(min=0)
    desirable = torch.from_numpy(split.desirable)
    signs, weights = torch.where(desirable, 1.0, -1.0), torch.where(desirable, LOSS.desirable_weight, LOSS.undesirable_weight)
    loss = (weights * (1 - torch.sigmoid(signs * LOSS.beta * (ratios[:size] - kl)))).mean()
    objective, aux_loss = loss, None
    if num_experts(plain.config):
        routed = [logits for _, logits in pairs]
        shares, probabilities = shares_and_probabilities(plain, routed[:size])
        estimated, _ = shares_and_probabilities(plain, routed[size:])  # from mismatched pairs, as phase A does
        objective = loss + COEF * len(shares) * (estimated * probabilities).sum()
        aux_loss = float((len(shares) * (shares * probabilities).sum()).detach())
    objective.backward()
    norm = torch.stack([parameter.grad.norm() for parameter in plain.parameters()]).norm()
    return {"loss": float(loss.detach()), "grad_norm": float(norm), "kl": float(kl), "aux_loss": aux_loss}


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> tuple[dict, dict]:
    """What every family's step should come to, and what it did come to."""
    folder = tmp_path_factory.mktemp("families")
    split = split_of_the_step()
    wanted = {}
    for name in FAMILIES:
        save_model(name, folder / name)
        wanted[name] = naive_step(plain_model(folder / name), split, folder / name)
    with Ranks([str(folder)], log=folder / "log", program=train_all) as ranks:
        assert ranks.wait(540) == [0, 0], ranks.output()[-6000:]
    return wanted, json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_on_two_ranks_is_that_of_transformers_on_one(steps, name):
    wanted, found = (results[name] for results in steps)
    assert found["problem"] is None and wanted["kl"] > 0.5
    for value in ("loss", "kl", "grad_norm"):
        assert found[value] == pytest.approx(wanted[value], rel=2e-4), value
    assert (found["aux_loss"] is None) == (wanted["aux_loss"] is None)
    if wanted["aux_loss"]:
        assert found["aux_loss"] == pytest.approx(wanted["aux_loss"], rel=1e-5)
        assert not found["routed_alike"], "the ranks were to route to different experts"
