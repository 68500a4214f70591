"""What a step takes in: the sample of KL groups, work made ahead, operations counted against a naive count."""

import threading

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config, GPT2LMHeadModel, GptOssConfig, GptOssForCausalLM, MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3_5ForCausalLM, Qwen3_5TextConfig,
    Qwen3Config, Qwen3ForCausalLM,
)  # fmt: skip

from kto_ds.data.ahead import ahead
from kto_ds.data.batch_plan import plan_batches
from kto_ds.data.kl_sample import sample_groups
from kto_ds.data.packing import make_units
from kto_ds.data.sharding import Sharding
from kto_ds.losses import reference_point
from kto_ds.model.flops import ModelShape, forward_flops, model_shape, peak_flops, rate_of
from kto_ds.model.policy import Policy
from kto_ds.stages.step_work import StepPlanner
from tests.unit.splits import make_split

# the sample


@pytest.mark.parametrize("sizes", [(4, 4, 4, 4, 4), (1, 9, 2, 2, 5, 1, 1), (20, 1, 1), (3,)])
@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.9])
def test_the_sampled_mean_is_without_bias(sizes, fraction):
    group_of = np.repeat(np.arange(len(sizes)) * 7 + 3, sizes)  # group ids have gaps
    values = np.random.default_rng(1).normal(group_of, 1)  # groups differ, and large ones from small ones
    estimates, drawn = [], []
    for step in range(500):
        sample = sample_groups(group_of, fraction=fraction, seed=5, step=step)
        assert sample.weights.sum() == pytest.approx(1) and (sample.weights > 0).all() and (np.diff(sample.places) > 0).all()
        groups = np.unique(group_of[sample.places])
        assert len(sample.places) == np.isin(group_of, groups).sum(), "a group is scored whole"
        means = sample.averages @ values[sample.places]
        assert means == pytest.approx([values[group_of == group].mean() for group in groups])
        estimates.append(sample.weights @ means)
        drawn.append(len(groups))
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert np.mean(estimates) == pytest.approx(values.mean(), abs=4 * error + 1e-9)
    assert max(drawn) <= np.ceil(fraction * len(sizes))


def test_a_whole_sample_counts_all_pairs_alike():
    sample = sample_groups(np.array([3, 3, 5, 8]), fraction=1.0, seed=0, step=1)
    assert sample.places.tolist() == [0, 1, 2, 3] and sample.weights.tolist() == [0.25] * 4 and sample.averages is None


def test_the_sample_hangs_on_seed_and_step():
    group_of = np.arange(40)
    draw = lambda seed, step: sample_groups(group_of, fraction=0.25, seed=seed, step=step).places.tolist()  # noqa: E731
    assert draw(0, 1) == draw(0, 1) and len({tuple(draw(seed, step)) for seed in (0, 1) for step in range(1, 9)}) > 2


def test_weighted_values_have_the_error_of_as_many_even_ones():
    logratios = torch.tensor([1.0, 4.0, -2.0, 0.5])
    even, plain = reference_point(logratios, torch.full((4,), 0.25, dtype=torch.float64)), reference_point(logratios)
    assert even == plain and float(plain.stderr) == pytest.approx(logratios.std().item() / 2)
    weighted = reference_point(logratios, torch.tensor([0.4, 0.4, 0.1, 0.1], dtype=torch.float64))
    assert float(weighted.raw) == pytest.approx(0.4 + 1.6 - 0.2 + 0.05) and float(weighted.stderr) > 0


def test_the_error_of_a_sample_is_that_of_groups_drawn_whole():
    """Pairs of a group are alike, so that drawing pairs one by one would err less. Many groups, of which few are drawn."""
    rng = np.random.default_rng(2)
    group_of = np.repeat(np.arange(64), 8)
    values = (rng.normal(0, 1, 64)[group_of] + rng.normal(0, 1, 512)) / np.sqrt(2)
    estimates, errors = [], []
    for step in range(500):
        sample = sample_groups(rng.permutation(64)[group_of], fraction=0.125, seed=0, step=step)  # in random order, as systematic draws hang on it
        point = reference_point(torch.from_numpy(sample.averages @ values[sample.places]), torch.from_numpy(sample.weights))
        estimates.append(float(point.raw))
        errors.append(float(point.stderr))
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(estimates), rel=0.15)


