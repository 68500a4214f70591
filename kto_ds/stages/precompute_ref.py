"""Frozen reference model -> log-probs of every pair, on disk. No optimizer; with a copy on every rank, no collective while the ranks score.

The work is cut into shards by the data alone, so the artefact does not depend on the number of ranks or on interruptions. What an older
artefact or an unfinished one knows of the same model is taken over by the content of the pairs.
"""

import contextlib
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import PretrainedConfig

from kto_ds.artifacts import canonical_json, damaged_files, describe_file, digest_of, incomplete_path, move_into_place, read_manifest, recover, seal
from kto_ds.config import ModelConfig, RunConfig
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.keys import find
from kto_ds.data.reference import KEPT, ReferenceRows, committed_shards, is_part, join_rows, plan_of, read_shards, split_rows, write_shard
from kto_ds.data.reference_work import PLAN_RULES, Shard, Wanted, plan_shards, wanted_pairs
from kto_ds.errors import KtoError, NumericsError, UserError, excerpt
from kto_ds.model.lora import require_lora_served
from kto_ds.model.placement import Placement
from kto_ds.model.scoring import Serving, choose_serving
from kto_ds.model.support import read_model_config, require_positions
from kto_ds.report.screen import WorkBar
from kto_ds.runtime.collectives import World, any_across_ranks, barrier, gather_objects, on_main_rank, start, wait_for_all
from kto_ds.runtime.guard import guarded, preempted, reason_to_stop, stacks_folder
from kto_ds.runtime.watch import Watch
from kto_ds.stages.identity import gives_same_values, is_same_model, library_versions, reference_identity, reference_model, reference_origin, require_same_tokenizer
from kto_ds.stages.inputs import open_dataset, read_reference
from kto_ds.stages.serving import Way, load_scorer, place, score_shard
from kto_ds.staging import finish_folder, fresh_folder, keep_only, locked, require_own_place, resume_state, write_resume, writing_to

GIVEN_UP = "given_up-"  # of a file in the unfinished folder: ranks with a copy each have no collective to tell each other while they score


class Work(NamedTuple):
    """What is left to do, the same on every rank."""

    folder: Path
    plan: str  # digest of all that decides which shards there are, and what lies in them
    shards: list[Shard]
    todo: list[int]  # those of them that nobody has committed yet
    given_up: Path  # no file of this name was there before: what a network file system remembers of an earlier attempt must not end this one


def main(config: RunConfig) -> None:
    model = reference_model(config)
    model_config = read_model_config(model, where="reference.path" if config.reference.path else "model.path")
    seconds = config.train.setup_timeout_seconds
    world = start(timeout_seconds=seconds, dumps=stacks_folder(config.output_dir, "precompute-ref"))
    with guarded(world, config.output_dir, "precompute-ref", seconds=seconds) as watch:
        _precompute(config, model, model_config, world, watch)


def _precompute(config: RunConfig, model: ModelConfig, model_config: PretrainedConfig, world: World, watch: Watch) -> None:
    on_main_rank(lambda: require_own_place(config.reference_dir, "reference", is_part))
    splits, dataset_manifest = open_dataset(config)
    require_positions(model_config, max(split.longest_pair_tokens for split in splits.values()), "reference.path" if config.reference.path else "model.path")
    if config.reference.path:
        on_main_rank(lambda: require_same_tokenizer(model, dataset_manifest["identity"], where="reference.path"))
    require_lora_served(model, model_config, world.device)
    identity = on_main_rank(lambda: reference_identity(config, dataset_manifest))
    origin = reference_origin(config, dataset_manifest)
    with contextlib.ExitStack() as stack:
        on_main_rank(lambda: stack.enter_context(locked(config.reference_dir)))
        if on_main_rank(lambda: _is_up_to_date(config, splits, identity, origin)):
            if world.is_main:
                print(f"reference artefact: {config.reference_dir} is complete and belongs to this run; nothing to do", flush=True)
            return
        serving = choose_serving(model, model_config, world.device)
        wanted = wanted_pairs(splits, config.loss.loss_type)
        work = _open_work(config, splits, wanted, serving, identity)
        if work.todo:
            placement = place(config, model, model_config, world)
            if world.is_main:
                _say_what_will_be_done(work, model.path, serving, placement)
            scorer = load_scorer(config, model, model_config, serving, placement, world)
            watch.enter("scoring")
            _score_all(work, splits, Way(scorer, serving.layout, placement, config.reference.per_token, world), watch)
            watch.enter("sealing", at_once=True)
        manifest = {"kind": "reference", "identity": identity, "origin": origin, "layout": serving.layout, "attention": serving.backend, "kernels": serving.kernels,
                    "per_token": config.reference.per_token, "pairs": len(wanted.keys), "libraries": library_versions()}  # fmt: skip
        on_main_rank(lambda: _finish(config, work, wanted, manifest))
    barrier()


