"""Limits, selection of rows, and the arrays that training maps, against naive versions."""

import zipfile

import numpy as np
import pytest
import xxhash

from kto_ds.data.assemble import INDEX, Grouping, hold_out, index_split, read_index, repeat_by_weight, save_split
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.keys import distinct
from kto_ds.data.segments import Limits, Row, fit, is_whole, load_arrays, load_notes, make_segment, save_segment
from kto_ds.data.split_report import source_reports, split_report
from kto_ds.data.tokenization import RowTokens
from kto_ds.errors import UserError
from tests.unit.splits import naive_tokens, rows_of


def tokens_of(prompt_length: int, completion_length: int) -> RowTokens:
    return RowTokens(np.arange(prompt_length, dtype=np.int32), 100 + np.arange(completion_length, dtype=np.int32), False, False)


@pytest.mark.parametrize(
    ("limits", "prompt_length", "completion_length", "expected"),
    [
        (Limits(10), 4, 3, (range(4), range(100, 103))),
        (Limits(10), 4, 30, (range(4), range(100, 109))),  # the rest is cut when the prompts of its pairs are known
        (Limits(10), 10, 3, "the prompt has 10 tokens and leaves no room for a completion, data.max_length is 10"),
        (Limits(10, max_prompt_length=3), 12, 3, (range(3), range(100, 103))),
        (Limits(10, max_prompt_length=3, truncation_mode="keep_end"), 12, 3, (range(9, 12), range(100, 103))),
        (Limits(10, max_completion_length=2), 4, 3, (range(4), range(100, 102))),
        (Limits(10, max_completion_length=2, max_prompt_length=1, truncation_mode="keep_end"), 4, 3, (range(3, 4), range(100, 102))),
        (Limits(10, truncation_mode="drop"), 4, 6, (range(4), range(100, 106))),
        (Limits(10, truncation_mode="drop"), 4, 7, "prompt and completion have 11 tokens, data.max_length is 10"),
        (Limits(10, max_prompt_length=3, truncation_mode="drop"), 4, 1, "the prompt has 4 tokens, data.max_prompt_length is 3"),
        (Limits(10, max_completion_length=3, truncation_mode="error"), 4, 4, "the completion has 4 tokens, data.max_completion_length is 3"),
    ],
)
def test_limits(limits, prompt_length, completion_length, expected):
    found = fit(tokens_of(prompt_length, completion_length), limits)
    if isinstance(expected, tuple):
        found, expected = [part.tolist() for part in found], [list(part) for part in expected]
    assert found == expected


def random_rows(seed: int, size: int = 60):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 9, rng.integers(1, 8)).tolist() for _ in range(size // 3)]
    prompt_ids = [prompts[number] for number in rng.integers(0, len(prompts), size)]
    return prompt_ids, [rng.integers(0, 9, rng.integers(1, 12)).tolist() for _ in range(size)], rng.random(size) < 0.4


def test_equal_prompts_are_one_and_others_are_not():
    prompt_ids, completion_ids, desirable = random_rows(1)
    of, first = distinct(rows_of(prompt_ids, completion_ids, desirable, limits=Limits(20)).prompt_keys)
    seen = []
    for prompt in prompt_ids:
        if prompt not in seen:
            seen.append(prompt)
    assert of.tolist() == [seen.index(prompt) for prompt in prompt_ids]
    assert [prompt_ids[row] for row in first] == seen


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.8])
def test_held_out_prompts_are_on_one_side_only(fraction):
    prompt_ids, completion_ids, desirable = random_rows(2, size=300)
    rows = rows_of(prompt_ids, completion_ids, desirable, limits=Limits(20))
    chosen = hold_out(rows, fraction, seed=3)
    inside, outside = ({tuple(prompt) for prompt, held in zip(prompt_ids, chosen) if held is flag} for flag in (np.True_, np.False_))
    assert not inside & outside
    assert len(inside) == max(2, round(fraction * len(inside | outside)))
    assert (hold_out(rows, fraction, seed=3) == chosen).all() and (hold_out(rows, fraction, seed=4) != chosen).any()


