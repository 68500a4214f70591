"""Make tests/golden/trl_loss_cases.json again: what TRL's KTOTrainer makes of 200 sets of sequence log-probs.

Only for re-making that file; nothing in kto_ds or its tests runs this. It needs an environment of its own:

    pip install torch==2.13.0
    pip install trl==1.16.0 transformers==5.23.0 datasets==5.2.0
    python tools/make_trl_loss_cases.py tests/golden/trl_loss_cases.json

TRL's `KTOTrainer._compute_loss` runs as it is. Only what stands around it is put there by hand: one fake model whose sequences have a
single scored token, so that the log-prob of a sequence is the number we chose.
"""

import json
import random
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
import trl
from trl.trainer.kto_trainer import KTOTrainer

NUM_CASES = 200
BETAS = (0.01, 0.05, 0.1, 0.3, 0.5, 0.9)
WEIGHTS = (1.0, 1.0, 0.5, 0.75, 1.25, 2.0)
# Log-probs are multiples of this, hence exact in float32 and short in JSON.
GRID = 256
MATCHED, MISMATCHED = 3, 4  # first token of a batch, by which the fake model knows which log-probs are asked for


class ChosenLogprobs(torch.nn.Module):
    """Answers a batch of two-token sequences with log-probs decided beforehand."""

    def __init__(self, by_first_token: dict[int, torch.Tensor]):
        super().__init__()
        self.by_first_token = by_first_token

    def forward(self, input_ids, **ignored):
        chosen = self.by_first_token[input_ids[0, 0].item()][:, None]
        return SimpleNamespace(log_probs=chosen, entropy=torch.zeros_like(chosen), mean_logits=torch.zeros_like(chosen), aux_loss=None)


def trainer_of(model: torch.nn.Module, case: dict) -> KTOTrainer:
    """Return a KTOTrainer with only what its loss reads; its own constructor wants a real model and a data set."""
    trainer = object.__new__(KTOTrainer)
    vars(trainer).update(
        model=model,
        ref_model=None,
        precompute_ref_logps=True,
        calculate_KL=case["loss_type"] == "kto",
        loss_type=case["loss_type"],
        beta=case["beta"],
        desirable_weight=case["desirable_weight"],
        undesirable_weight=case["undesirable_weight"],
        aux_loss_enabled=False,
        router_aux_loss_coef=0.0,
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=torch.atleast_1d, unwrap_model=lambda wrapped: wrapped),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    return trainer


def sequences(first_token: int, count: int, prefix: str = "") -> dict[str, torch.Tensor]:
    ids = torch.tensor([[first_token, 5]]).repeat(count, 1)
    scored = torch.tensor([[0, 1]]).repeat(count, 1)
    return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": torch.ones_like(ids), f"{prefix}completion_mask": scored}


def solve(case: dict) -> dict:
    """Return the case with TRL's loss and its gradient by the policy's log-probs of the matched pairs."""
    count = len(case["label"])
    logps = torch.tensor(case["logps"], requires_grad=True)
    batch = {**sequences(MATCHED, count), "label": torch.tensor(case["label"]), "ref_logps": torch.tensor(case["reference_logps"])}
    if case["loss_type"] == "kto":
        batch |= sequences(MISMATCHED, count, "KL_")
        batch["ref_KL_logps"] = torch.tensor(case["reference_kl_logps"])
    model = ChosenLogprobs({MATCHED: logps, MISMATCHED: torch.tensor(case["kl_logps"])}).train()
    loss = trainer_of(model, case)._compute_loss(model, batch, return_outputs=False)
    [gradient] = torch.autograd.grad(loss, logps)
    return {**case, "loss": loss.item(), "gradient": gradient.tolist()}


def draw(rng: random.Random, number: int) -> dict:
    count = 1 + number % 9
    labels = {0: lambda: True, 1: lambda: False}.get(rng.randrange(5), lambda: rng.random() < 0.5)
    near = lambda base, spread: round(min(base + rng.gauss(0, spread), -0.25) * GRID) / GRID  # noqa: E731
    reference = [near(-30, 10) for _ in range(count)]
    reference_kl = [near(-40, 10) for _ in range(count)]
    shift = rng.choice([-3, -0.5, 0.5, 3])
    return {
        "loss_type": rng.choice(["kto", "kto", "apo_zero_unpaired"]),
        "beta": rng.choice(BETAS),
        "desirable_weight": rng.choice(WEIGHTS),
        "undesirable_weight": rng.choice(WEIGHTS),
        "label": [labels() for _ in range(count)],
        "logps": [near(value, 4) for value in reference],
        "reference_logps": reference,
        "kl_logps": [near(value + shift, 2) for value in reference_kl],
        "reference_kl_logps": reference_kl,
    }


def main(path: Path) -> None:
    rng = random.Random(0)
    cases = [solve(draw(rng, number)) for number in range(NUM_CASES)]
    versions = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    lines = ",\n".join(json.dumps(case) for case in cases)
    path.write_text(f'{{"made_by": "tools/make_trl_loss_cases.py", "versions": {json.dumps(versions)}, "cases": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
