"""Memory of one rank in training, as a formula: no weights, no device, no DeepSpeed. docs/plan.md derives it and compares it with what was measured.

What stays for the whole run (states, buckets) is counted exactly. On top of it comes the highest of a few moments of a step, each a sum of what is alive then.

Legend: P parameters, N ranks, T tokens of a micro-batch, C of these that are scored, b bytes of a weight (2 or 4).
"""

import math
from typing import Literal, NamedTuple

from kto_ds.model.logprobs import CPU_CHUNK_BYTES, DEVICE_CHUNK_BYTES
from kto_ds.model.sizes import LayerWidths, ModelSizes
from kto_ds.model.states import GRADIENT_BYTES, Zero, gathers, resident_groups, state_bytes

# CUDA's own memory and the kernels' code, of every process; and with several ranks NCCL's channels. Neither is torch's, so its counters do not show it.
CONTEXT_BYTES, COLLECTIVES_BYTES = 600 << 20, 1800 << 20
# Of what comes and goes in a step; states and buckets are few blocks that stay.
FRAGMENTATION = 0.05
FLOAT32_BYTES, FLOAT64_BYTES = 4, 8


class Load(NamedTuple):
    """How the model is run."""

    tokens: int  # T of a forward and backward
    scored_tokens: int  # C of it
    scoring_tokens: int  # T of a forward without gradients
    weight_bytes: int  # b
    checkpoint_every: int  # decoder layers to one whose activations are not kept; 0: all are kept
    offloads_checkpoints: bool = False
    kernels: Literal["liger", "torch"] = "liger"
    device: Literal["cuda", "cpu"] = "cuda"
    keys_per_token: float = 1.0  # keys and values that attention reads, where completions share prompts


class Memory(NamedTuple):
    """Bytes of one rank at the highest moment of a run, by part."""

    weights: int
    gradients: int
    optimizer: int  # master weights and moments
    buckets: int
    gathered: int
    activations: int
    head: int
    update: int  # temporary: gradients on their way into partitions, the optimizer's copies
    context: int
    fragmentation: int

    @property
    def allocated(self) -> int:
        """What torch counts as allocated."""
        return sum(self) - self.context - self.fragmentation

    @property
    def states(self) -> int:
        return self.weights + self.gradients + self.optimizer


class Moment(NamedTuple):
    """What is alive beside states and buckets at one time of a step."""

    name: str
    gathered: int = 0
    activations: int = 0
    head: int = 0
    update: int = 0


class Peak(NamedTuple):
    memory: Memory
    moment: str  # when
    host_bytes: int  # of this rank's states that lie in host memory


def peak_memory(sizes: ModelSizes, zero: Zero, load: Load, num_ranks: int) -> Peak:
    """Return the memory of one of `num_ranks` ranks at the highest moment of training."""
    states = state_bytes(sizes, zero, load.weight_bytes, num_ranks)
    moments = [
        moment(sizes, zero, load, num_ranks) for moment in (_head_moment, _layer_moment, _reduction_moment, _embedding_moment, _update_moment, _scoring_moment)
    ]  # fmt: skip
    name, *passing = max(moments, key=lambda moment: sum(moment[1:]))
    context = CONTEXT_BYTES + (COLLECTIVES_BYTES if num_ranks > 1 else 0)
    memory = Memory(states.weights, states.gradients, states.optimizer, _bucket_bytes(zero, load), *passing, context, round(FRAGMENTATION * sum(passing)))
    return Peak(memory, name, states.host)


def _bucket_bytes(zero: Zero, load: Load) -> int:
    """Gradients on their way to other ranks; below stage 3 a second bucket fills while the first is sent. Stage 1 in bfloat16 is an optimizer without."""
    if zero.stage == 0 or (zero.stage == 1 and load.weight_bytes == 2):
        return 0
    return zero.reduce_bucket * load.weight_bytes * (2 if zero.stage < 3 and zero.overlaps else 1)


