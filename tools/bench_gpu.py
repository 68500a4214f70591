"""Measure kto_ds on one CUDA device, on models of public shapes with random weights, and write the table of docs/benchmarks/h200.md.

    python tools/bench_gpu.py precompute --shape qwen3-4b qwen3-32b --write

`precompute` times the scoring of reference log-probs. The model is made on the device itself, without files; everything else is the library's own: tokens
go through its dataset artefact (mismatched pairs, limits), its plan of shards, its batches, its Policy. What is timed is told in docs/benchmarks/h200.md.

The smoke form, `--smoke` or wherever there is no CUDA device, scores a few micro-batches with a tiny float32 model on the CPU. It gives no figures.
Both forms first check that a model made in this way gives the log-probs of one that transformers makes itself.
"""

import argparse
import copy
import gc
import platform
import re
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

import kto_ds
from kto_ds.config import BatchConfig, DataConfig, ModelConfig, ReferenceConfig
from kto_ds.data.assemble import Grouping, index_split, read_index, save_split
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.packing import Layout, Unit
from kto_ds.data.reference_work import Task, plan_shards, wanted_pairs
from kto_ds.data.segments import Limits, Row, make_segment, save_segment
from kto_ds.data.tokenization import RowTokens
from kto_ds.errors import UserError
from kto_ds.model.attention import KERNELS, register_attention
from kto_ds.model.placement import GIB, Placement, working_bytes
from kto_ds.model.policy import Policy
from kto_ds.model.scoring import Serving, choose_serving, score
from kto_ds.model.support import DTYPES
from kto_ds.runtime.collectives import World
from kto_ds.stages.precompute_ref import Way, score_shard

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "h200.md"
SEED = 0
MAX_LENGTH = 2048
# Lengths in the manner of UltraFeedback: (median in tokens, standard deviation of the logarithm) of a lognormal distribution.
PROMPT_TOKENS, COMPLETION_TOKENS = (180, 0.9), (260, 0.7)
SHARED_PROMPTS = 1 / 3  # of the prompts have two rows, the others one
WARM_UP = 2  # micro-batches
PEAK_TFLOPS = 989  # of an H100 or H200 SXM by its datasheet: dense bfloat16
# Of a token's log-prob, for two models with the same float32 weights; a GPU's kernels may add up in other orders. A mistake changes some by 1e-2.
TOLERANCE = {"cpu": 1e-6, "cuda": 1e-5}

