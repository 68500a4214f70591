"""Weights of the labels, by hand: r = lambda_D n_D / (lambda_U n_U) shall lie within [1, 4/3]."""

import pytest

from kto_ds.config import LossConfig
from kto_ds.data.balance import LARGEST_RATIO, recommended_weights, weight_ratio
from kto_ds.stages.identity import weights_of_config


@pytest.mark.parametrize(
    ("num_desirable", "num_undesirable", "weights", "expected"),
    [
        # both auto: balanced enough as they are
        (100, 100, ("auto", "auto"), (1, 1)),
        (400, 300, ("auto", "auto"), (1, 1)),  # r = 4/3 exactly
        (120, 100, ("auto", "auto"), (1, 1)),
        # both auto: the rarer side is raised, to r = 1 from below and to r = 4/3 from above
        (100, 300, ("auto", "auto"), (3, 1)),
        (1, 1000, ("auto", "auto"), (1000, 1)),
        (300, 100, ("auto", "auto"), (1, 2.25)),  # 300 / (2.25 * 100) = 4/3
        (800, 300, ("auto", "auto"), (1, 2)),
        # one auto, up or down as the other one asks for
        (100, 300, ("auto", 1.0), (3, 1)),
        (100, 100, ("auto", 2.0), (2, 2)),
        (300, 100, ("auto", 1.0), (4 / 9, 1)),  # 4/9 * 300 / 100 = 4/3
        (100, 100, ("auto", 0.5), (2 / 3, 0.5)),
        (100, 300, (1.0, "auto"), (1, 1 / 3)),
        (300, 100, (1.0, "auto"), (1, 2.25)),
        (100, 100, (3.0, "auto"), (3, 2.25)),
        (100, 90, (1.0, "auto"), (1, 1)),
        # numbers stay, however unbalanced
        (1, 1000, (1.0, 1.0), (1, 1)),
        (1000, 1, (0.0, 5.0), (0, 5)),
        # nothing to balance
        (0, 50, ("auto", "auto"), (1, 1)),
        (50, 0, ("auto", "auto"), (1, 1)),
        (50, 0, (2.0, "auto"), (2, 1)),
        (50, 50, (0.0, "auto"), (0, 1)),
        (50, 50, ("auto", 0.0), (1, 0)),
    ],
)
def test_recommended_weights(num_desirable, num_undesirable, weights, expected):
    assert recommended_weights(num_desirable, num_undesirable, *weights) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("num_desirable", [1, 7, 99, 100, 133, 134, 5000])
@pytest.mark.parametrize("weights", [("auto", "auto"), ("auto", 0.3), (1.7, "auto")])
def test_an_automatic_weight_brings_the_ratio_into_the_interval(num_desirable, weights):
    assert 1 - 1e-12 <= weight_ratio(num_desirable, 100, *recommended_weights(num_desirable, 100, *weights)) <= LARGEST_RATIO + 1e-12


@pytest.mark.parametrize(("arguments", "ratio"), [((90, 10, 1, 1), 9), ((10, 90, 3, 0.5), 2 / 3), ((0, 5, 1, 1), 0), ((5, 0, 1, 1), float("inf")), ((5, 5, 1, 0), float("inf"))])
def test_weight_ratio(arguments, ratio):
    assert weight_ratio(*arguments) == pytest.approx(ratio)


@pytest.mark.parametrize(("desirable_weight", "undesirable_weight", "expected"), [("auto", "auto", (4, 0.5)), ("auto", 2.0, (4, 2)), (3.0, "auto", (3, 0.5)), (3.0, 2.0, (3, 2))])
def test_an_export_takes_automatic_weights_and_no_others_from_the_checkpoint(desirable_weight, undesirable_weight, expected):
    loss = LossConfig(beta=0.3, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    found = weights_of_config(loss, {"loss": {"desirable_weight": 4.0, "undesirable_weight": 0.5}})
    assert (found.desirable_weight, found.undesirable_weight, found.beta) == (*expected, 0.3)