def _is_up_to_date(config: RunConfig, splits: dict[str, TokenizedSplit], identity: dict, origin: dict) -> bool:
    """Tell whether train would accept the artefact that is there already, and it has all that is asked for."""
    recover(config.reference_dir)
    if not config.reference_dir.is_dir():
        return False
    try:
        _, manifest = read_reference(config, splits, identity, origin)
    except UserError as error:
        print(f"the reference artefact that is there does not serve this run: {error.what}", flush=True)
        return False
    return manifest["per_token"] or not config.reference.per_token


def _open_work(config: RunConfig, splits: dict[str, TokenizedSplit], wanted: Wanted, serving: Serving, identity: dict) -> Work:
    """Take over what is known, plan the rest, and find out which of its shards an earlier attempt has committed."""
    folder = incomplete_path(config.reference_dir)
    # Equal states cut the same work into the same shards and score them the same way.
    state = {
        "identity": identity,
        "pairs": digest_of(wanted.keys.tobytes(), wanted.split_of.tobytes(), wanted.pairs.tobytes()),
        "layout": serving.layout,
        "attention": serving.backend,
        "kernels": serving.kernels,
        "max_tokens_per_microbatch": config.reference.max_tokens_per_microbatch,
        "per_token": config.reference.per_token,
        "libraries": library_versions(),
        "plan_rules": PLAN_RULES,
    }
    is_kept, plan, done, attempt = on_main_rank(lambda: (*_begin(config, folder, wanted, state), secrets.token_hex(8)))
    shards = plan_shards(splits, wanted.select(~is_kept), layout=serving.layout, max_tokens=config.reference.max_tokens_per_microbatch)
    return Work(folder, plan, shards, [number for number in range(len(shards)) if number not in done], folder / (GIVEN_UP + attempt))


def _begin(config: RunConfig, folder: Path, wanted: Wanted, state: dict) -> tuple[np.ndarray, str, set[int]]:
    """Make the unfinished folder ready and return (which wanted pairs need no scoring, [W] bool; the plan; the shards of it that are done)."""
    recover(folder)
    attempt = resume_state(folder)
    kept = committed_shards(folder, KEPT)
    now = {**state, "kept": [path.name for path in kept.values()]}
    if canonical_json(attempt) == canonical_json(now):
        plan = plan_of(now)
        done = set(committed_shards(folder, plan))
        if done:
            print(f"an earlier precompute-ref was cut short: {len(done):,} shards of its work are there", flush=True)
        return find(read_shards(kept.values()).keys, wanted.keys) >= 0, plan, done
    _require_no_other_work(config.reference_dir, attempt, state["identity"])
    known = join_rows(_known_rows(config, folder, state, attempt), state["per_token"])
    places = find(known.keys, wanted.keys)
    rows = known.select(places[places >= 0])
    if len(rows.keys):
        print(f"taken over: {len(rows.keys):,} of {len(wanted.keys):,} log-probs, as they were scored before by the same model", flush=True)
    fresh = folder.with_name(f".{folder.name}.next")
    with writing_to(config.reference_dir):
        fresh_folder(fresh)
        now = {**state, "kept": [write_shard(fresh, KEPT, number, part).name for number, part in enumerate(split_rows(rows))]}
        write_resume(fresh, now)
        move_into_place(fresh, folder)
    return places >= 0, plan_of(now), set()


def _require_no_other_work(final: Path, attempt: object, identity: dict) -> None:
    """Refuse to begin in the place of another reference's log-probs, complete or not: hours of work may lie there, and the config be a slip."""
    found: dict[Path, object] = {}
    if isinstance(attempt, dict) and _committed(incomplete_path(final), attempt):
        found[incomplete_path(final)] = attempt.get("identity")
    with contextlib.suppress(UserError):
        found[final] = read_manifest(final, kind="reference", remedy="").get("identity")
    for folder, other in found.items():
        if isinstance(other, dict) and not is_same_model(identity, other):
            lines = [f"{key}: this run has {excerpt(value)}, what lies there {excerpt(other.get(key))}" for key, value in identity.items() if other.get(key) != value]
            what = "\n  ".join(["log-probs of another reference lie here, and would be deleted:", *lines])
            raise UserError(what, where=str(folder), remedy="set another reference.artifact, or delete this folder")


def _committed(folder: Path, attempt: dict) -> list[Path]:
    """Return all whole shards of an unfinished attempt, by the state it was begun with."""
    return [*committed_shards(folder, KEPT).values(), *committed_shards(folder, plan_of(attempt)).values()]


def _known_rows(config: RunConfig, folder: Path, state: dict, attempt: object) -> Iterator[ReferenceRows]:
    """Yield the rows of the older artefact and of an unfinished one, where the same model made them, from every shard that is whole."""
    paths: list[Path] = []
    final = config.reference_dir
    with contextlib.suppress(UserError):  # why the older one does not serve this run was said before
        manifest = read_manifest(final, kind="reference", remedy="")
        if gives_same_values(state["identity"], manifest.get("identity")):
            paths += [final / name for name, entry in manifest["files"].items() if not damaged_files(final, {"files": {name: entry}})]
    if isinstance(attempt, dict) and gives_same_values(state["identity"], attempt.get("identity")):
        paths += _committed(folder, attempt)
    for path in paths:
        with contextlib.suppress(UserError):  # one that lacks what is wanted, or holds what cannot be
            yield read_shards([path], state["per_token"])


