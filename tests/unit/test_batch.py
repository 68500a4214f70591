"""Micro-batches as tensors: what every scored token stands behind, in all three layouts, against the rows themselves."""

import numpy as np
import pytest
import torch

from kto_ds.data.batch import LENGTHS_PER_DOUBLING, Batch, make_batch, part_of, row_length
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.packing import MicroBatch, make_units, pack
from tests.unit.splits import make_split

LAYOUTS = ["prefix_shared", "packed", "padded"]


def random_split(seed: int, *, num_prompts: int = 6, vocab_size: int = 50) -> TokenizedSplit:
    """Odd lengths, one to four completions a prompt, some of one token."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, vocab_size, int(rng.integers(1, 12))).tolist() for _ in range(num_prompts)]
    rows = [(prompt, rng.integers(0, vocab_size, int(rng.choice([1, 1, 2, 5, 9]))).tolist()) for prompt in prompts for _ in range(int(rng.integers(1, 5)))]
    return make_split(
        [prompt for prompt, _ in rows], [completion for _, completion in rows], desirable=rng.random(len(rows)) < 0.5,
        max_length=17, kl_group_size=3, max_group_examples=24, shuffle=True, seed=seed,
    )  # fmt: skip


def micro_batches_of(split: TokenizedSplit, layout: str, max_tokens: int = 60) -> list[MicroBatch]:
    """Matched and mismatched pairs together, so that every prompt has several completions."""
    units = make_units(
        np.arange(2 * split.num_examples), pair_prompts=split.pair_prompts, pair_lengths=split.pair_lengths, prompt_lengths=split.prompt_lengths,
        layout=layout, max_tokens=max_tokens,
    )  # fmt: skip
    return pack(units, layout=layout, max_tokens=max_tokens)


def context_of(batch: Batch, place: int) -> list[int]:
    """Return the tokens that flat input position `place` attends to, itself last."""
    length = batch.input_ids.shape[1]
    tokens = batch.input_ids.flatten().tolist()
    if batch.segments is None:
        row, column = divmod(place, length)
        assert batch.attention_mask[row, : column + 1].all()
        return tokens[row * length : place + 1]
    queries, keys = batch.segments.query_offsets.tolist(), batch.segments.key_offsets.tolist()
    index = range(length) if batch.segments.key_index is None else batch.segments.key_index.tolist()
    segment = next(number for number in range(len(queries) - 1) if queries[number] <= place < queries[number + 1])
    num_unseen = queries[segment + 1] - 1 - place  # the last query stands on the last key
    return [tokens[index[key]] for key in range(keys[segment], keys[segment + 1] - num_unseen)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(6))
def test_every_completion_token_is_predicted_from_exactly_what_precedes_it(seed, layout):
    split = random_split(seed)
    seen = []
    for micro_batch in micro_batches_of(split, layout):
        batch = make_batch(micro_batch, split, layout)
        positions = batch.position_ids.flatten().tolist()
        scored = [[] for _ in range(batch.num_pairs)]
        sequence_of = torch.repeat_interleave(torch.arange(len(batch.completion_lengths)), batch.completion_lengths)
        for place, target, sequence in zip(batch.predictors.tolist(), batch.targets.tolist(), sequence_of.tolist()):
            context = context_of(batch, place)
            assert positions[place] == len(context) - 1
            scored[sequence].append((context, target))
        for pair, steps in zip(batch.pair_ids.tolist(), scored):
            prompt, completion = split.prompt(split.pair_prompts[pair]).tolist(), split.completion(pair).tolist()
            assert steps == [([*prompt, *completion[:index]], token) for index, token in enumerate(completion)]
        seen += batch.pair_ids.tolist()
    assert sorted(seen) == list(range(2 * split.num_examples))


@pytest.mark.parametrize("num_parts", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(3))
def test_the_parts_of_a_row_have_its_tokens_and_predict_each_completion_token_once(seed, num_parts):
    split = random_split(seed)
    for micro_batch in [*micro_batches_of(split, "prefix_shared"), []]:
        whole = make_batch(micro_batch, split, "prefix_shared", num_parts=num_parts)
        parts = [part_of(whole, part, num_parts) for part in range(num_parts)]
        length = whole.input_ids.shape[1] // num_parts
        for field in ("input_ids", "position_ids"):
            assert all(vars(part)[field].shape == (1, length) for part in parts)
            assert torch.equal(torch.cat([vars(part)[field] for part in parts], dim=1), vars(whole)[field])
        # (sequence, place in the row, target) of every scored token
        scored = []
        for number, part in enumerate(parts):
            assert len(part.completion_lengths) == len(whole.completion_lengths) and part.segments == whole.segments
            sequences = torch.repeat_interleave(torch.arange(len(whole.completion_lengths)), part.completion_lengths)
            scored += zip(sequences.tolist(), (part.predictors + number * length).tolist(), part.targets.tolist())
        of_whole = torch.repeat_interleave(torch.arange(len(whole.completion_lengths)), whole.completion_lengths)
        assert sorted(scored) == sorted(zip(of_whole.tolist(), whole.predictors.tolist(), whole.targets.tolist()))
        assert [part.is_counted for part in parts] == [True] + [False] * (num_parts - 1)


@pytest.mark.parametrize("seed", range(6))
def test_short_packed_rows_hold_no_padding_and_a_shared_prompt_once(seed):
    split = random_split(seed)
    for layout in ("prefix_shared", "packed"):
        for micro_batch in micro_batches_of(split, layout):
            batch = make_batch(micro_batch, split, layout)
            assert batch.input_ids.shape == batch.position_ids.shape == (1, sum(unit.tokens for unit in micro_batch))
            assert batch.attention_mask is None
    tokens = {layout: sum(make_batch(part, split, layout).input_ids.numel() for part in micro_batches_of(split, layout)) for layout in LAYOUTS}
    assert tokens["prefix_shared"] < tokens["packed"] <= tokens["padded"]


def test_packed_rows_have_few_lengths():
    assert [row_length(tokens) for tokens in (1, 2, 127, 128, 129, 255, 8191, 8192, 8193)] == [1, 2, 127, 128, 130, 256, 8192, 8192, 8320]
    lengths = [row_length(tokens) for tokens in range(1, 20_000)]
    assert all(tokens <= length < tokens * (1 + 1 / LENGTHS_PER_DOUBLING) for tokens, length in enumerate(lengths, start=1))
    assert len(set(lengths[8192:16384])) == LENGTHS_PER_DOUBLING


@pytest.mark.parametrize("layout", ["prefix_shared", "packed"])
def test_what_fills_a_row_up_sees_only_itself_and_nobody_sees_it(layout):
    split, filled = random_split(7, num_prompts=60), 0
    for micro_batch in micro_batches_of(split, layout, max_tokens=333):
        batch = make_batch(micro_batch, split, layout)
        tokens, segments = sum(unit.tokens for unit in micro_batch), batch.segments
        length = batch.input_ids.numel()
        assert batch.input_ids.shape == batch.position_ids.shape == (1, row_length(tokens)) and (batch.predictors < tokens).all()
        assert segments.query_offsets[-1] == length and batch.completion_lengths.sum() == len(batch.targets)
        key_index = torch.arange(length) if segments.key_index is None else segments.key_index
        assert key_index[: segments.key_offsets[-2]].max() < tokens or length == tokens
        assert length == tokens or segments.key_index is None or len(key_index) == row_length(len(key_index))
        if length > tokens:
            filled += 1
            own = list(range(tokens, length))
            assert segments.query_lengths[-1] == len(own) <= segments.key_lengths[-1] and own == list(range(int(segments.query_offsets[-2]), length))
            assert key_index[segments.key_offsets[-2] :].unique().tolist() == own
            assert batch.position_ids[0, tokens:].tolist() == list(range(length - tokens))
    assert filled > 1


@pytest.mark.parametrize("layout", ["prefix_shared", "packed"])
def test_segments_say_the_same_on_the_host_and_on_the_device(layout):
    split = random_split(3)
    for micro_batch in micro_batches_of(split, layout):
        batch = make_batch(micro_batch, split, layout)
        segments = batch.segments
        assert segments.query_offsets.dtype == segments.key_offsets.dtype == torch.int32
        assert segments.query_offsets.diff().tolist() == list(segments.query_lengths) and segments.key_offsets.diff().tolist() == list(segments.key_lengths)
        assert sum(segments.query_lengths) == batch.input_ids.numel()
        assert all(queries <= keys for queries, keys in zip(segments.query_lengths, segments.key_lengths))
        num_keys = batch.input_ids.numel() if segments.key_index is None else len(segments.key_index)
        assert sum(segments.key_lengths) == num_keys
        # Keys are gathered only where a prompt is shared.
        assert (segments.key_index is not None) == any(len(unit.pairs) > 1 for unit in micro_batch)


def test_padding_is_masked_and_comes_last():
    split = random_split(1)
    for micro_batch in micro_batches_of(split, "padded"):
        batch = make_batch(micro_batch, split, "padded")
        lengths = [unit.longest for unit in micro_batch]
        assert batch.attention_mask.sum(1).tolist() == lengths and batch.input_ids.shape[1] == max(lengths)
        assert (batch.attention_mask.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_filler_runs_two_tokens_and_returns_nothing(layout):
    batch = make_batch([], random_split(0), layout)
    assert batch.num_pairs == 0 and batch.input_ids.numel() == 2
    assert len(batch.predictors) == len(batch.targets) == 1 and batch.completion_lengths.tolist() == [1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moving_a_batch_moves_every_tensor_and_changes_none(layout):
    split = random_split(2)
    batch = make_batch(micro_batches_of(split, layout)[0], split, layout)
    for moved, like in ((batch.to(torch.device("cpu")), torch.equal), (batch.to(torch.device("meta")), lambda a, b: a.shape == b.shape and a.device.type == "meta")):
        for name, value in vars(batch).items():
            parts, wholes = (vars(vars(moved)[name]), vars(value)) if name == "segments" and value else ({name: vars(moved)[name]}, {name: value})
            for part, whole in wholes.items():
                assert like(parts[part], whole) if isinstance(whole, torch.Tensor) else np.array_equal(parts[part], whole)


def test_lengths_are_those_after_truncation():
    # max_length 6: behind the prompt of 4 tokens fit 2, behind that of 1 token 5.
    split = make_split(
        [[1, 2, 3, 4], [9]], [[5, 6, 7, 8, 5, 6], [7, 8, 7]], desirable=[True, False],
        max_length=6, kl_group_size=2, max_group_examples=4, shuffle=False, seed=0,
    )  # fmt: skip
    assert split.pair_prompts.tolist() == [0, 1, 1, 0] and split.pair_lengths.tolist() == [2, 3, 5, 2]
    assert [split.completion(pair).tolist() for pair in range(4)] == [[5, 6], [7, 8, 7], [5, 6, 7, 8, 5], [7, 8]]
    assert split.longest_pair_tokens == 6


@pytest.mark.parametrize("layout", ["prefix_shared", "packed", "padded"])
def test_no_tensor_overlaps_itself(layout):
    """A tensor whose rows are one place in memory, as expand makes it, cannot be copied to page-locked memory."""
    split = random_split(3, num_prompts=9)
    for micro_batch in micro_batches_of(split, layout, max_tokens=400):
        batch = make_batch(micro_batch, split, layout)
        for tensor in (batch.input_ids, batch.position_ids, batch.predictors, batch.targets, batch.completion_lengths):
            assert all(stride > 0 or size <= 1 for stride, size in zip(tensor.stride(), tensor.shape))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_token_is_used_by_the_pairs_it_belongs_to(layout):
    split = random_split(1)
    for micro_batch in micro_batches_of(split, layout, max_tokens=300):
        batch = make_batch(micro_batch, split, layout)
        counted = np.zeros(50)
        for pair in batch.pair_ids:
            np.add.at(counted, split.prompt(split.pair_prompts[pair]), 1)
            np.add.at(counted, split.completion(pair), 1)
        found = torch.zeros(50).index_add(0, batch.input_ids.flatten(), batch.uses.flatten())
        assert batch.uses.shape == batch.input_ids.shape and found.tolist() == counted.tolist()
    assert not make_batch([], split, layout).uses.any()
