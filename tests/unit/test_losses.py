"""losses.py against closed forms in float64, and against TRL's own loss on stored cases (tools/make_trl_loss_cases.py)."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kto_ds.losses import kto_terms, reference_point

GOLDEN = Path(__file__).parents[1] / "golden" / "trl_loss_cases.json"
CASES = json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"]


def terms_of(logratios: Tensor, desirable: Tensor, kl: float = 0.0, beta: float = 0.1, weights: tuple[float, float] = (1.0, 1.0)):
    return kto_terms(
        logratios=logratios, desirable=desirable, kl=torch.tensor(kl), beta=beta, desirable_weight=weights[0], undesirable_weight=weights[1]
    )  # fmt: skip


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


# kto_terms


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("mix", ["both", "desirable", "undesirable"])
def test_losses_and_gradients_have_the_closed_form(seed, mix):
    generator = torch.Generator().manual_seed(seed)
    num_examples = 1 + seed
    logratios = (7 * torch.randn(num_examples, generator=generator)).requires_grad_()
    desirable = torch.rand(num_examples, generator=generator) < {"both": 0.5, "desirable": 1.0, "undesirable": 0.0}[mix]
    kl, beta, weights = 0.3 * seed, 0.05 + 0.1 * seed, (1.33, 0.7)
    terms = terms_of(logratios, desirable, kl, beta, weights)
    terms.losses.sum().backward()

    for index, (logratio, label) in enumerate(zip(logratios.tolist(), desirable.tolist())):
        weight = weights[0] if label else weights[1]
        gap = beta * (logratio - kl) if label else beta * (kl - logratio)
        value = sigmoid(gap)
        # w * (1 - sigmoid(x)), and its derivative -w * beta * s * sigmoid(x) * sigmoid(-x); 1 - sigmoid rounds at 6e-8
        assert terms.losses[index].item() == pytest.approx(weight * (1 - value), rel=1e-5, abs=2e-7)
        slope = -weight * beta * (1 if label else -1) * value * (1 - value)
        assert logratios.grad[index].item() == pytest.approx(slope, rel=1e-5, abs=2e-7)
        assert terms.rewards[index].item() == pytest.approx(beta * logratio, rel=1e-6)


def test_rewards_carry_no_gradient():
    terms = terms_of(torch.randn(3, requires_grad=True), torch.tensor([True, False, True]))
    assert not terms.rewards.requires_grad and terms.losses.requires_grad


def test_desirable_examples_are_pushed_up_and_undesirable_ones_down():
    logratios = torch.zeros(5, requires_grad=True)
    desirable = torch.tensor([True, False, True, True, False])
    terms_of(logratios, desirable).losses.sum().backward()
    assert torch.equal(logratios.grad < 0, desirable)


def test_an_empty_batch_gives_a_differentiable_zero():
    parameter = torch.ones(3, requires_grad=True)
    logratios = parameter[:0] * 2
    loss = terms_of(logratios, torch.empty(0, dtype=torch.bool), kl=1.5).losses.sum()
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(parameter.grad, torch.zeros(3))


def test_without_a_reference_point_the_loss_is_apo_zero():
    # APO-zero, equation 6 of arXiv 2408.06266: 1 - sigmoid(r) for desirable ones and sigmoid(r) for undesirable ones.
    logratios, desirable = torch.linspace(-20, 20, 41), torch.arange(41) % 2 == 0
    expected = torch.where(desirable, 1 - torch.sigmoid(0.3 * logratios), torch.sigmoid(0.3 * logratios))
    torch.testing.assert_close(terms_of(logratios, desirable, beta=0.3).losses, expected, rtol=0, atol=1e-6)


def test_extreme_log_ratios_stay_finite_and_bounded_by_the_weight():
    logratios = torch.tensor([-1e6, -1e3, 1e3, 1e6], requires_grad=True)
    for label in (True, False):
        terms = terms_of(logratios, torch.full((4,), label), beta=0.9, weights=(1.5, 1.5))
        [gradient] = torch.autograd.grad(terms.losses.sum(), logratios)
        assert ((terms.losses >= 0) & (terms.losses <= 1.5)).all() and torch.isfinite(gradient).all()


def test_a_split_of_the_batch_adds_up_to_the_whole():
    logratios, desirable = 5 * torch.randn(11), torch.arange(11) % 3 == 0
    whole = terms_of(logratios, desirable, kl=0.7).losses
    parts = [terms_of(logratios[part], desirable[part], kl=0.7).losses for part in (slice(0, 1), slice(1, 1), slice(1, 8), slice(8, 11))]
    assert torch.equal(torch.cat(parts), whole)


def test_what_is_not_a_float32_vector_is_refused():
    labels = torch.ones(2, dtype=torch.bool)
    with pytest.raises(AssertionError, match="float32, found torch.bfloat16"):
        terms_of(torch.zeros(2, dtype=torch.bfloat16), labels)
    with pytest.raises(AssertionError, match=r"\[E\] and \[E\]"):
        terms_of(torch.zeros(3), labels)
    with pytest.raises(AssertionError, match="one number"):
        kto_terms(logratios=torch.zeros(2), desirable=labels, kl=torch.zeros(2), beta=0.1, desirable_weight=1.0, undesirable_weight=1.0)


# reference_point


def test_the_reference_point_is_the_mean_clamped_after_it_was_taken():
    point = reference_point(torch.tensor([5.0, -3.0, 1.0, -1.0, 0.5]))
    assert point.kl.item() == point.raw.item() == pytest.approx(0.5)
    negative = reference_point(torch.tensor([5.0, -3.0, -4.0]))
    assert negative.kl.item() == 0.0 and negative.raw.item() == pytest.approx(-2 / 3)


@pytest.mark.parametrize("num_pairs", [2, 3, 17, 1000])
def test_the_standard_error_is_that_of_the_mean(num_pairs):
    values = (50 * torch.randn(num_pairs, generator=torch.Generator().manual_seed(num_pairs))).tolist()
    mean = math.fsum(values) / num_pairs
    stderr = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (num_pairs - 1) / num_pairs)
    point = reference_point(torch.tensor(values))
    assert point.raw.item() == pytest.approx(mean, rel=1e-6, abs=1e-6) and point.stderr.item() == pytest.approx(stderr, rel=1e-6)


def test_the_error_of_one_pair_cannot_be_told():
    point = reference_point(torch.tensor([2.5]))
    assert (point.kl.item(), point.raw.item()) == (2.5, 2.5) and math.isnan(point.stderr.item())


def test_the_reference_point_is_a_constant_in_float32():
    point = reference_point(torch.ones(3, requires_grad=True))
    assert all(value.dtype == torch.float32 and value.dim() == 0 and not value.requires_grad for value in point)


def test_the_mean_of_many_large_log_ratios_does_not_drift():
    values = torch.full((1_000_003,), 0.1)
    assert reference_point(values).raw.item() == values[0].item()


# TRL


def test_there_are_two_hundred_cases_of_every_kind():
    assert len(CASES) == 200
    assert {len(case["logps"]) for case in CASES} == set(range(1, 10))
    assert {case["loss_type"] for case in CASES} == {"kto", "apo_zero_unpaired"}
    sided = [set(case["label"]) for case in CASES]
    assert min(sum(labels == kind for labels in sided) for kind in ({True}, {False}, {True, False})) >= 15
    raw = [sum(case["kl_logps"]) - sum(case["reference_kl_logps"]) for case in CASES if case["loss_type"] == "kto"]
    assert min(sum(value > 0 for value in raw), sum(value < 0 for value in raw)) >= 30  # the clamp is on in some, off in others


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_loss_and_gradient_are_those_of_trl(case):
    logps = torch.tensor(case["logps"], requires_grad=True)
    point = reference_point(torch.tensor(case["kl_logps"]) - torch.tensor(case["reference_kl_logps"]))
    kl = point.kl if case["loss_type"] == "kto" else torch.zeros(())
    terms = kto_terms(
        logratios=logps - torch.tensor(case["reference_logps"]), desirable=torch.tensor(case["label"]), kl=kl, beta=case["beta"],
        desirable_weight=case["desirable_weight"], undesirable_weight=case["undesirable_weight"],
    )  # fmt: skip
    loss = terms.losses.sum() / len(logps)
    [gradient] = torch.autograd.grad(loss, logps)
    assert loss.item() == pytest.approx(case["loss"], rel=0, abs=1e-6)
    torch.testing.assert_close(gradient, torch.tensor(case["gradient"]), rtol=0, atol=1e-6)