def _say_what_will_be_done(work: Work, path: str, serving: Serving, placement: Placement) -> None:
    tasks = [task for number in work.todo for task in work.shards[number]]
    print(f"scoring {sum(task.num_pairs for task in tasks):,} pairs in {len(tasks):,} micro-batches with {path} ({serving.way})", flush=True)
    print(f"placement: {placement.kind}, {placement.why}", flush=True)
    if serving.notice:
        print(f"notice: {serving.notice}", flush=True)


def _score_all(work: Work, splits: dict[str, TokenizedSplit], way: Way, watch: Watch) -> None:
    """Score and commit all shards that are left, in rounds of one shard a rank.

    On all ranks: NumericsError when a log-prob is not usable, Preempted when any of them was asked to stop.
    """
    world = way.world
    rounds = [work.todo[start : start + world.num_ranks] for start in range(0, len(work.todo), world.num_ranks)]
    mine = [numbers[world.rank] if world.rank < len(numbers) else None for numbers in rounds]
    total = sum(task.tokens for number in mine if number is not None for task in work.shards[number])
    began = time.perf_counter()
    bad_rows: list[str] = []
    failure: KtoError | None = None
    with WorkBar("precompute-ref, rank 0", total=total, unit=" tokens", is_shown=world.is_main) as bar:
        for numbers, number in zip(rounds, mine):
            tasks = [] if number is None else work.shards[number]
            # Every forward of a partitioned model is a collective, so that ranks with fewer micro-batches run fillers.
            fillers = max(len(work.shards[other]) for other in numbers) - len(tasks) if way.placement.kind == "sharded" else 0
            try:
                scored = score_shard(tasks, fillers, splits, way, bar.advance, is_over=lambda: _is_over(watch.stop_reason is not None, work.given_up, way))
                if scored is None:
                    break
                rows, bad_rows = scored
                if number is not None and not bad_rows:
                    with writing_to(work.folder):
                        write_shard(work.folder, work.plan, number, rows)
            except torch.OutOfMemoryError as error:
                if way.placement.kind == "sharded":  # in the middle of a forward that the others wait in: only an end of the job frees them
                    raise _too_large(error) from error
                failure = _too_large(error)
            except UserError as error:
                failure = error
            if _is_over(bool(bad_rows or failure), work.given_up, way):
                break
    wait_for_all()
    if failures := [found for found in gather_objects(failure) if found]:
        raise failures[0]
    if bad_rows := [row for rows in gather_objects(bad_rows) for row in rows]:
        raise NumericsError(f"{len(bad_rows)} reference log-probs are not finite, or above 0; rows: {', '.join(bad_rows[:5])}")
    if reason := reason_to_stop(watch):
        kept = len(committed_shards(work.folder, work.plan))
        raise preempted(world, f"{reason}: stopped; {kept:,} of {len(work.shards):,} shards of log-probs are kept")
    tokens, seconds = sum(gather_objects(total)), time.perf_counter() - began
    if world.is_main:
        print(f"scored {tokens:,} tokens in {seconds:.1f} s on {world.num_ranks} rank{'s' if world.num_ranks > 1 else ''}: {tokens / seconds:,.0f} tokens/s", flush=True)


def _too_large(error: torch.OutOfMemoryError) -> UserError:
    remedy = "lower it; or set reference.placement: sharded, where the weights take most of the memory"
    return UserError(f"a micro-batch does not fit into the device's memory: {str(error).splitlines()[0]}", where="reference.max_tokens_per_microbatch", remedy=remedy)


def _is_over(is_over_here: bool, given_up: Path, way: Way) -> bool:
    """Tell whether any rank has met a log-prob that cannot be used or an error, or was asked to stop; there is no artefact to be made then."""
    if way.placement.kind == "sharded":
        return any_across_ranks(is_over_here, way.world.device)
    if is_over_here:
        given_up.touch()
    return given_up.exists()


def _finish(config: RunConfig, work: Work, wanted: Wanted, manifest: dict) -> None:
    """Read everything back, see that every wanted pair is there once, and only then make the artefact complete."""
    paths = [*committed_shards(work.folder, KEPT).values(), *committed_shards(work.folder, work.plan).values()]
    rows = read_shards(paths)
    unscored = find(rows.keys, wanted.keys) < 0
    if unscored.any() or len(rows.keys) != len(wanted.keys):
        raise KtoError(f"{unscored.sum():,} of {len(wanted.keys):,} pairs have no log-prob, and {len(rows.keys):,} are there; run kto-ds precompute-ref again")
    with writing_to(config.reference_dir):
        keep_only(work.folder, paths)  # ranks that outlived an earlier run may have left shards of its plan
        seal(work.folder, manifest, {path.name: describe_file(path) for path in paths})
        finish_folder(work.folder, config.reference_dir)
    print(f"reference artefact: {config.reference_dir}, {len(wanted.keys):,} log-probs", flush=True)
