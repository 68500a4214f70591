"""What a rank holds for a whole run: weights, gradients, master weights and moments, by ZeRO stage. Pure arithmetic, as DeepSpeed 0.19.8 allocates it.

Legend: P parameters, N ranks, b bytes of a weight (2 or 4).
"""

import math
from typing import NamedTuple

from kto_ds.errors import UserError
from kto_ds.model.placement import GIB
from kto_ds.model.sizes import ModelSizes

MASTER_BYTES, MOMENT_BYTES, GRADIENT_BYTES = 4, 8, 4  # float32 master weight; two moments of Adam; gradients add up in float32


class Zero(NamedTuple):
    """What a DeepSpeed config decides of memory; sizes in elements."""

    stage: int
    reduce_bucket: int = 500_000_000
    overlaps: bool = True
    sub_group: int = 1_000_000_000
    persistent_below: int = 100_000
    offload_share: float = 0.0  # of the optimizer's states
    offloads_parameters: bool = False
    secondary_ranks: int = 1  # ZeRO++ hpZ: ranks that hold a second copy of the weights among them


class States(NamedTuple):
    """Bytes of one rank."""

    weights: int
    gradients: int
    optimizer: int  # master weights and moments
    host: int = 0  # of all these, what lies in host memory and is counted in none of the above


def read_zero(deepspeed_config: dict) -> Zero:
    """Return what the section zero_optimization says, DeepSpeed's defaults where it says nothing."""
    section = deepspeed_config.get("zero_optimization", {})
    given = {key: value for key, value in section.items() if value != "auto"}
    offload, parameters = given.get("offload_optimizer") or {}, given.get("offload_param") or {}
    default, stage = Zero(0), int(given.get("stage", 0))
    return Zero(
        stage=stage,
        reduce_bucket=int(given.get("reduce_bucket_size", default.reduce_bucket)) if given.get("contiguous_gradients", True) else 0,
        overlaps=bool(given.get("overlap_comm", stage == 3)),
        sub_group=int(given.get("sub_group_size", default.sub_group)),
        persistent_below=int(given.get("stage3_param_persistence_threshold", default.persistent_below)),
        offload_share=float(offload.get("ratio", 1.0)) if offload.get("device", "none") != "none" else 0.0,
        offloads_parameters=parameters.get("device", "none") != "none",
        secondary_ranks=int(given.get("zero_hpz_partition_size", default.secondary_ranks)),
    )


def state_bytes(sizes: ModelSizes, zero: Zero, weight_bytes: int, num_ranks: int) -> States:
    """Return the states of one of `num_ranks` ranks."""
    whole, trained = weight_bytes * (sizes.total + sizes.beside), sum(sizes.trainable)
    if zero.stage == 0:
        return States(whole, weight_bytes * trained, (MOMENT_BYTES + (MASTER_BYTES if weight_bytes == 2 else 0)) * trained)
    if zero.stage < 3:
        own = math.ceil(trained / num_ranks)
        gradients, optimizer = GRADIENT_BYTES * (trained if zero.stage == 1 else own), (MASTER_BYTES + MOMENT_BYTES) * own
        return States(whole, gradients, optimizer) if not zero.offload_share else States(whole, gradients, 0, host=optimizer + GRADIENT_BYTES * own)
    weights = weight_bytes * (sum(math.ceil(numel / num_ranks) for numel in sizes.parameters) + sizes.beside)
    copies = 0  # of small parameters, and for hpZ of all
    if num_ranks > 1:
        copies = weight_bytes * sum(numel for numel in sizes.parameters if numel <= zero.persistent_below)
    if zero.secondary_ranks > 1:
        copies += whole // zero.secondary_ranks
    own, resident = sum(sub_groups(sizes, zero, num_ranks)), sum(resident_groups(sizes, zero, num_ranks))
    gradients, host = GRADIENT_BYTES * own, 0
    if zero.offload_share:
        # The partition of gradients lies in host memory as a whole; of what stays on the device, DeepSpeed keeps another float32 gradient there.
        host = gradients + (MASTER_BYTES + MOMENT_BYTES + GRADIENT_BYTES) * (own - resident)
        gradients = GRADIENT_BYTES * resident
    if zero.offloads_parameters:
        host, weights = host + weights, 0
    return States(weights + copies, gradients, (MASTER_BYTES + MOMENT_BYTES) * resident, host)


def sub_groups(sizes: ModelSizes, zero: Zero, num_ranks: int) -> list[int]:
    """Return the elements of a rank's sub-groups, as stage 3 forms them: whole parameters in their order, until there are enough."""
    groups = [0]
    for numel in sizes.trainable:
        if groups[-1] >= zero.sub_group:
            groups.append(0)
        groups[-1] += math.ceil(numel / num_ranks)
    return groups


def resident_groups(sizes: ModelSizes, zero: Zero, num_ranks: int) -> list[int]:
    """Return the sub-groups whose optimizer stays on the device: the first ones, their number rounded down as DeepSpeed does."""
    groups = sub_groups(sizes, zero, num_ranks)
    return groups[: int((1 - zero.offload_share) * len(groups))]


def gathers(zero: Zero, num_ranks: int) -> bool:
    return zero.stage == 3 and num_ranks > 1  # a single rank uses its partition as it is


def require_room(sizes: ModelSizes, zero: Zero, weight_bytes: int, num_ranks: int, device_bytes: int) -> None:
    """Refuse a model that cannot be trained in `device_bytes` a rank, whatever the micro-batches are: its states and one gathered layer are more. Nothing is refused that could run."""
    states = state_bytes(sizes, zero, weight_bytes, num_ranks)
    needed = states.weights + states.gradients + states.optimizer + (sizes.layer * weight_bytes if gathers(zero, num_ranks) else 0)
    if needed > device_bytes:
        what = f"{sizes.total:,} parameters take at least {needed / GIB:.1f} GiB on each of {num_ranks} ranks, and a device has {device_bytes / GIB:.1f}"
        raise UserError(what, where="deepspeed.config", remedy="take more GPUs, or a config that partitions or offloads more; kto-ds plan shows what fits")


def require_partial_offload(sizes: ModelSizes, zero: Zero, num_ranks: int) -> None:
    """Refuse a share that is to stay on the device and comes to no whole sub-group: DeepSpeed would offload everything, in silence."""
    if 0 < zero.offload_share < 1 and not resident_groups(sizes, zero, num_ranks):
        found = len(sub_groups(sizes, zero, num_ranks))
        what = f"zero_optimization.offload_optimizer.ratio = {zero.offload_share:g}: a rank of {num_ranks} has {found} sub-groups, of which none would stay on the device"
        raise UserError(what, where="deepspeed.config", remedy="lower zero_optimization.sub_group_size, best to a tenth of a rank's parameters, or leave ratio out")


def offloaded_parameters(sizes: ModelSizes, zero: Zero, num_ranks: int) -> int:
    """Return how many parameters, over all ranks, are updated in host memory."""
    if not zero.offload_share:
        return 0
    return num_ranks * (sum(sub_groups(sizes, zero, num_ranks)) - sum(resident_groups(sizes, zero, num_ranks)))


def checkpoint_bytes(sizes: ModelSizes, zero: Zero, weight_bytes: int) -> int:
    """Return what one checkpoint takes on disk, all ranks together: master weights and moments, and below stage 3 the weights."""
    trained = sum(sizes.trainable)
    masters = MASTER_BYTES if zero.stage or weight_bytes == 2 else 0
    return trained * (masters + MOMENT_BYTES) + (sizes.total * weight_bytes if zero.stage < 3 else 0)