# one item ahead


def test_ahead_computes_one_item_before_it_is_asked_for():
    begun, second = [], threading.Event()

    def work(item: int) -> int:
        begun.append(item)
        if item == 1:
            second.set()
        return item * 10

    results = ahead(work, range(5))
    assert next(results) == 0
    assert second.wait(10) and len(begun) <= 2
    assert list(results) == [10, 20, 30, 40] and begun == list(range(5))
    assert list(ahead(work, [])) == []


def test_an_error_ahead_is_raised_where_its_result_is_due():
    results = ahead(lambda item: 1 // item, [1, 0, 1])
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


# the work of a step


@pytest.fixture(scope="module")
def split():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 50, rng.integers(1, 30)).tolist() for _ in range(12)]
    prompt_ids = [prompts[number % 12] for number in range(20)]
    completion_ids = [rng.integers(3, 50, rng.integers(1, 40)).tolist() for _ in range(20)]
    return make_split(prompt_ids, completion_ids, desirable=[number % 3 == 0 for number in range(20)], max_length=80, kl_group_size=3, max_group_examples=8, shuffle=True, seed=1)


SHAPE = ModelShape(layer_weights=1000, windows=(None, None), attention_width=16, head_weights=700)


def planner(split, *, rank: int = 0, num_ranks: int = 1, kl_fraction: float = 1.0, recomputed_layers: float = 1.0) -> StepPlanner:
    plan = plan_batches(split.kl_group_of, global_batch_size=12, num_train_epochs=2, max_steps=None, shuffle=True, seed=1)
    training = Sharding("prefix_shared", 100, rank, num_ranks, torch.device("cpu"))
    return StepPlanner(split, plan, 1, kl_fraction, training, training._replace(max_tokens=200), SHAPE, recomputed_layers)


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_the_ranks_together_do_every_pair_of_a_step_once(split, num_ranks):
    planners = [planner(split, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    for works in zip(*(each.ahead(0) for each in planners), strict=True):
        examples = planners[0].plan.examples_of(works[0].step)
        assert len({len(work.policy_batches) for work in works}) == len({len(work.kl_batches) for work in works}) == 1
        matched, mismatched = (sorted(pair for work in works for batch in batches(work) for pair in batch.pair_ids.tolist())
                               for batches in (lambda work: work.policy_batches, lambda work: work.kl_batches))  # fmt: skip
        assert matched == examples.tolist() and mismatched == split.mismatched_pairs(examples).tolist()
        assert all(work.cost == works[0].cost for work in works)
    assert works[0].step == planners[0].plan.num_steps


def test_phase_a_has_a_budget_of_its_own_and_may_be_a_sample_or_nothing(split):
    whole, half, none = (planner(split, kl_fraction=fraction).work_of(2) for fraction in (1.0, 0.5, 0.0))
    assert len(whole.kl_batches) < len(whole.policy_batches)
    assert 0 < len(half.kl_examples) < len(whole.kl_examples) and set(half.kl_examples) <= set(whole.examples)
    assert sorted(pair for batch in half.kl_batches for pair in batch.pair_ids.tolist()) == split.mismatched_pairs(half.kl_examples).tolist()
    assert none.kl is None and none.kl_batches == [] and none.cost.model_flops < half.cost.model_flops < whole.cost.model_flops


def test_resuming_gives_the_same_work(split):
    every, later = list(planner(split).ahead(0)), list(planner(split).ahead(2))
    assert [work.step for work in later] == [work.step for work in every[2:]]
    for one, other in zip(every[2:], later):
        assert all(torch.equal(mine.input_ids, theirs.input_ids) for mine, theirs in zip(one.policy_batches + one.kl_batches, other.policy_batches + other.kl_batches, strict=True))


# operations


@pytest.mark.parametrize("layout", ["prefix_shared", "packed"])
def test_operations_are_those_of_every_token_by_itself(split, layout):
    shape = ModelShape(layer_weights=1000, windows=(None, 7, None), attention_width=16, head_weights=700)
    lengths = dict(pair_prompts=split.pair_prompts, pair_lengths=split.pair_lengths, prompt_lengths=split.prompt_lengths)
    units = make_units(np.arange(20), layout=layout, max_tokens=10_000, **lengths)
    layers = head = 0
    for unit in units:
        prompt = int(split.prompt_lengths[unit.prompt])
        positions = [*range(prompt), *(prompt + place for pair in unit.pairs for place in range(int(split.pair_lengths[pair])))]
        for position in positions:
            layers += 2 * 1000 + sum(4 * 16 * min(position + 1, window or position + 1) for window in shape.windows)
        head += sum(2 * 700 * int(split.pair_lengths[pair]) for pair in unit.pairs)
    assert forward_flops(shape, units, split) == (layers, head)
    assert forward_flops(shape, [], split) == (0, 0)


def test_what_a_step_costs(split):
    work = planner(split).work_of(1)
    kept = planner(split, recomputed_layers=0.0).work_of(1)
    pairs = sorted(work.examples.tolist())
    assert work.cost.tokens == sum(int(split.prompt_lengths[split.prompt_of[example]] + split.matched_lengths[example]) for example in pairs)
    half = planner(split, recomputed_layers=0.5).work_of(1)
    assert kept.cost.model_flops == work.cost.model_flops < kept.cost.hardware_flops < work.cost.hardware_flops < work.cost.model_flops * 4 / 3 + 1
    assert half.cost.hardware_flops == (kept.cost.hardware_flops + work.cost.hardware_flops) / 2


def test_the_shape_of_a_model():
    config = Qwen3Config(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)
    shape = model_shape(Policy(Qwen3ForCausalLM(config)), config)
    assert shape == ModelShape(layer_weights=3 * (2 * 32 * 64 + 2 * 32 * 32 + 3 * 32 * 48), windows=(None,) * 3, attention_width=64, head_weights=3200)
    assert peak_flops(torch.device("cpu"), "bfloat16") is None


def test_of_a_mixture_of_experts_those_count_that_a_token_meets():
    config = GptOssConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_local_experts=8, num_experts_per_tok=3,
        sliding_window=5, pad_token_id=0,
    )  # fmt: skip
    attention, router, expert = 2 * 32 * 64 + 2 * 32 * 32, 8 * 32, 3 * 32 * 48
    assert model_shape(Policy(GptOssForCausalLM(config)), config) == ModelShape(2 * (attention + router + 3 * expert), (5, None), 64, 3200)


def test_linear_attention_attends_to_no_positions():
    config = Qwen3_5TextConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0,
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, layer_types=["linear_attention", "full_attention", "linear_attention"],
    )  # fmt: skip
    assert model_shape(Policy(Qwen3_5ForCausalLM(config)), config).windows == (None,)


def test_families_with_names_of_their_own_windows_and_none_of_it():
    gpt2 = GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4)
    assert model_shape(Policy(GPT2LMHeadModel(gpt2)), gpt2) == ModelShape(2 * 12 * 32 * 32, (None, None), 32, 3200)
    mistral = MistralConfig(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, sliding_window=7)
    assert model_shape(Policy(MistralForCausalLM(mistral)), mistral).windows == (7, 7)
    mamba = MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2)
    assert model_shape(Policy(MambaForCausalLM(mamba)), mamba) is None


@pytest.mark.parametrize(
    "name, rate",
    [("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA GB200", 2500e12), ("NVIDIA H20", 148e12),
     ("NVIDIA RTX A1000", None), ("NVIDIA A10G", None), ("NVIDIA GeForce RTX 4090", None)],
)  # fmt: skip
def test_the_rate_of_a_device_goes_by_whole_words(name, rate):
    assert rate_of(name) == rate
