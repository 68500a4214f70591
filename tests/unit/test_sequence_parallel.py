"""Which groups of ranks may share a row."""

import pytest
from transformers import LlamaConfig

from kto_ds.errors import UserError
from kto_ds.model.support import require_sharable

MODEL = LlamaConfig(num_attention_heads=12, num_key_value_heads=6, hidden_size=48)


def refusal_of(size: int, *, num_ranks: int, layout: str = "prefix_shared") -> str:
    with pytest.raises(UserError) as refused:
        require_sharable(size, MODEL, layout=layout, num_ranks=num_ranks)
    return str(refused.value)


@pytest.mark.parametrize("size, num_ranks", [(1, 5), (2, 8), (3, 12), (6, 6)])
def test_what_divides_ranks_and_heads_is_taken(size, num_ranks):
    require_sharable(size, MODEL, layout="prefix_shared", num_ranks=num_ranks)


def test_a_refusal_names_what_does_not_divide_and_what_would():
    assert refusal_of(4, num_ranks=6).startswith("batch.sequence_parallel_size: 6 ranks cannot be shared out to groups of 4")
    assert "6 key/value heads" in refusal_of(4, num_ranks=8) and "one of 1, 2" in refusal_of(4, num_ranks=8)
    assert "12 query heads" in refusal_of(8, num_ranks=8)
    assert "padded" in refusal_of(2, num_ranks=8, layout="padded")
