"""Generation through the policy's own forward, against a naive loop and against transformers' generate."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from kto_ds.data.continuation import share_prompts
from kto_ds.model.generate import Completion, choose_tokens, generate
from kto_ds.model.policy import Policy
from tests.unit.test_families import FAMILIES, load, plain_model, save_model
from tests.unit.test_policy import VOCAB

NUM_TOKENS = 9
LENGTHS = (7, 1, 12, 4)  # of the prompts; the windows of the families have five tokens
WRITTEN_OUT = ("llama", "qwen3_moe", "gpt_oss", "qwen3_5", "gemma2")  # grouped heads, experts, sinks and a window, a recurrent state, soft caps


def random_prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, VOCAB, length) for length in LENGTHS]


def answers(policy: Policy, prompts: list[np.ndarray], layout: str, *, stop_ids=(), temperature: float = 0.0, top_p: float = 1.0, draws=None, is_over=bool) -> list[Completion]:
    draws = np.zeros((len(prompts), NUM_TOKENS)) if draws is None else draws
    return generate(
        policy, prompts, draws=draws, temperature=temperature, top_p=top_p, stop_ids=stop_ids, layout=layout,
        device=torch.device("cpu"), is_over=is_over,
    )  # fmt: skip


@torch.no_grad()
def naive_greedy(plain: PreTrainedModel, prompt: np.ndarray, num_tokens: int = NUM_TOKENS) -> list[int]:
    """One whole forward for each token."""
    ids = prompt.tolist()
    for _ in range(num_tokens):
        ids.append(int(plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", [name if name in WRITTEN_OUT else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES])
def test_the_likeliest_tokens_are_those_of_a_naive_loop(name, tmp_path):
    policy, serving = load(save_model(name, tmp_path))
    plain, prompts = plain_model(tmp_path), random_prompts()
    found = answers(policy, prompts, serving.layout)
    assert [completion.tokens for completion in found] == [naive_greedy(plain, prompt) for prompt in prompts]
    assert len({token for completion in found for token in completion.tokens}) > 4, "a model that says one thing only tells nothing"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> tuple[Path, Policy]:
    folder = save_model("qwen3", tmp_path_factory.mktemp("qwen3"))
    return folder, load(folder)[0]


def test_they_are_those_of_transformers_generate(qwen):
    folder, policy = qwen
    plain, [prompt, *_] = plain_model(folder), random_prompts()
    ids = torch.from_numpy(prompt)[None]
    theirs = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None)
    assert answers(policy, [prompt], "prefix_shared")[0].tokens == theirs[0, len(prompt) :].tolist()


def test_all_layouts_and_companies_give_the_same(qwen):
    folder, policy = qwen
    prompts = random_prompts()
    together = answers(policy, prompts, "packed")
    assert together == [answers(policy, [prompt], "packed")[0] for prompt in prompts]
    assert together == answers(load(folder, layout="padded")[0], prompts, "padded")


def test_a_completion_ends_with_its_stop_token_and_the_loop_with_the_last_of_them(qwen):
    _, policy = qwen
    whole, told = answers(policy, random_prompts(), "packed"), []
    stop_ids = [completion.tokens[2] for completion in whole]
    found = answers(policy, random_prompts(), "packed", stop_ids=stop_ids, is_over=lambda ended: told.append(ended) or ended)
    for stopped, free in zip(found, whole):
        first = next(number for number, token in enumerate(free.tokens, start=1) if token in stop_ids)
        assert stopped == Completion(free.tokens[:first], "eos")
    assert told == [False] * (len(told) - 1) + [True] and len(told) <= 4
    assert {completion.stopped for completion in whole} == {"length"}


def test_a_rank_without_prompts_runs_along_until_all_are_done(qwen):
    _, policy = qwen
    told = []
    assert answers(policy, [], "packed", draws=np.zeros((0, 5)), is_over=lambda ended: told.append(ended) or len(told) > 3) == []
    assert told == [True] * 4


def test_draws_alone_decide_what_is_sampled(qwen):
    _, policy = qwen
    prompts, rng = random_prompts(), np.random.default_rng(0)
    draws = rng.random((len(prompts), NUM_TOKENS))
    before = torch.get_rng_state()
    found = answers(policy, prompts, "packed", temperature=1.5, draws=draws)
    assert torch.equal(torch.get_rng_state(), before)
    assert found == [answers(policy, [prompt], "packed", temperature=1.5, draws=own[None])[0] for prompt, own in zip(prompts, draws)]
    assert found != answers(policy, prompts, "packed", temperature=1.5, draws=rng.random(draws.shape))


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (1.0, 0.8)])
def test_tokens_are_drawn_from_the_distribution(temperature, top_p):
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0, 2.5]])
    draws = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    tokens = choose_tokens(logits.expand(20_000, -1), draws, temperature=temperature, top_p=top_p)
    expected = (logits[0].double() / temperature).softmax(0)
    if top_p < 1:  # of e^3, e^2.5, e^2: the first two have 0.754 of all, with the third it is 0.93
        expected = torch.where(torch.tensor([False, True, True, False, True]), expected, 0.0)
        expected /= expected.sum()
    torch.testing.assert_close(torch.bincount(tokens, minlength=5) / 20_000, expected.float(), atol=1e-3, rtol=0)


def test_the_last_draw_below_one_still_finds_a_token():
    logits = torch.zeros(1, 7)
    last = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    assert choose_tokens(logits, last, temperature=1.0, top_p=0.5).item() == 3  # 4 of 7 have half


def test_logits_that_are_no_numbers_give_some_token():
    assert choose_tokens(torch.full((2, 7), float("nan")), torch.zeros(2, dtype=torch.float64), temperature=1.0, top_p=0.9).tolist() == [0, 0]


def test_rounds_hold_what_fits_and_are_equally_many_on_every_rank():
    assert share_prompts([5, 9, 2, 7], max_tokens=20, num_ranks=1) == [[[1, 3], [0, 2]]]
    assert share_prompts([5, 9, 2, 7], max_tokens=6, num_ranks=1) == [[[1], [3], [0], [2]]]
    assert share_prompts([5, 9, 2, 7, 1], max_tokens=100, num_ranks=2) == [[[1, 0, 4]], [[3, 2]]]
    assert share_prompts([5], max_tokens=100, num_ranks=3) == [[[0]], [[]], [[]]]
    assert share_prompts([4, 4, 4], max_tokens=4, num_ranks=2) == [[[0], [2]], [[1], []]]
