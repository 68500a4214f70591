"""GPUs by name, and how fast a model trains on them: published and measured shares of their rate, not a promise."""

import math
from typing import NamedTuple

from kto_ds.errors import UserError
from kto_ds.model.flops import rate_of
from kto_ds.model.placement import GIB

GPUS_OF_A_NODE = 8
# What torch has of the device's memory, GiB; and the name by which flops.py knows its rate.
MEMORY_GIB = {"A100-40": 39.4, "A100-80": 79.2, "H100": 79.1, "H200": 139.8, "H20": 95.0, "B200": 178.0, "L40S": 44.4}
RATE_NAMES = {"A100-40": "A100", "A100-80": "A100"}
# Share of the rate that the model's own operations get (MFU). Dense: docs/benchmarks/h200.md measured 0.36 to 0.44 on one H200; llm-foundry publishes 0.38 to 0.44 for
# 30B on 8 to 512 H100, 0.55 on A100. Mixtures of experts under ZeRO-3 gather experts that few tokens use: a tenth of that is often reported.
DENSE_SHARE, DENSE_SHARE_A100, SPARSE_SHARE = (0.30, 0.45), (0.40, 0.55), (0.03, 0.12)
# Bytes a second that a GPU gathers: within a node or over eight 400 Gbit/s links, and over one such link of a node.
FAST_LINK, SLOW_LINK = 370e9, 45e9
# CPU Adam reads and writes so many bytes a parameter, at so many bytes a second a node.
CPU_ADAM_BYTES, HOST_BANDWIDTH = 28, (200e9, 400e9)


class Gpu(NamedTuple):
    name: str
    memory_bytes: int
    flops: float  # dense bfloat16

    @property
    def is_a100(self) -> bool:
        return self.name.startswith("A100")


class Speed(NamedTuple):
    """Ends of a range, the slow one first."""

    tokens_per_second: tuple[float, float]  # of policy tokens, all ranks together
    seconds_per_step: tuple[float, float]  # the slow one first


def find_gpu(name: str) -> Gpu:
    """Return the kind of GPU by its name here; UserError where there is no such kind."""
    known = {kind.lower(): kind for kind in MEMORY_GIB}
    kind = known.get(name.lower())
    if kind is None:
        raise UserError(f"unknown kind of GPU: {name!r}", where="--gpu", remedy=f"use one of {', '.join(MEMORY_GIB)}")
    return Gpu(kind, round(MEMORY_GIB[kind] * GIB), rate_of(RATE_NAMES.get(kind, kind)))


def expected_speed(gpu: Gpu, *, step_flops: float, step_tokens: float, num_gpus: int, is_sparse: bool, offloaded: int) -> Speed:
    """Return a range for steps of so many operations and tokens. `offloaded`: parameters whose update runs on the host, over all ranks."""
    low, high = SPARSE_SHARE if is_sparse else DENSE_SHARE_A100 if gpu.is_a100 else DENSE_SHARE
    num_nodes = math.ceil(num_gpus / GPUS_OF_A_NODE)
    slow, fast = (
        step_flops / (num_gpus * gpu.flops * share) + CPU_ADAM_BYTES * offloaded / num_nodes / bandwidth for share, bandwidth in zip((low, high), HOST_BANDWIDTH)
    )
    return Speed((step_tokens / slow, step_tokens / fast), (slow, fast))


def tokens_to_hide_gathers(gpu: Gpu, bytes_per_second: float, *, active_share: float) -> int:
    """Return the tokens of a micro-batch from which three gathers of the weights take no longer than its products.

    Three times 2 P bytes beside 8 P operations a token, so the model's size cancels out; of a mixture of experts all is gathered and `active_share` computes.
    """
    return round(0.75 * DENSE_SHARE[1] * gpu.flops / bytes_per_second / active_share)
