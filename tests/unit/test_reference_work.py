"""What is scored, how it is cut into shards, and where the model lies: pure functions of lengths and bytes."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from kto_ds.data.reference import KEPT, MAX_ROWS, NAME, ReferenceRows, committed_shards, join_rows, read_shards, split_rows, write_shard
from kto_ds.data.reference_work import MIN_SHARDS, needed_pairs, plan_shards, wanted_pairs
from kto_ds.errors import UserError
from kto_ds.model.placement import GIB, choose_placement, weight_bytes, working_bytes
from tests.unit.splits import make_split

PLAN = "a" * 32


def random_split(seed: int, size: int = 400, prompts: int = 90):
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, 50, rng.integers(2, 30)).tolist() for _ in range(prompts)]
    prompt_ids = [texts[number] for number in rng.integers(0, prompts, size)]
    completion_ids = [rng.integers(0, 50, rng.integers(1, 60)).tolist() for _ in range(size)]
    return make_split(prompt_ids, completion_ids, desirable=rng.random(size) < 0.5, max_length=80, kl_group_size=4, max_group_examples=32, shuffle=True, seed=seed)


def key_set(keys: np.ndarray) -> set[bytes]:
    return {key.tobytes() for key in keys}


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_every_content_is_wanted_once_whatever_splits_it_lies_in(loss_type):
    one, two = random_split(0), random_split(1)
    wanted = wanted_pairs({"train": one, "eval": two, "again": one}, loss_type)
    expected = key_set(one.pair_keys[needed_pairs(one, loss_type)]) | key_set(two.pair_keys[needed_pairs(two, loss_type)])
    assert len(wanted.keys) == len(key_set(wanted.keys)) and key_set(wanted.keys) == expected
    assert set(wanted.split_of.tolist()) == {0, 1}
    for split, pair, key in zip(wanted.split_of[::17], wanted.pairs[::17], wanted.keys[::17]):
        assert ((one, two)[split].pair_keys[pair] == key).all()


@pytest.mark.parametrize("layout", ["prefix_shared", "packed", "padded"])
def test_shards_hold_every_wanted_pair_once_longest_first_and_balanced(layout):
    splits = {"train": random_split(0, 3000, 700), "eval": random_split(1)}
    wanted = wanted_pairs(splits, "kto")
    wanted = wanted.select(np.random.default_rng(0).random(len(wanted.keys)) < 0.8)  # some were taken over
    shards = plan_shards(splits, wanted, layout=layout, max_tokens=160)
    pairs = [splits[task.split].pair_keys[pair].tobytes() for shard in shards for task in shard for unit in task.micro_batch for pair in unit.pairs]
    assert sorted(pairs) == sorted(key_set(wanted.keys))
    assert sum(task.num_pairs for shard in shards for task in shard) == len(pairs)
    costs = [[task.cost for task in shard] for shard in shards]
    assert all(cost == sorted(cost, reverse=True) for cost in costs) and costs[0][0] == max(map(max, costs))
    assert len(shards) == MIN_SHARDS
    for num_ranks in (2, 8, 64):
        loads = [sum(map(sum, costs[rank::num_ranks])) for rank in range(num_ranks)]
        assert max(loads) <= 1.05 * np.mean(loads), num_ranks
    if layout == "prefix_shared":
        lone = sum(len(splits[task.split].prompt(unit.prompt)) * (len(unit.pairs) - 1) for shard in shards for task in shard for unit in task.micro_batch)
        assert lone > 0, "prompts are shared by their own completions and the donated ones"


def test_few_micro_batches_make_few_shards_and_a_long_pair_is_refused():
    split = random_split(0, 8, 3)
    assert len(plan_shards({"train": split}, wanted_pairs({"train": split}, "kto"), layout="packed", max_tokens=80)) <= 16
    with pytest.raises(UserError, match="^reference.max_tokens_per_microbatch: the longest sequence has"):
        plan_shards({"train": split}, wanted_pairs({"train": split}, "kto"), layout="packed", max_tokens=20)


def rows_of(size: int, per_token: bool = False, start: int = 0) -> ReferenceRows:
    rng = np.random.default_rng(size + start)
    lengths = rng.integers(1, 6, size).astype(np.int32)
    keys = np.stack([np.arange(start, start + size), rng.integers(0, 9, size)], axis=1).astype(np.uint64)
    tokens = -rng.random(int(lengths.sum())).astype(np.float32) if per_token else None
    return ReferenceRows(keys, -1 - rng.random(size).astype(np.float32), lengths, tokens)


@pytest.mark.parametrize("per_token", [False, True])
def test_what_is_committed_is_read_again_and_nothing_else(tmp_path, per_token):
    parts = [rows_of(7, per_token), rows_of(5, per_token, start=100)]
    paths = [write_shard(tmp_path, PLAN, number, part) for number, part in enumerate(parts)]
    assert all(NAME.fullmatch(path.name) for path in paths) and write_shard(tmp_path, PLAN, 1, parts[1]) == paths[1]
    (tmp_path / ".scored-000002.tmp").write_bytes(b"half")
    assert committed_shards(tmp_path, PLAN) == {0: paths[0], 1: paths[1]} and not committed_shards(tmp_path, KEPT) and not committed_shards(tmp_path, "b" * 32)
    rows, both = read_shards(paths, per_token), join_rows(parts, per_token)
    for found, expected in zip(rows, both):
        assert (found is None and expected is None) or found.tobytes() == expected.tobytes()
    with pytest.raises(UserError, match="5 reference log-probs are there twice"):
        read_shards([*paths, write_shard(tmp_path, PLAN, 2, parts[1])], per_token)


def test_rows_that_are_taken_over_are_divided_among_shards_of_bounded_size(monkeypatch):
    assert MAX_ROWS * 24 < 1 << 28
    monkeypatch.setattr("kto_ds.data.reference.MAX_ROWS", 10)
    monkeypatch.setattr("kto_ds.data.reference.MAX_TOKENS", 17)
    rows = rows_of(101, per_token=True)
    parts = list(split_rows(rows))
    assert all(len(part.keys) <= 10 and (part.num_tokens.sum() <= 17 or len(part.keys) == 1) for part in parts) and len(parts) > 10
    for found, expected in zip(join_rows(parts, True), rows):
        assert found.tobytes() == expected.tobytes()
    assert list(split_rows(rows_of(0))) == []


def place(requested="auto", *, weights=60, working=4, free=80, num_ranks=8, offloads=False):
    found = choose_placement(requested, weights=weights * GIB, working=working * GIB, free=free * GIB, num_ranks=num_ranks, offloads=offloads)
    return found.kind, found.why


def test_auto_takes_copies_where_they_fit():
    assert place() == ("replica", "a copy fits on every rank (60.0 GiB of weights and about 4.0 GiB of work, 80.0 GiB free)")
    assert place(free=68)[0] == "sharded" and place(weights=131)[0] == "sharded"
    assert place(weights=131, num_ranks=1, offloads=True)[0] == "sharded"
    kind, why = place(weights=131, num_ranks=1)
    assert kind == "replica" and "tight on the only rank" in why
    assert [place(requested, weights=weights)[0] for requested in ("replica", "sharded") for weights in (1, 999)] == ["replica", "replica", "sharded", "sharded"]


def test_bytes_are_counted_from_headers_alone(tmp_path):
    save_file({"a": torch.zeros(3, 5, dtype=torch.float32), "b": torch.zeros(7, dtype=torch.bfloat16)}, tmp_path / "one.safetensors")
    save_file({"c": torch.zeros((), dtype=torch.float32)}, tmp_path / "two.safetensors")
    header = (tmp_path / "one.safetensors").read_bytes()
    size = int.from_bytes(header[:8], "little")
    assert "a" in json.loads(header[8 : 8 + size])
    assert weight_bytes(tmp_path, ["one.safetensors", "two.safetensors"], "bfloat16") == 2 * (15 + 7 + 1)
    assert weight_bytes(tmp_path, ["one.safetensors"], "float32") == 4 * 22
    config = LlamaConfig(hidden_size=5120, intermediate_size=25600)
    assert 3 * GIB < working_bytes(config, 16384, "bfloat16") < 5 * GIB