ROPE = {"rope_type": "default", "rope_theta": 1e6}
QWEN3 = {"vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40_960, "rope_parameters": ROPE}
SHAPES = {
    "qwen3-4b": {**QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32, "tie_word_embeddings": True},
    "qwen3-32b": {**QWEN3, "hidden_size": 5120, "intermediate_size": 25_600, "num_hidden_layers": 64, "num_attention_heads": 64, "tie_word_embeddings": False},
}
TINY = {
    **QWEN3, "vocab_size": 503, "num_key_value_heads": 2, "head_dim": 16,
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": True,
}  # fmt: skip
TARGETS = {"qwen3-4b": 55_000, "qwen3-32b": 7_500}  # tokens/s


class Run(NamedTuple):
    """One shape on one device."""

    name: str
    config: Qwen3Config
    model: ModelConfig  # its dtype, attention and layout; there is no folder
    device: torch.device
    max_tokens: int


class Found(NamedTuple):
    """What was scored in the time that was measured."""

    run: Run
    serving: Serving
    tasks: list[Task]
    seconds: float
    flops: float
    unshared_tokens: int  # had every pair brought its own prompt
    weight_bytes: int
    peak_bytes: int | None  # None where the device does not count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    precompute = commands.add_parser("precompute", help="reference log-probs", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    precompute.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES), help="one after the other")
    precompute.add_argument("--max_tokens_per_microbatch", type=int, default=ReferenceConfig().max_tokens_per_microbatch)
    precompute.add_argument("--seconds", type=float, default=30, help="to measure each shape for; the shard that is being scored then is finished")
    precompute.add_argument("--attention", default="auto", choices=["auto", *KERNELS], help="as model.attention")
    precompute.add_argument("--layout", default="prefix_shared", choices=get_args(Layout), help="as model.layout")
    precompute.add_argument("--num_prompts", type=int, default=8192, help="distinct prompts of the synthetic rows, more than can be scored meanwhile")
    precompute.add_argument("--smoke", action="store_true", help="a tiny float32 model on the CPU, to see that all of this runs")
    precompute.add_argument("--write", action="store_true", help="write the table to docs/benchmarks/h200.md")
    options = parser.parse_args()
    smoke = options.smoke or not torch.cuda.is_available()
    if smoke and options.write:
        raise SystemExit("--write: the smoke form gives no figures; leave it out, or run this where there is a CUDA device, without --smoke")
    around = around_markers(PAGE, "precompute-ref") if options.write else None
    if smoke:
        print(f"{'smoke form' if options.smoke else 'no CUDA device, hence the smoke form'}: a tiny float32 model on the CPU; its speeds say nothing", flush=True)
    try:
        text = bench_precompute(options, smoke)
    except UserError as error:
        raise SystemExit(str(error)) from None
    print(text)
    if around:
        PAGE.write_text(text.join(around), encoding="utf-8")


def around_markers(path: Path, name: str) -> tuple[str, str]:
    """Return what a Markdown file has up to the comment `<!-- name:begin -->` and from `<!-- name:end -->` on. A missing one must show before the measurement."""
    found = re.fullmatch(f"(.*<!-- {name}:begin -->\n).*(<!-- {name}:end -->.*)", path.read_text(encoding="utf-8") if path.is_file() else "", re.DOTALL)
    if not found:
        raise SystemExit(f"{path.name} needs the lines <!-- {name}:begin --> and <!-- {name}:end -->")
    return found[1], found[2]


def bench_precompute(options: argparse.Namespace, smoke: bool) -> str:
    device = torch.device("cpu") if smoke else torch.device("cuda", 0)
    num_prompts, max_tokens = (64, 4096) if smoke else (options.num_prompts, options.max_tokens_per_microbatch)
    model = ModelConfig(path="random", dtype="float32" if smoke else "bfloat16", attention=options.attention, layout=options.layout)
    shapes = {"tiny": TINY} if smoke else {name: SHAPES[name] for name in options.shape}
    with tempfile.TemporaryDirectory() as folder:
        difference = check_making(device, make_split(Path(folder) / "check", 8, TINY["vocab_size"]))
        print(f"a model made here and one that transformers makes, equal weights: their log-probs differ by at most {difference:.1e} of a token's", flush=True)
        split = make_split(Path(folder) / "rows", num_prompts, (TINY if smoke else QWEN3)["vocab_size"])
        return describe([measure(Run(name, Qwen3Config(**shape), model, device, max_tokens), split, options.seconds) for name, shape in shapes.items()], split)


def make_lm(config: Qwen3Config, dtype: torch.dtype, device: torch.device, *, attention: str) -> PreTrainedModel:
    """Return a model with seeded random weights, made where it will be used: a 32B one would take 65 GB of disk as files."""
    with torch.device("meta"):
        # A model keeps the config that it is given, and the name of its attention in it.
        lm = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=attention)
    lm.to_empty(device=device)
    lm.tie_weights()  # on its way from meta every module got a parameter of its own
    # No state dict holds these, and what is there now is whatever lay in that memory.
    lm.base_model.rotary_emb = type(lm.base_model.rotary_emb)(config).to(device)
    assert all("rotary_emb" in name for name, _ in lm.named_buffers()), "a buffer that nobody has filled"
    generator = torch.Generator(device).manual_seed(SEED)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.fill_(1) if parameter.dim() == 1 else parameter.normal_(0, 0.02, generator=generator)  # Qwen3's only vectors are norms
    return lm


def make_policy(run: Run, serving: Serving) -> Policy:
    """Return the model as load_policy and load_scorer do, but for the reading."""
    attention = register_attention(serving.backend) if serving.layout != "padded" else "sdpa"
    return Policy(make_lm(run.config, DTYPES[run.model.dtype], run.device, attention=attention)).eval()


