"""A TokenizedSplit from lists of ids, for the tests of everything that comes after prepare."""

import numpy as np

from kto_ds.data.assemble import INDEX, Grouping, Rows, SplitIndex, index_split, keys_of_pairs
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.segments import Limits, Row, make_segment
from kto_ds.data.tokenization import RowTokens


def rows_of(prompt_ids, completion_ids, desirable, *, limits: Limits) -> Rows:
    """All rows as if they were one segment of one file, numbered from 0; rows that do not fit are an error here."""
    tokens = [RowTokens(np.array(prompt, np.int32), np.array(completion, np.int32), False, False) for prompt, completion in zip(prompt_ids, completion_ids)]
    segment, unfit = make_segment([Row(found, number, bool(label), False) for number, (found, label) in enumerate(zip(tokens, desirable))], limits)
    assert not unfit
    size = len(segment.row_of)
    zeros = np.zeros(size, np.int32)
    return Rows(**{name: getattr(segment, name) for name in INDEX}, file_of=zeros, segment_of=zeros, place_of=np.arange(size, dtype=np.int32))


def make_split(prompt_ids, completion_ids, *, desirable, max_length: int, kl_group_size: int, max_group_examples: int, shuffle: bool, seed: int) -> TokenizedSplit:
    """The tokens are joined here row by row, the naive way; save_split must come to the same."""
    rows = rows_of(prompt_ids, completion_ids, desirable, limits=Limits(max_length))
    index = index_split(rows, Grouping(max_length, kl_group_size, max_group_examples, shuffle, seed), where="data.train")
    tokens = naive_tokens(index, prompt_ids, completion_ids)
    return TokenizedSplit(**index.arrays, **tokens, pair_keys=keys_of_pairs(index, tokens["completion_tokens"]), files=("rows:",))


def naive_tokens(index: SplitIndex, prompt_ids, completion_ids) -> dict[str, np.ndarray]:
    prompts = [prompt_ids[index.rows.row_of[row]][: index.rows.prompt_lengths[row]] for row in index.prompt_rows]
    completions = [completion_ids[row][:length] for row, length in zip(index.rows.row_of, index.stored_lengths)]
    return {
        "prompt_tokens": np.array([token for prompt in prompts for token in prompt], dtype=np.int32),
        "completion_tokens": np.array([token for completion in completions for token in completion], dtype=np.int32),
    }
