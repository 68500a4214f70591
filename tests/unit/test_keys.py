"""Keys of token sequences, and the join by key, against dictionaries."""

import numpy as np
import pytest

from kto_ds.data.keys import distinct, find, ids_key, pair_keys


def test_distinct_keys_stand_in_order_of_appearance():
    keys = np.array([[5, 1], [2, 2], [5, 1], [5, 0], [2, 2]], dtype=np.uint64)
    of, first = distinct(keys)
    assert of.tolist() == [0, 1, 0, 2, 1] and first.tolist() == [0, 1, 3]


@pytest.mark.parametrize(("num_keys", "num_wanted"), [(0, 0), (0, 5), (5, 0), (50, 80), (300, 20)])
def test_find_is_what_a_dictionary_finds(num_keys, num_wanted):
    rng = np.random.default_rng(num_keys)
    keys, wanted = (rng.integers(0, 9, (size, 2)).astype(np.uint64) for size in (num_keys, num_wanted))
    places: dict[tuple, int] = {}
    for place, key in enumerate(map(tuple, keys.tolist())):
        places.setdefault(key, place)
    assert find(keys, wanted).tolist() == [places.get(tuple(key), -1) for key in wanted.tolist()]


def test_a_token_moved_from_the_prompt_to_the_completion_makes_another_pair():
    cut = lambda at: (ids_key(np.arange(6)[:at]), ids_key(np.arange(6)[at:]))  # noqa: E731
    prompts, completions = (np.stack(part) for part in zip(*(cut(at) for at in range(1, 6))))
    keys = pair_keys(prompts, completions)
    assert len(np.unique(keys, axis=0)) == 5
    assert (pair_keys(prompts[2:3], completions[2:3]) == keys[2]).all()
    assert (ids_key(np.arange(6, dtype=np.int64)) == ids_key(np.arange(6, dtype=np.int32))).all()