@torch.no_grad()
def check_making(device: torch.device, split: TokenizedSplit) -> float:
    """Return by how much of its value a token's log-prob differs at most from that of equal weights in a model of transformers' own making.

    SystemExit when it is more than TOLERANCE: rotary buffers or tied weights went wrong on the way from meta.
    """
    largest = 0.0
    for tied in (True, False):
        run = Run("check", Qwen3Config(**{**TINY, "tie_word_embeddings": tied}), ModelConfig(path="random", dtype="float32"), device, 8192)
        policy = make_policy(run, Serving("prefix_shared", "sdpa", ""))
        plain = AutoModelForCausalLM.from_config(copy.deepcopy(run.config), dtype=torch.float32, attn_implementation="eager").to(device).eval()
        plain.load_state_dict(policy.lm.state_dict())
        shards = plan_shards({"": split}, wanted_pairs({"": split}, "kto"), layout="prefix_shared", max_tokens=run.max_tokens)
        for task in (task for shard in shards for task in shard):
            found = score(policy, task.micro_batch, split, layout="prefix_shared", device=device, per_token=True)
            wanted = torch.cat([plain_logps(plain, split, pair) for pair in found.pairs.tolist()])
            largest = max(largest, ((found.token_logps - wanted) / wanted).abs().max().item())
    if not largest <= TOLERANCE[device.type]:
        raise SystemExit(f"the log-probs of a model made here differ by {largest:.1e} from those of the same weights elsewhere; nothing is measured")
    return largest


