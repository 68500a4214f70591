"""Histograms of log-ratios and rewards by length, against loops over single examples."""

import json
import math

import numpy as np
import pytest

from kto_ds.report.distributions import LENGTH_BUCKETS, LOGRATIO_EDGES, distribution_metrics, length_correlation, logratio_counts, rewards_by_length
from kto_ds.report.metrics import StepResult, reward_auc
from kto_ds.report.metrics_file import MetricsFile, read_records
from kto_ds.report.wandb_follow import named


def a_step(num_examples: int, seed: int, *, longest: int = 20_000) -> StepResult:
    generator = np.random.default_rng(seed)
    logratios = (generator.standard_normal(num_examples) * 10 ** generator.uniform(-3, 3, num_examples)).astype(np.float32)
    lengths = np.exp(generator.uniform(0, math.log(longest), num_examples)).astype(np.int64)
    nothing = np.zeros(num_examples)
    return StepResult(nothing, np.float32(0.1) * logratios, nothing, generator.random(num_examples) < 0.4, logratios, lengths, kl=0.0, kl_raw=0.0, kl_stderr=0.0)


def naive_bin(value: float) -> int:
    return sum(value >= edge for edge in LOGRATIO_EDGES)


def naive_buckets(rewards, lengths) -> list[list[float]]:
    found = {}
    for reward, length in zip(rewards.tolist(), lengths.tolist()):
        found.setdefault(max(least for least in LENGTH_BUCKETS if least <= length), []).append(reward)
    return [[least, len(found[least]), sum(found[least]) / len(found[least])] for least in sorted(found)]


def naive_correlation(xs: list[float], ys: list[float]) -> float:
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys)) / math.sqrt(sum((a - x) ** 2 for a in xs) * sum((b - y) ** 2 for b in ys))


def test_bins_are_symmetric_and_a_value_on_an_edge_belongs_above_it():
    assert LOGRATIO_EDGES == tuple(-edge for edge in reversed(LOGRATIO_EDGES)) and list(LOGRATIO_EDGES) == sorted(set(LOGRATIO_EDGES))
    assert {0.25, 0.5, 1.0, 2.0, 64.0, 256.0, -256.0} <= set(LOGRATIO_EDGES)
    middle = len(LOGRATIO_EDGES) // 2  # the edge at 0
    for value, expected in ((-1e9, 0), (-256.0, 1), (-1e-6, middle), (0.0, middle + 1), (0.25, middle + 2), (1e9, len(LOGRATIO_EDGES))):
        assert np.flatnonzero(logratio_counts(np.array([value]))).tolist() == [expected], value


@pytest.mark.parametrize("num_examples", [1, 7, 501])
def test_all_is_as_loops_count_it(num_examples):
    step = a_step(num_examples, seed=num_examples)
    metrics = distribution_metrics([step])
    for label, chosen in (("chosen", step.desirable), ("rejected", ~step.desirable)):
        assert (f"logratios/{label}" in metrics) == chosen.any()
        if not chosen.any():
            continue
        bins = [naive_bin(value) for value in step.logratios[chosen].tolist()]
        assert metrics[f"logratios/{label}"] == [bins.count(number) for number in range(len(LOGRATIO_EDGES) + 1)]
        for found, expected in zip(metrics[f"rewards_by_length/{label}"], naive_buckets(step.rewards[chosen], step.lengths[chosen]), strict=True):
            assert found[:2] == expected[:2] and found[2] == pytest.approx(expected[2], rel=1e-4)
        if chosen.sum() > 2:
            expected = naive_correlation(step.rewards[chosen].tolist(), step.lengths[chosen].tolist())
            assert metrics[f"length_correlation/{label}"] == pytest.approx(expected, abs=1e-6)
    assert metrics.get("rewards/auc") == (reward_auc(step.rewards, step.desirable) if num_examples > 1 else None)


def test_counts_of_two_steps_add_up_to_those_of_both():
    first, second = a_step(60, seed=1), a_step(45, seed=2)
    one, other, both = distribution_metrics([first]), distribution_metrics([second]), distribution_metrics([first, second])
    for label in ("chosen", "rejected"):
        assert np.add(one[f"logratios/{label}"], other[f"logratios/{label}"]).tolist() == both[f"logratios/{label}"]
        sums = {}
        for least, count, mean in one[f"rewards_by_length/{label}"] + other[f"rewards_by_length/{label}"]:
            sums.setdefault(least, np.zeros(2))
            sums[least] += (count, count * mean)
        for least, count, mean in both[f"rewards_by_length/{label}"]:
            assert sums[least][0] == count and sums[least][1] / count == pytest.approx(mean, rel=1e-4, abs=1e-6)


def test_the_order_of_examples_and_their_split_over_results_change_nothing():
    """However ranks and micro-batches shared them out: counts are equal, means and correlations to rounding."""
    step = a_step(64, seed=3)
    arrays = step[:6]
    order = np.random.default_rng(0).permutation(64)
    parts = [StepResult(*(array[part] for array in arrays), kl=0.0, kl_raw=0.0, kl_stderr=0.0) for part in (order[:5], order[5:40], order[40:])]
    whole, split = distribution_metrics([step]), distribution_metrics(parts)
    assert whole.keys() == split.keys()
    for name, value in whole.items():
        assert np.array(split[name]) == pytest.approx(np.array(value), rel=1e-4), name


@pytest.mark.parametrize("rewards, lengths", [([1.0, 2.0], [3, 4]), ([1.0, 1.0, 1.0], [3, 4, 5]), ([1.0, 2.0, 3.0], [4, 4, 4])])
def test_where_there_is_no_correlation_there_is_none(rewards, lengths):
    assert length_correlation(np.array(rewards), np.array(lengths)) is None


def test_a_length_that_decides_all_rewards_shows():
    lengths = np.array([5, 40, 100, 700])
    assert length_correlation(-0.01 * lengths, lengths) == pytest.approx(-1)
    assert rewards_by_length(-0.01 * lengths, lengths) == [[4, 1, -0.05], [32, 1, -0.4], [64, 1, -1.0], [512, 1, -7.0]]


def test_a_record_stays_small_and_comes_back_as_it_was(tmp_path):
    record = {"split": "train", "step": 1, **distribution_metrics([a_step(512, seed=4, longest=4096)])}
    assert len(json.dumps(record)) < 1024
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.log(record)
    metrics.drop_after(1)
    metrics.close()
    assert read_records(tmp_path / "metrics.jsonl") == [record]
    assert (tmp_path / "metrics.jsonl").read_text() == json.dumps(record) + "\n"


def test_wandb_gets_the_numbers_and_no_lists():
    record = {"split": "train", "step": 1, **distribution_metrics([a_step(32, seed=5)])}
    assert named(record).keys() == {"train/step", "train/rewards/auc", "train/length_correlation/chosen", "train/length_correlation/rejected"}