def _two_layers(sizes: ModelSizes, zero: Zero, load: Load, num_ranks: int) -> int:
    """The layer at work and the one that is gathered ahead."""
    return 2 * sizes.layer * load.weight_bytes if gathers(zero, num_ranks) else 0


def _kept_per_token(widths: LayerWidths, load: Load) -> float:
    """Return the bytes that one layer keeps of a token for its backward, its input left out."""
    b, hidden, query, key, inner = load.weight_bytes, widths.hidden, widths.query, widths.key, widths.inner
    keys = 2 * key * load.keys_per_token
    attention = 2 * query + keys + (query + key if widths.has_query_norm else 0)
    if load.kernels == "liger":  # norms keep their input, which is there anyway; the MLP two inputs and their product
        return b * (hidden + 2 * hidden + attention + 3 * inner)
    # transformers' norms go through float32; the MLP keeps the activated input besides, and attention's parts are joined.
    normed = 2 * hidden + (query + key if widths.has_query_norm else 0)
    norms = b * 2 * hidden + normed * (b if b == 4 else b + FLOAT32_BYTES)
    return norms + b * (hidden + attention + query + 4 * inner)


def _layer_transient_per_token(widths: LayerWidths, load: Load) -> float:
    """Return the bytes of a token that a layer's backward adds at its widest place, the MLP."""
    return load.weight_bytes * (2 * widths.hidden + (1 if load.kernels == "liger" else 2) * widths.inner)


def _stored(sizes: ModelSizes, load: Load) -> list[float]:
    """Return the bytes per token that every layer leaves for the backward, in the layers' order."""
    input_bytes, kept = load.weight_bytes * sizes.widths.hidden, _kept_per_token(sizes.widths, load)
    stored = []
    for number in range(len(sizes.layers)):
        is_checkpointed = load.checkpoint_every and number % load.checkpoint_every == 0
        waits_on_host = is_checkpointed and load.offloads_checkpoints and number < len(sizes.layers) - 2
        stored.append((0 if waits_on_host else input_bytes) + (0 if is_checkpointed else kept))
    return stored


def _head_bytes(sizes: ModelSizes, load: Load) -> int:
    """Return what the head takes in its backward: a chunk of logits and their gradient, the weight's gradient in float32 and as it is handed on."""
    b, on_cpu = load.weight_bytes, load.device == "cpu"
    logits = min(CPU_CHUNK_BYTES if on_cpu else DEVICE_CHUNK_BYTES, FLOAT32_BYTES * load.scored_tokens * sizes.vocab)
    gradient = sizes.head * sizes.trains_head
    if b == 4:
        return logits + FLOAT32_BYTES * gradient
    if on_cpu:  # where products of bfloat16 do not add to float32: weight and product in float32 besides
        return round(1.5 * logits) + FLOAT32_BYTES * sizes.head + (2 * FLOAT32_BYTES + b) * gradient
    return round(1.5 * logits) + (FLOAT32_BYTES + b) * gradient


def _head_moment(sizes: ModelSizes, zero: Zero, load: Load, num_ranks: int) -> Moment:
    hidden = load.weight_bytes * sizes.widths.hidden
    gathered = _two_layers(sizes, zero, load, num_ranks) + (sizes.head * load.weight_bytes if gathers(zero, num_ranks) else 0)
    activations = load.tokens * (sum(_stored(sizes, load)) + hidden) + 2 * load.scored_tokens * hidden
    return Moment("head, backward", gathered, round(activations), _head_bytes(sizes, load))


def _layer_moment(sizes: ModelSizes, zero: Zero, load: Load, num_ranks: int) -> Moment:
    """The MLP of the costliest layer in backward, its activations there again."""
    b, widths = load.weight_bytes, sizes.widths
    working = b * widths.hidden + _kept_per_token(widths, load) + _layer_transient_per_token(widths, load)
    gradient = round(b * sizes.trained_share * min(sizes.layer, widths.hidden * widths.inner))
    gathered = _gathered_and_copied(sizes, zero, load, num_ranks)
    return Moment("decoder layer, backward", gathered, round(load.tokens * (_stored_below(sizes, load) + working)), _pending_bytes(sizes, load), gradient)