def plain_logps(plain: nn.Module, split: TokenizedSplit, pair: int) -> Tensor:
    """Return the log-probs of a pair's completion tokens, by transformers alone: [completion tokens]."""
    prompt, completion = split.prompt(split.pair_prompts[pair]), split.completion(pair)
    ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64)).to(next(plain.parameters()).device)
    logps = plain(ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
    return logps.gather(1, ids[1:, None]).squeeze(1)[len(prompt) - 1 :]


def make_split(folder: Path, num_prompts: int, vocab_size: int) -> TokenizedSplit:
    """Return the artefact of synthetic unpaired rows, by the way that prepare goes after tokenization, with the defaults of a config."""
    rng = np.random.default_rng(SEED)
    rows = []
    for _ in range(num_prompts):
        prompt = draw(rng, PROMPT_TOKENS, vocab_size)
        for _ in range(1 + (rng.random() < SHARED_PROMPTS)):
            rows.append(Row(RowTokens(prompt, draw(rng, COMPLETION_TOKENS, vocab_size), False, False), len(rows) + 1, bool(rng.random() < 0.5), False))
    segment, _ = make_segment(rows, Limits(MAX_LENGTH))  # a prompt that leaves no room is dropped, as prepare does
    folder.mkdir()
    segments = [(0, folder / "segment.npz")]
    save_segment(segments[0][1], segment, {})
    grouping = Grouping(MAX_LENGTH, DataConfig.model_fields["kl_group_size"].default, BatchConfig().global_batch_size, True, SEED)
    save_split(index_split(read_index(segments), grouping, where="data.train"), segments, ["synthetic:"], folder / "train")
    return TokenizedSplit.load(folder / "train")


def draw(rng: np.random.Generator, lengths: tuple[float, float], vocab_size: int) -> np.ndarray:
    median, deviation = lengths
    return rng.integers(0, vocab_size, max(1, round(rng.lognormal(np.log(median), deviation))), dtype=np.int32)


def measure(run: Run, split: TokenizedSplit, seconds: float) -> Found:
    """Score shards until `seconds` have passed, or all are done. Making the model, planning and the warm-up are not timed; making the batches is."""
    gc.collect()  # the model of the shape before this one
    on_cuda = run.device.type == "cuda"
    synchronize = torch.cuda.synchronize if on_cuda else lambda: None
    serving = choose_serving(run.model, run.config, run.device)
    policy = make_policy(run, serving)
    way = Way(policy, serving.layout, Placement("replica", "one device"), ReferenceConfig().per_token, World(0, 1, run.device))
    splits = {"train": split}
    shards = plan_shards(splits, wanted_pairs(splits, "kto"), layout=serving.layout, max_tokens=run.max_tokens)
    score_shard([task for shard in shards for task in shard][:WARM_UP], 0, splits, way, lambda tokens: None)
    tasks: list[Task] = []
    synchronize()
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    # The plan has the costliest micro-batches first; in another order a part of the shards stands for all.
    for number in np.random.default_rng(SEED).permutation(len(shards)):
        _, bad_rows = score_shard(shards[number], 0, splits, way, lambda tokens: None)
        if bad_rows:
            raise SystemExit(f"{run.name}: {len(bad_rows)} log-probs are not finite, or above 0")
        tasks += shards[number]
        if time.perf_counter() - began >= seconds:
            break
    synchronize()
    spent = time.perf_counter() - began
    print(f"{run.name}: {sum(task.tokens for task in tasks):,} tokens in {spent:.1f} s", flush=True)  # the next shape may not fit
    units = [unit for task in tasks for unit in task.micro_batch]
    return Found(
        run, serving, tasks, spent, count_flops(policy, run.config, units, split),
        unshared_tokens=sum(int(split.prompt_lengths[unit.prompt] + split.pair_lengths[pair]) for unit in units for pair in unit.pairs),
        weight_bytes=sum(parameter.nbytes for parameter in policy.parameters()),
        peak_bytes=torch.cuda.max_memory_allocated() if on_cuda else None,
    )  # fmt: skip


def count_flops(policy: Policy, config: Qwen3Config, units: list[Unit], split: TokenizedSplit) -> float:
    """Return the floating-point operations that the forwards of these units need, by the formula that `describe` writes out."""
    matrices = sum(parameter.numel() for name, parameter in policy.named_parameters() if ".layers." in name and parameter.dim() == 2)
    attended = completion_tokens = 0
    for unit in units:
        prompt, lengths = int(split.prompt_lengths[unit.prompt]), split.pair_lengths[list(unit.pairs)].astype(np.int64)
        attended += prompt * (prompt + 1) // 2 + int((lengths * prompt + lengths * (lengths + 1) // 2).sum())
        completion_tokens += int(lengths.sum())
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * attended
    return 2 * matrices * sum(unit.tokens for unit in units) + attention + 2 * config.vocab_size * config.hidden_size * completion_tokens


def describe(found: list[Found], split: TokenizedSplit) -> str:
    rows = {
        "**tokens/s**": lambda one: f"**{sum(task.tokens for task in one.tasks) / one.seconds:,.0f}**",
        "target, tokens/s": lambda one: f"{TARGETS[one.run.name]:,}" if one.run.name in TARGETS else "",
        "tokens/s as counted without sharing prompts": lambda one: f"{one.unshared_tokens / one.seconds:,.0f}",
        "pairs/s": lambda one: f"{sum(task.num_pairs for task in one.tasks) / one.seconds:,.1f}",
        "TFLOP/s": lambda one: f"{one.flops / one.seconds / 1e12:.3g}",
        f"of {PEAK_TFLOPS} TFLOP/s": lambda one: "" if one.peak_bytes is None else f"{one.flops / one.seconds / 1e12 / PEAK_TFLOPS:.1%}",
        "fill of micro-batches": lambda one: f"{sum(task.tokens for task in one.tasks) / (len(one.tasks) * one.run.max_tokens):.1%}",
        "memory at its peak": lambda one: "" if one.peak_bytes is None else f"{one.peak_bytes / GIB:.1f} GiB",
        "of this weights": lambda one: f"{one.weight_bytes / GIB:.1f} GiB",
        "the rest, as `reference.placement` estimates it": lambda one: f"{working_bytes(one.run.config, one.run.max_tokens, one.run.model.dtype) / GIB:.1f} GiB",
        "layout, attention": lambda one: f"{one.serving.layout}, {one.serving.backend}",
        "micro-batches, seconds": lambda one: f"{len(one.tasks):,}, {one.seconds:.1f}",
    }
    first, on_cuda = found[0].run, found[0].run.device.type == "cuda"
    notice = "" if on_cuda else "\nSmoke form: it ran, and none of this is a measurement.\n"
    device = torch.cuda.get_device_name(first.device) if on_cuda else f"CPU ({platform.machine()})"
    table = [f"| {what} | " + " | ".join(cell(one) for one in found) + " |" for what, cell in rows.items()]
    libraries = f"torch {torch.__version__}, transformers {version('transformers')}, kto_ds {kto_ds.__version__}, Python {platform.python_version()}"
    return f"""`python tools/bench_gpu.py {" ".join(sys.argv[1:])}`, {date.today().isoformat()}
{notice}
{device}, {libraries}. Weights {first.model.dtype}, micro-batches of at most {first.max_tokens:,} tokens.
{split.num_examples:,} rows with {len(split.prompt_lengths):,} prompts. Mean tokens: prompt {split.prompt_lengths.mean():.0f}, completion {split.pair_lengths.mean():.0f}.

| | {" | ".join(one.run.name for one in found)} |
|---|{"---:|" * len(found)}
{chr(10).join(table)}

FLOP = 2 x weights of the layers' matrices x tokens + 4 x layers x query heads x head size x attended positions
+ 2 x vocabulary x hidden size x completion tokens.
Attended positions, with a prompt of p tokens and its completions of c tokens each in one unit: p(p + 1)/2 + sum of (p c + c(c + 1)/2).
"""


if __name__ == "__main__":
    main()
