"""A model that is only read, on the ranks: what precompute-ref and evaluate score with."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from kto_ds.artifacts import folder_digest
from kto_ds.config import ModelConfig, RunConfig
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.packing import Layout, MicroBatch
from kto_ds.data.reference import LARGEST_LOGP, ROUNDING, ReferenceRows, no_rows
from kto_ds.data.reference_work import Shard
from kto_ds.errors import UserError, excerpt
from kto_ds.model.load import destination, load_policy
from kto_ds.model.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from kto_ds.model.placement import Placement, choose_placement, weight_bytes, working_bytes
from kto_ds.model.scoring import Serving, score
from kto_ds.model.support import sampled_digest, weight_files
from kto_ds.runtime.collectives import World, free_memory, gather_objects
from kto_ds.runtime.deepspeed_config import offloads_parameters, read_deepspeed_config, reading_config
from kto_ds.runtime.engine import shard_for_reading
from kto_ds.runtime.watch import beat


def place(config: RunConfig, model: ModelConfig, model_config: PretrainedConfig, world: World) -> Placement:
    """Return where the model will lie. All ranks call this and get the same answer."""
    return choose_placement(
        config.reference.placement,
        weights=weight_bytes(*weight_files(model), model.dtype, vocab_size_in_4bit=model_config.get_text_config().vocab_size if model.load_in_4bit else None),
        working=working_bytes(model_config, config.reference.max_tokens_per_microbatch, model.dtype),
        free=min(gather_objects(free_memory(world))),
        num_ranks=world.num_ranks,
        offloads=offloads_parameters(read_deepspeed_config(config.deepspeed.config)),
    )


def require_same_weights(model: ModelConfig, adapter: Path | None = None) -> None:
    """Refuse weights, or those of an adapter, that are not the same for all ranks, as copies on the disks of several machines can be. All ranks call this."""
    found = gather_objects((sampled_digest(model), adapter and folder_digest(adapter, [ADAPTER_CONFIG, ADAPTER_WEIGHTS])))
    others = [rank for rank, digest in enumerate(found) if digest != found[0]]
    if others:
        place, where = (model.path, "model.path") if found[others[0]][0] != found[0][0] else (str(adapter), "eval.path")
        what = f"rank {others[0]} sees other weights under {excerpt(place)} than rank 0"
        raise UserError(what, where=where, remedy="use one folder that all ranks see, or give every machine the same files")


def load_scorer(
    config: RunConfig, model: ModelConfig, model_config: PretrainedConfig, serving: Serving, placement: Placement, world: World, *, adapter: Path | None = None
) -> Callable[..., Tensor]:
    """Return the model as something that scores batches as Policy does; a partitioned one must be called equally often on every rank."""
    require_same_weights(model, adapter)
    load = partial(
        load_policy, model, model_config, layout=serving.layout, backend=serving.backend, kernels=serving.kernels, gradient_checkpointing=False, adapter=adapter,
        beat=beat,
    )  # fmt: skip
    if placement.kind == "replica":
        return load(**destination(model, None, world.device)).eval()
    shards = reading_config(read_deepspeed_config(config.deepspeed.config), dtype=model.dtype)
    return shard_for_reading(load(**destination(model, shards, world.device)).eval(), shards)


class Way(NamedTuple):
    """How pairs are scored here."""

    scorer: Callable[..., Tensor]
    layout: Layout
    placement: Placement
    per_token: bool
    world: World


def score_shard(
    shard: Shard, fillers: int, splits: dict[str, TokenizedSplit], way: Way, on_tokens: Callable[[int], object], *, is_over: Callable[[], bool]
) -> tuple[ReferenceRows, list[str]] | None:
    """Return the scored rows of a shard, and the names of the examples whose log-prob cannot be used. The device is waited for once, at the end.

    `is_over` is asked before every forward; once it says yes there is nothing to return.
    """
    any_split = next(iter(splits.values()))
    passes: list[tuple[TokenizedSplit, MicroBatch]] = [(splits[task.split], task.micro_batch) for task in shard] + [(any_split, [])] * fillers
    scored = []
    for split, micro_batch in passes:
        if is_over():
            return None
        scored.append((split, score(way.scorer, micro_batch, split, layout=way.layout, device=way.world.device, per_token=way.per_token)))
        beat()
        on_tokens(sum(unit.tokens for unit in micro_batch))
    if not shard:
        return no_rows(way.per_token), []
    logps = torch.cat([part.logps for _, part in scored]).cpu().numpy()
    bad = ~np.isfinite(logps) | (logps > ROUNDING)
    if bad.any():
        names = [split.row_name(pair % split.num_examples) for split, part in scored for pair in part.pairs.tolist()]
        return no_rows(way.per_token), [names[place] for place in np.flatnonzero(bad)]
    keys = np.concatenate([split.pair_keys[part.pairs] for split, part in scored])
    num_tokens = np.concatenate([split.pair_lengths[part.pairs] for split, part in scored]).astype(np.int32)
    token_logps = torch.cat([part.token_logps for _, part in scored]).cpu().numpy() if way.per_token else None
    return ReferenceRows(keys, np.minimum(logps, LARGEST_LOGP), num_tokens, token_logps), []