def _reduction_moment(sizes: ModelSizes, zero: Zero, load: Load, num_ranks: int) -> Moment:
    """A layer's gradients are all there, and those of a full bucket, of the layers before it, are put in order and cut into partitions."""
    b, layers = load.weight_bytes, len(sizes.layers)
    flushed = min(zero.reduce_bucket, round(sizes.trained_share * sum(sizes.layers))) if zero.stage >= 2 else 0
    reduction = b * flushed + (GRADIENT_BYTES * flushed // num_ranks if b == 2 else 0)
    done = flushed // max(1, sizes.layer)  # layers whose activations are gone by then
    gathered, stored = _gathered_and_copied(sizes, zero, load, num_ranks), sum(_stored(sizes, load)[: max(0, layers - done - 1)])
    activations = round(load.tokens * (stored + 2 * b * sizes.widths.hidden))
    gradients = round(b * sizes.trained_share * sizes.layer)
    return Moment("gradients of a layer, reduced", gathered, activations, _pending_bytes(sizes, load), gradients + reduction)


def _stored_below(sizes: ModelSizes, load: Load) -> float:
    """Return the bytes per token that all layers but the last have left."""
    return sum(_stored(sizes, load)[:-1])


def _gathered_and_copied(sizes: ModelSizes, zero: Zero, load: Load, num_ranks: int) -> int:
    """A layer that arrives is copied once, from the buffer of its collective."""
    return _two_layers(sizes, zero, load, num_ranks) * 3 // 2


def _pending_bytes(sizes: ModelSizes, load: Load) -> int:
    """The head's part of a tied embedding's gradient waits for the other part, which comes last."""
    return sizes.head * load.weight_bytes if sizes.is_tied and sizes.trains_head else 0


def _embedding_moment(sizes: ModelSizes, zero: Zero, load: Load, num_ranks: int) -> Moment:
    b = load.weight_bytes
    trained = sizes.embedding * sizes.trains_head
    gradient = b * trained * (2 if sizes.is_tied else 1)
    partition = GRADIENT_BYTES * trained // num_ranks if b == 2 and zero.stage >= 2 else 0
    gathered = _two_layers(sizes, zero, load, num_ranks) + (sizes.embedding * b if gathers(zero, num_ranks) else 0)
    return Moment("embedding, backward", gathered, load.tokens * b * sizes.widths.hidden, 0, gradient + partition)


def _update_moment(sizes: ModelSizes, zero: Zero, load: Load, num_ranks: int) -> Moment:
    """The norm of a parameter's gradient is taken in float64; then a sub-group's gradients are joined."""
    b = load.weight_bytes
    if zero.stage < 3:
        trained = sum(sizes.trainable)
        own = trained if zero.stage == 0 else math.ceil(trained / num_ranks)
        return Moment("update", update=0 if zero.stage == 1 and b == 2 else FLOAT32_BYTES * own)
    resident = max(resident_groups(sizes, zero, num_ranks), default=0)
    # One that is offloaded in part is not fused on the device either, and has its gradients there already.
    copies = 2 if zero.offload_share else 3 if load.device == "cpu" else 1
    norm = 0 if zero.offload_share else FLOAT64_BYTES * math.ceil(max(sizes.trainable, default=0) / num_ranks)
    return Moment("update", update=max(FLOAT32_BYTES * copies * resident, norm))


def _scoring_moment(sizes: ModelSizes, zero: Zero, load: Load, num_ranks: int) -> Moment:
    """A forward that keeps nothing: one layer's MLP, or the head's logits."""
    widths, b = sizes.widths, load.weight_bytes
    gathered = _two_layers(sizes, zero, load, num_ranks) + (max(sizes.layer, sizes.head) * b if gathers(zero, num_ranks) else 0)
    inner = (3 if load.kernels == "liger" else 4) * widths.inner
    return Moment("scoring", gathered, load.scoring_tokens * b * (3 * widths.hidden + inner))
