"""Measure the head: ours with chunks of several sizes, Liger's fused scaled cross entropy, and all logits at once.

    python tools/bench_head.py                 # on a CUDA device, in bfloat16, the head of a 32B model
    python tools/bench_head.py --smoke         # tiny, in float32 on the CPU, to see that all of this runs

Legend: C scored tokens, D hidden size, V vocabulary. The weight is [V, D], hidden states are [C, D]. Prints a Markdown table.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
from benchmarks.page import command_line
from torch import Tensor

from kto_ds.model.logprobs import DEVICE_CHUNK_BYTES, ChunkedLogprobs

MIB = 1 << 20
WARM_UP = 1  # repeats that do not count

Head = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden [C, D], weight [V, D], targets [C] -> log-probs [C]


class Sample(NamedTuple):
    hidden: Tensor  # [C, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [C] int64
    upstream: Tensor  # [C] float32, gradient of the log-probs


class Found(NamedTuple):
    forward_seconds: float  # without gradients
    both_seconds: float  # forward and backward
    peak_bytes: int | None  # of both, beside the sample; None where the device does not count
    errors: tuple[float, float, float]  # log-probs, largest absolute; gradients of hidden states and weight, of their norms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=5120)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--chunk_mib", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048], help="float32 logits of one chunk of ours")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    smoke = options.smoke or not torch.cuda.is_available()
    if smoke:
        options.tokens, options.hidden, options.vocab, options.chunk_mib, options.repeats = 64, 32, 1009, [1], 2
        print(f"{'smoke form' if options.smoke else 'no CUDA device, hence the smoke form'}: tiny, in float32 on the CPU; its speeds say nothing", flush=True)
    device, dtype = (torch.device("cpu"), torch.float32) if smoke else (torch.device("cuda", 0), torch.bfloat16)
    print(bench_head(make_sample(options, device, dtype), options.chunk_mib, options.repeats))


def make_sample(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Sample:
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=device)  # noqa: E731
    targets = torch.randint(options.vocab, (options.tokens,), generator=generator, device=device)
    # As behind a last norm: hidden states of size 1, logits of a few units.
    return Sample(draw(options.tokens, options.hidden).to(dtype), (0.02 * draw(options.vocab, options.hidden)).to(dtype), targets, draw(options.tokens))


def bench_head(sample: Sample, chunk_mib: list[int], repeats: int) -> str:
    oracle = run_both(naive if sample.hidden.device.type == "cpu" else ours(DEVICE_CHUNK_BYTES), sample, torch.float32)
    heads = {f"ours, {mib} MiB{' (default)' if mib * MIB == DEVICE_CHUNK_BYTES else ''}": ours(mib * MIB) for mib in chunk_mib}
    if find_spec("liger_kernel"):
        heads |= {"Liger": liger, "Liger, in torch": liger_in_torch}
    heads["all logits"] = naive
    found = {}
    for name, head in heads.items():
        try:
            found[name] = measure(head, sample, oracle, repeats)
        except (torch.OutOfMemoryError, ImportError) as error:
            print(f"{name}: left out: {str(error).splitlines()[0]}", flush=True)
    return describe(found, sample, repeats)


def ours(chunk_bytes: int) -> Head:
    return lambda hidden, weight, targets: ChunkedLogprobs.apply(hidden, weight, targets, max(1, chunk_bytes // (4 * len(weight))))


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets)


def liger_in_torch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same where Liger has no kernel for the device: on a Hopper GPU its kernel wants a package besides, nvidia-cutlass-dsl."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import _FusedLinearPPOFallbackFunction

    return -_FusedLinearPPOFallbackFunction.apply(hidden, weight, targets, 1.0, -100, False)


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax((hidden @ weight.T).float(), dim=-1).gather(1, targets[:, None]).squeeze(1)


def run_both(head: Head, sample: Sample, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return (log-probs, gradient of the hidden states, of the weight)."""
    hidden, weight = (tensor.detach().to(dtype).requires_grad_() for tensor in (sample.hidden, sample.weight))
    logps = head(hidden, weight, sample.targets)
    return logps.detach(), *torch.autograd.grad(logps, (hidden, weight), sample.upstream)


def measure(head: Head, sample: Sample, oracle: tuple[Tensor, Tensor, Tensor], repeats: int) -> Found:
    on_cuda = sample.hidden.is_cuda
    forward, both = [], []
    with torch.no_grad():
        for _ in range(WARM_UP + repeats):
            forward.append(seconds(lambda: head(sample.hidden, sample.weight, sample.targets), on_cuda))
    before = 0
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for _ in range(WARM_UP + repeats):
        both.append(seconds(lambda: run_both(head, sample, sample.hidden.dtype), on_cuda))
    peak = torch.cuda.max_memory_allocated() - before if on_cuda else None
    logps, *gradients = run_both(head, sample, sample.hidden.dtype)
    errors = [float((logps - oracle[0]).abs().max())] + [float((one.float() - other).norm() / other.norm()) for one, other in zip(gradients, oracle[1:])]
    return Found(statistics.median(forward[WARM_UP:]), statistics.median(both[WARM_UP:]), peak, tuple(errors))


def seconds(work: Callable[[], object], on_cuda: bool) -> float:
    synchronize = torch.cuda.synchronize if on_cuda else lambda: None
    synchronize()
    began = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - began


def describe(found: dict[str, Found], sample: Sample, repeats: int) -> str:
    (num_tokens, hidden_size), vocab_size = sample.hidden.shape, len(sample.weight)
    product = 2 * num_tokens * hidden_size * vocab_size  # floating-point operations of one
    device = torch.cuda.get_device_name(sample.hidden.device) if sample.hidden.is_cuda else "CPU"
    rows = [
        f"| {name} | {num_tokens / one.forward_seconds:,.0f} | {product / one.forward_seconds / 1e12:.3g} | {num_tokens / one.both_seconds:,.0f} | "
        f"{3 * product / one.both_seconds / 1e12:.3g} | {'' if one.peak_bytes is None else f'{one.peak_bytes / MIB:,.0f}'} | {' | '.join(f'{error:.1e}' for error in one.errors)} |"
        for name, one in found.items()
    ]
    return f"""{command_line()}, {device}, torch {torch.__version__}, {sample.hidden.dtype}

C = {num_tokens:,}, D = {hidden_size:,}, V = {vocab_size:,}; medians of {repeats}. TFLOP/s counts 2CDV for a forward and 6CDV for both, logits that are computed again not at all.
Memory is what both add to the sample at their peak. Errors: log-probs, the largest; gradients, of their norms; against float32.

| head | forward, tokens/s | TFLOP/s | both, tokens/s | TFLOP/s | MiB | log-probs | hidden | weight |
|---|---:|---:|---:|---:|---:|---:|---:|---:|
{chr(10).join(rows)}
"""


if __name__ == "__main__":
    main()
