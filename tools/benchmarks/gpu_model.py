"""Models of public shapes with random weights, made where they are used, and synthetic rows for them."""

import copy
import platform
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from kto_ds.config import BatchConfig, DataConfig, ModelConfig
from kto_ds.data.assemble import Grouping, index_split, read_index, save_split
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.reference_work import plan_shards, wanted_pairs
from kto_ds.data.segments import Limits, Row, make_segment, save_segment
from kto_ds.data.tokenization import RowTokens
from kto_ds.model.attention import register_attention
from kto_ds.model.kernels import use_liger
from kto_ds.model.policy import Policy
from kto_ds.model.scoring import Serving, score
from kto_ds.model.support import DTYPES

SEED = 0
MAX_LENGTH = 2048
# Lengths in the manner of UltraFeedback: (median in tokens, standard deviation of the logarithm) of a lognormal distribution.
PROMPT_TOKENS, COMPLETION_TOKENS = (180, 0.9), (260, 0.7)
SHARED_PROMPTS = 1 / 3  # of the prompts have two rows, the others one
# Of a token's log-prob, for two models with the same float32 weights; a GPU's kernels may add up in other orders. A mistake changes some by 1e-2.
TOLERANCE = {"cpu": 1e-6, "cuda": 1e-5}

ROPE = {"rope_type": "default", "rope_theta": 1e6}
QWEN3 = {"vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40_960, "rope_parameters": ROPE}
SHAPES = {
    "qwen3-0.6b": {**QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "tie_word_embeddings": True},
    "qwen3-4b": {**QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32, "tie_word_embeddings": True},
    "qwen3-32b": {**QWEN3, "hidden_size": 5120, "intermediate_size": 25_600, "num_hidden_layers": 64, "num_attention_heads": 64, "tie_word_embeddings": False},
}
SHAPES["qwen3-32b-8layers"] = {**SHAPES["qwen3-32b"], "num_hidden_layers": 8}  # its training states fit one device
TINY = {
    **QWEN3, "vocab_size": 503, "num_key_value_heads": 2, "head_dim": 16,
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": True,
}  # fmt: skip


class Run(NamedTuple):
    """One shape on one device."""

    name: str
    config: Qwen3Config
    model: ModelConfig  # its dtype, attention, kernels, layout and checkpointing; there is no folder
    device: torch.device
    max_tokens: int


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"


def notice(device: torch.device) -> str:
    return "" if device.type == "cuda" else "\nSmoke form: it ran, and none of this is a measurement.\n"


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
    lm = make_lm(run.config, DTYPES[run.model.dtype], run.device, attention=attention)
    if serving.kernels == "liger":
        use_liger(lm)
    return Policy(lm).eval()


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
