"""Sequence parallelism: neighbouring ranks share the tokens of a row that is longer than one GPU has memory for (DeepSpeed Ulysses, arXiv 2309.14509).

Every rank runs the layers on its part of the row. For attention alone the ranks swap: each gets some heads of all tokens, and gives its own tokens' other
heads away; behind it they swap back. So a row's segments are kept apart by the same kernels as without.

Legend: S ranks of a group, H query heads, Hkv key/value heads, T tokens of the row, D head size.
"""

from collections.abc import Callable

from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor

from kto_ds.runtime.collectives import Group


def exchanging(group: Group) -> Callable[[Callable, Tensor, Tensor, Tensor], Tensor]:
    """Return what `packed_attention` does with its heads in a group: (attend, query, key, value) -> output.

    Query is [1, H, T/S, D], key and value [1, Hkv, T/S, D], the output [1, T/S, H, D]; `attend` is called with [1, H/S, T, D] and [1, Hkv/S, T, D], and
    returns [1, T, H/S, D].
    """

    def exchange(attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attend_to_all = DistributedAttention(lambda *heads: attend(*(part.transpose(1, 2) for part in heads)), group, scatter_idx=2, gather_idx=1)
        return attend_to_all(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), 0)

    return exchange