def test_rows_added_later_move_few_prompts_to_the_other_side():
    rows = rows_of([[number] for number in range(2000)], [[1]] * 2000, [True] * 2000, limits=Limits(20))
    before = hold_out(rows.select(np.arange(1800)), 0.1, seed=0)
    after = hold_out(rows, 0.1, seed=0)[:1800]
    assert (before != after).sum() < 30  # a fresh draw of 10 % would change about 324


def test_rated_turns_of_one_conversation_stay_on_one_side():
    # Conversation r asks [r] and then [r, 100, r]; every tenth one begins like the one before it.
    first = [[number - (number % 10 == 9)] for number in range(100)]
    prompts = [prompt for start in first for prompt in (start, [*start, 100, *start])]
    rows = rows_of(prompts, [[7]] * 200, [True] * 200, limits=Limits(20))._replace(row_of=np.repeat(np.arange(100), 2))
    chosen = hold_out(rows, 0.2, seed=0)
    assert (chosen[::2] == chosen[1::2]).all()
    assert not {tuple(prompt) for prompt, held in zip(prompts, chosen) if held} & {tuple(prompt) for prompt, held in zip(prompts, chosen) if not held}
    assert 36 <= len({tuple(prompt) for prompt, held in zip(prompts, chosen) if held}) <= 38


def test_a_hold_out_that_leaves_nothing_is_refused():
    rows = rows_of([[1], [2], [3]], [[1]] * 3, [True] * 3, limits=Limits(20))
    with pytest.raises(UserError, match="^data.held_out_fraction: 3 distinct prompts cannot be divided into 2 held out and two or more to train on"):
        hold_out(rows, 0.5, seed=0)


