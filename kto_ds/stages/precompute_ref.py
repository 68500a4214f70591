"""Frozen reference model -> log-probs of every pair, on disk. No optimizer, no engine, and no collective while the ranks score.

The work is cut into shards by the data alone, so the artefact does not depend on the number of ranks.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from kto_ds.artifacts import describe_folder, fresh_folder, incomplete_path, move_into_place, seal
from kto_ds.config import RunConfig
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.packing import Layout, MicroBatch, make_units, pack, require_fit
from kto_ds.data.reference import write_shard
from kto_ds.errors import NumericsError, UserError
from kto_ds.model.scoring import choose_serving, load_scorer, score
from kto_ds.model.support import read_model_config
from kto_ds.runtime.collectives import World, barrier, gather_objects, on_main_rank, start
from kto_ds.stages.identity import library_versions, needed_pairs, pair_keys, reference_identity, reference_model, require_same_tokenizer
from kto_ds.stages.inputs import open_dataset, read_reference

MAX_SHARDS = 256
GIVEN_UP = "given_up"  # a file in the unfinished folder: the ranks have no collective to tell each other while they score


class Task(NamedTuple):
    split: str
    micro_batch: MicroBatch


def main(config: RunConfig) -> None:
    model = reference_model(config)
    model_config = read_model_config(model, where="reference.path" if config.reference.path else "model.path")
    world = start()
    splits, dataset_manifest = open_dataset(config)
    if config.reference.path:
        on_main_rank(lambda: require_same_tokenizer(model, dataset_manifest, where="reference.path"))
    identity = on_main_rank(lambda: reference_identity(config, dataset_manifest))
    if on_main_rank(lambda: _is_up_to_date(config, splits, identity)):
        if world.is_main:
            print(f"reference artefact: {config.reference_dir} is complete and belongs to this run; nothing to do", flush=True)
        return
    serving = choose_serving(model, model_config, world.device)
    keys_of = {name: _first_keys(split, config.loss.loss_type) for name, split in splits.items()}
    tasks = _plan(splits, keys_of, serving.layout, config.reference.max_tokens_per_microbatch)
    shards = _cut_into_shards(tasks)
    if world.is_main:
        print(f"scoring {sum(len(keys) for keys in keys_of.values()):,} pairs in {len(tasks):,} micro-batches with {model.path} ({serving.layout}, {serving.backend})", flush=True)
        if serving.notice:
            print(f"notice: {serving.notice}", flush=True)

    staging = incomplete_path(config.reference_dir)
    on_main_rank(lambda: fresh_folder(staging))
    scorer = load_scorer(model, model_config, serving, world.device)
    bad_rows = _score_shards(scorer, shards, splits, keys_of, serving.layout, staging, world)
    if bad_rows := [row for rows in gather_objects(bad_rows) for row in rows]:
        raise NumericsError(f"{len(bad_rows)} reference log-probs are not finite; rows: {', '.join(bad_rows[:5])}")

    def finish() -> None:
        manifest = {"kind": "reference", "identity": identity, "layout": serving.layout, "attention": serving.backend, "model": model.path,
                    "pairs": sum(len(keys) for keys in keys_of.values()), "libraries": library_versions()}  # fmt: skip
        seal(staging, manifest, describe_folder(staging))
        move_into_place(staging, config.reference_dir)
        print(f"reference artefact: {config.reference_dir}", flush=True)

    on_main_rank(finish)
    barrier()


def _is_up_to_date(config: RunConfig, splits: dict[str, TokenizedSplit], identity: dict) -> bool:
    """Tell whether train would accept the artefact that is there already."""
    if not config.reference_dir.is_dir():
        return False
    try:
        read_reference(config, splits, identity)
    except UserError as error:
        print(f"the reference artefact that is there is made anew: {error.what}", flush=True)
        return False
    return True


def _first_keys(split: TokenizedSplit, loss_type: str) -> dict[int, bytes]:
    """Return {pair id: key} with one pair for each distinct key: equal pairs are scored once."""
    pairs = needed_pairs(split, loss_type)
    keys, first = np.unique(pair_keys(split, pairs), return_index=True)
    return dict(zip(pairs[first].tolist(), keys))


def _plan(splits: dict[str, TokenizedSplit], keys_of: dict[str, dict[int, bytes]], layout: Layout, max_tokens: int) -> list[Task]:
    """Return all micro-batches, longest first: matched and mismatched completions of a prompt lie behind it in one pass."""
    tasks = []
    for name, split in splits.items():
        require_fit(split.longest_pair_tokens, max_tokens, "reference.max_tokens_per_microbatch")
        pairs = np.array(sorted(keys_of[name]))
        units = make_units(pairs, pair_prompts=split.pair_prompts, pair_lengths=split.pair_lengths, prompt_lengths=split.prompt_lengths, layout=layout, max_tokens=max_tokens)
        tasks += [Task(name, micro_batch) for micro_batch in pack(units, layout=layout, max_tokens=max_tokens)]
    return sorted(tasks, key=lambda task: -sum(unit.cost for unit in task.micro_batch))


def _cut_into_shards(tasks: list[Task]) -> list[list[Task]]:
    """Deal the tasks out to at most MAX_SHARDS shards of about equal cost."""
    num_shards = min(MAX_SHARDS, len(tasks))
    return [tasks[number::num_shards] for number in range(num_shards)]


def _score_shards(scorer, shards: list[list[Task]], splits, keys_of, layout: Layout, staging: Path, world: World) -> list[str]:
    """Score and write this rank's shards and return the rows whose log-prob is not finite; the first such row ends the work of all ranks."""
    mine = range(world.rank, len(shards), world.num_ranks)
    progress = tqdm(total=sum(len(shards[number]) for number in mine), desc="precompute-ref", unit="micro-batch", disable=not world.is_main, mininterval=1.0)
    for number in mine:
        if (staging / GIVEN_UP).exists():
            return []
        keys, logps, num_tokens = [], [], []
        for task in shards[number]:
            split = splits[task.split]
            for scored in score(scorer, [task.micro_batch], split, layout=layout, device=world.device):
                values = scored.logps.cpu().numpy()
                finite = np.isfinite(values)
                if not finite.all():
                    (staging / GIVEN_UP).touch()
                    return [split.row_name(pair % split.num_examples) for pair in scored.pairs[~finite].tolist()]
                keys += [keys_of[task.split][pair] for pair in scored.pairs.tolist()]
                logps.append(values)
                num_tokens.append(split.pair_lengths[scored.pairs])
            progress.update()
        write_shard(staging / f"shard-{number:05d}.parquet", keys=np.array(keys), logps=np.concatenate(logps), num_tokens=np.concatenate(num_tokens))
    progress.close()
    return []
