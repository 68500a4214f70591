"""Activation checkpointing: which decoder layers run again in backward, and where their inputs wait until then.

Checkpoints are never reentrant. Elsewhere the reentrant kind is chosen for ZeRO-3; and with LoRA it needs inputs that are made to require a
gradient, as frozen embeddings give none. Here neither needs it (leaf modules do: runtime/engine.py). On 2 ranks under ZeRO-3, weights partitioned and gathered, the gradients were those without
checkpoints to the bit, with decoder layers as leaf modules too, for every layer and every second, with and without offload, and no parameter
trace was thrown away; tests/distributed/test_split_invariance.py watches over one of these.
"""

import weakref
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from kto_ds.config import ModelConfig
from kto_ds.errors import UserError
from kto_ds.model.policy import decoder_layers


def checkpoint_layers(lm: PreTrainedModel, *, every: int, offload: bool) -> None:
    """Have the first of every `every` decoder layers keep its input only; with `offload` that input waits in host memory."""
    layers = decoder_layers(lm)
    if not layers:
        raise UserError(f"{type(lm).__name__} has no layers that can be checkpointed", where="model.gradient_checkpointing", remedy="set model.gradient_checkpointing: false")
    # Dropout is off, so there is no random state to bring back.
    run = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    run = partial(_run_offloaded, HostMemory(), run) if offload else run
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number % every == 0
        layer._gradient_checkpointing_func = run


def checkpointed_share(model: ModelConfig) -> float:
    """Return the share of the decoder layers that run again in backward, as it is in a deep model."""
    return 1 / model.gradient_checkpointing_every if model.gradient_checkpointing else 0.0


def in_words(model: ModelConfig) -> str:
    if not model.gradient_checkpointing:
        return "no activation checkpointing"
    which = "every layer" if model.gradient_checkpointing_every == 1 else f"one layer in {model.gradient_checkpointing_every}"
    return f"activations of {which} checkpointed{', in host memory' if model.gradient_checkpointing_offload else ''}"


def _run_offloaded(memory: "HostMemory", run, layer, *inputs):
    # checkpoint saves the inputs under these hooks, and the layer itself under hooks of its own: no weight ever gets here, whose tensor
    # ZeRO-3 must be able to empty and fill again.
    with saved_tensors_hooks(memory.pack, memory.unpack):
        return run(layer, *inputs)


class Waiting:
    """A tensor in host memory, and the one that was put there before it, which backward will want next."""

    def __init__(self, host: Tensor, device: torch.device, previous: weakref.ref | None):
        self.host = host
        self.device = device
        self.previous = previous  # weak: a graph that is dropped frees what waits for it
        self.fetched: tuple[Tensor, torch.cuda.Event] | None = None  # on its way back, or there


class HostMemory:
    """Hooks for autograd that keep saved tensors in host memory, pinned on CUDA.

    On CUDA both ways are copies on a stream of their own, beside the layers: a layer's input leaves while the layer runs, and comes back while
    the layer behind it runs backward. All device memory belongs to the stream of the layers and is held until that stream has waited
    for the copy; record_stream would instead let the host run ahead, and with it the memory of the layers it has queued.
    """

    def __init__(self):
        self.copies: torch.cuda.Stream | None = None
        self.leaving: tuple[Tensor, torch.cuda.Event] | None = None  # the last input that was sent away
        self.latest: weakref.ref | None = None

    def pack(self, tensor: Tensor) -> Waiting | Tensor:
        if not tensor.numel():  # some versions of torch save an empty one beside the inputs
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        if tensor.is_cuda:
            self._let_go()
            self.leaving = tensor, self._copy(host, tensor)
        else:
            host.copy_(tensor)
        waiting = Waiting(host, tensor.device, self.latest)
        self.latest = weakref.ref(waiting)
        return waiting

    def unpack(self, waiting: Waiting | Tensor) -> Tensor:
        if isinstance(waiting, Tensor):
            return waiting
        if waiting.device.type != "cuda":
            return waiting.host
        self._let_go()
        self._fetch(waiting)
        tensor, arrived = waiting.fetched
        waiting.fetched = None
        torch.cuda.current_stream().wait_event(arrived)
        before = waiting.previous and waiting.previous()
        if before is not None:
            self._fetch(before)
        return tensor

    def _fetch(self, waiting: Waiting) -> None:
        if waiting.fetched is None:
            tensor = torch.empty_like(waiting.host, device=waiting.device)
            waiting.fetched = tensor, self._copy(tensor, waiting.host)

    def _copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        """Begin the copy once the current stream has got here; it never waits for the copy unless told to."""
        self.copies = self.copies or torch.cuda.Stream()
        self.copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.copies):
            target.copy_(source, non_blocking=True)
            return self.copies.record_event()

    def _let_go(self) -> None:
        if self.leaving:
            torch.cuda.current_stream().wait_event(self.leaving[1])  # a layer ago: the copy has long been done
            self.leaving = None