def test_weights_repeat_whole_sources_and_choose_by_prompt():
    prompt_ids = [[number // 2] for number in range(40)]  # two rows a prompt
    rows = rows_of(prompt_ids, [[number] for number in range(40)], [True, False] * 20, limits=Limits(20))
    source_of = np.repeat([0, 1], 20)
    chosen = repeat_by_weight(rows, source_of, [2.5, 0.3], seed=1)
    counts = np.bincount(chosen, minlength=40)
    assert sorted(counts[:20].tolist()) == [2] * 10 + [3] * 10 and sorted(counts[20:].tolist()) == [0] * 14 + [1] * 6
    assert (counts[::2] == counts[1::2]).all()  # both rows of a prompt together
    assert repeat_by_weight(rows, source_of, [1.0, 1.0], seed=1).tolist() == list(range(40))


def naive_key(prompt: np.ndarray, completion: np.ndarray) -> bytes:
    digests = [xxhash.xxh3_128_digest(ids.astype("<i4").tobytes()) for ids in (prompt, completion)]
    return xxhash.xxh3_128_digest(b"".join(digests))


def write_segments(folder, prompt_ids, completion_ids, desirable, limits, sizes):
    """Write consecutive rows as segments of the given sizes, every second one of another file."""
    folder.mkdir()
    segments, start = [], 0
    for number, size in enumerate(sizes):
        part = range(start, start + size)
        rows = [Row(RowTokens(np.array(prompt_ids[r], np.int32), np.array(completion_ids[r], np.int32), False, False), r, bool(desirable[r]), False) for r in part]
        segment, unfit = make_segment(rows, limits)
        path = folder / f"{number}.npz"
        save_segment(path, segment, {"rows": size, "dropped": unfit})
        segments.append((number % 2, path))
        start += size
    return segments


@pytest.mark.parametrize("seed", range(3))
def test_the_saved_arrays_are_those_joined_row_by_row(tmp_path, seed):
    prompt_ids, completion_ids, desirable = random_rows(seed)
    limits, grouping = Limits(9), Grouping(9, 3, 24, True, seed)
    segments = write_segments(tmp_path / "segments", prompt_ids, completion_ids, desirable, limits, sizes=[7, 0, 30, 1, 22])
    rows = read_index(segments)
    examples = rows.select(repeat_by_weight(rows, rows.file_of, [1.5, 1.0], seed))
    index = index_split(examples, grouping, where="data.train")
    save_split(index, segments, ["a:", "b:row "], tmp_path / "split")
    split = TokenizedSplit.load(tmp_path / "split")

    naive = naive_tokens(index, prompt_ids, completion_ids)
    assert split.prompt_tokens.tolist() == naive["prompt_tokens"].tolist()
    assert split.completion_tokens.tolist() == naive["completion_tokens"].tolist()
    for example, row in enumerate(examples.row_of.tolist()):
        prompt, completion = prompt_ids[row], completion_ids[row]
        assert split.prompt(split.prompt_of[example]).tolist() == prompt
        assert split.completion(example).tolist() == completion[: 9 - len(prompt)]
        other = split.prompt(split.mismatched_prompt_of[example]).tolist()
        assert other != prompt and split.completion(example + split.num_examples).tolist() == completion[: 9 - len(other)]
        for pair in (example, example + split.num_examples):
            assert split.pair_keys[pair].tobytes() == naive_key(split.prompt(split.pair_prompts[pair]), split.completion(pair))
        assert split.desirable[example] == desirable[row]
        assert split.row_name(example) == f"{'b:row ' if row == 37 else 'a:'}{row}"
    assert isinstance(split.completion_tokens.base, np.memmap)


def test_a_damaged_segment_is_noticed(tmp_path):
    segment, _ = make_segment([Row(tokens_of(40, 400), 1, True, False)], Limits(1000))
    path = tmp_path / "0.npz"
    save_segment(path, segment, {"rows": 1})
    assert load_notes(path) == {"rows": 1} and is_whole(path) and not is_whole(tmp_path / "1.npz")
    content = bytearray(path.read_bytes())
    place = content.index((100 + np.arange(400, dtype=np.int32)).tobytes()) + 100
    content[place] ^= 1
    path.write_bytes(content)
    assert not is_whole(path)
    with pytest.raises(zipfile.BadZipFile, match="Bad CRC-32"):
        load_arrays(path, ("completion_tokens",))


def test_no_row_left_is_an_error():
    rows = rows_of([], [], [], limits=Limits(9))
    with pytest.raises(UserError, match="^data.train: no row is left to use"):
        index_split(rows, Grouping(9, 2, 4, False, 0), where="data.train")


def test_the_report_counts_repeats_contradictions_and_cuts():
    prompt_ids = [[1, 2], [1, 2], [1, 2], [3], [3], [4] * 6]
    completion_ids = [[5], [5], [5], [6, 7], [6, 8], [9] * 5]
    desirable = [True, True, False, True, True, True]
    rows = rows_of(prompt_ids, completion_ids, desirable, limits=Limits(8))
    index = index_split(rows, Grouping(8, 2, 12, False, 0), where="data.train")
    report = split_report(rows, index, train_prompt_keys=rows.prompt_keys[3:4])
    assert (report["duplicates"], report["contradictions"]) == (1, 3)
    assert (report["desirable"], report["undesirable"]) == (5, 1)
    assert report["recommended_weights"] == {"desirable_weight": 1.0, "undesirable_weight": pytest.approx(3.75)}  # 5 / 3.75 = 4/3
    assert (report["truncated_prompts"], report["truncated_completions"]) == (0, 1)
    assert report["longest_tokens"] == 8 and report["example_tokens"]["max"] == 8
    assert report["examples_with_training_prompts"] == 2
    assert report["tokens"] == 3 * 3 + 3 + 3 + 8
    by_source = source_reports(rows, index, np.array([0]), 2)
    assert by_source[0]["examples"] == 6 and by_source[1] == {"usable_examples": 0, "examples": 0, "desirable": 0, "undesirable": 0}
    assert set(INDEX) < set(rows._fields)
