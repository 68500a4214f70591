"""precompute-ref in one process: what is scored, what is taken over, what an interruption leaves."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from kto_ds import cli
from kto_ds.artifacts import incomplete_path, read_manifest
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.keys import find
from kto_ds.data.reference import KEPT, LARGEST_LOGP, read_shards, write_shard
from kto_ds.model import policy
from kto_ds.stages import precompute_ref
from kto_ds.stages.identity import reference_identity
from tests.distributed.runs import write_config, write_rows
from tests.unit.test_refusals import make_model


def rows(start: int, stop: int) -> list[dict]:
    """Three completions a prompt, of 2 to 6 tokens."""
    return [
        {"prompt": f"t{3 + number // 3 % 30} t{4 + number // 90}", "completion": "".join(f" t{5 + (number * 7 + place) % 30}" for place in range(2 + number % 5)), "label": number % 2 == 0}
        for number in range(start, stop)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("precompute")
    for name, seed in (("model", 0), ("other", 1)):
        make_model(folder / name, seed=seed)
    write_rows(folder / "rows.jsonl", rows(0, 120))
    write_rows(folder / "more.jsonl", rows(120, 150))
    write_config(
        folder / "run.yaml",
        output_dir=str(folder / "run"),
        model={"path": str(folder / "model"), "dtype": "float32"},
        data={"train": [{"path": str(folder / "rows.jsonl")}], "max_length": 12, "dataset_num_proc": 1},
        batch={"global_batch_size": 16, "max_tokens_per_microbatch": 64},
        reference={"max_tokens_per_microbatch": 32},
    )
    assert run(folder, "prepare") == 0 and run(folder, "precompute-ref") == 0
    return folder


@pytest.fixture
def folder(base, tmp_path) -> Path:
    """A run with a complete dataset and reference artefact, to be changed at will."""
    shutil.copytree(base, tmp_path / "copy")
    config = (base / "run.yaml").read_text().replace(str(base), str(tmp_path / "copy"))
    (tmp_path / "copy" / "run.yaml").write_text(config)
    # The sources lie elsewhere now, so that the dataset is made anew; the pairs are the same.
    assert run(tmp_path / "copy", "prepare") == 0
    return tmp_path / "copy"


def run(folder: Path, command: str, *overrides: object) -> int:
    return cli.run([command, "--config", str(folder / "run.yaml"), *map(str, overrides)])


def precompute(folder: Path, capsys, *overrides: object) -> tuple[int, int]:
    """Run precompute-ref and return (pairs scored, pairs taken over), as it says itself."""
    capsys.readouterr()
    assert run(folder, "precompute-ref", *overrides) == 0
    printed = capsys.readouterr().out
    scored, kept = re.search(r"scoring ([\d,]+) pairs", printed), re.search(r"taken over: ([\d,]+) of", printed)
    return tuple(int(found[1].replace(",", "")) if found else 0 for found in (scored, kept))


def keys_of(folder: Path) -> set[bytes]:
    return {key.tobytes() for key in TokenizedSplit.load(folder / "run" / "dataset" / "train").pair_keys}


def content_of(artefact: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in artefact.iterdir()}


def train_accepts(folder: Path, *overrides: object) -> bool:
    return run(folder, "train", "--train.max_steps", 1, "--deepspeed.config", "zero0", *overrides) == 0


def naive_logps(folder: Path, split: TokenizedSplit) -> np.ndarray:
    """One pair at a time through transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    found = []
    for pair in range(2 * split.num_examples):
        prompt, completion = split.prompt(split.pair_prompts[pair]), split.completion(pair)
        ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))[None]
        with torch.no_grad():
            logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        found.append(float(logps[len(prompt) - 1 :].double().sum()))
    return np.array(found)


def test_the_values_are_those_of_one_pair_at_a_time(base):
    split = TokenizedSplit.load(base / "run" / "dataset" / "train")
    scored = read_shards((base / "run" / "reference").glob("*.safetensors"))
    places = find(scored.keys, split.pair_keys)
    np.testing.assert_allclose(scored.logps[places], naive_logps(base, split), rtol=1e-5)
    assert (scored.num_tokens[places] == split.pair_lengths).all()
    assert len(scored.keys) == len({key.tobytes() for key in split.pair_keys}), "each content once"


def test_a_finished_artefact_is_left_alone(folder, capsys):
    before = content_of(folder / "run" / "reference")
    for overrides in ((), ("--loss.beta", 0.3), ("--loss.desirable_weight", 2), ("--train.num_train_epochs", 3), ("--optim.learning_rate", 1e-3), ("--loss.loss_type", "apo_zero_unpaired")):
        assert precompute(folder, capsys, *overrides) == (0, 0)
    assert content_of(folder / "run" / "reference") == before


def test_another_order_of_the_batches_scores_nothing_twice(folder, capsys):
    assert run(folder, "prepare", "--batch.global_batch_size", 40) == 0
    assert precompute(folder, capsys, "--batch.global_batch_size", 40) == (0, 0)


def test_appended_rows_alone_are_scored(folder, capsys):
    old = keys_of(folder)
    sources = json.dumps([{"path": str(folder / "rows.jsonl")}, {"path": str(folder / "more.jsonl")}])
    assert run(folder, "prepare", "--data.train", sources) == 0
    new = keys_of(folder)
    assert precompute(folder, capsys, "--data.train", sources) == (len(new - old), len(new & old))
    assert len(new & old) >= 120, "the matched pairs at least"
    assert train_accepts(folder, "--data.train", sources)
    assert precompute(folder, capsys, "--data.train", sources) == (0, 0)


def test_another_kl_seed_scores_only_new_mismatched_pairs(folder, capsys):
    old = keys_of(folder)
    assert run(folder, "prepare", "--seed", 7) == 0
    new = keys_of(folder)
    capsys.readouterr()
    assert run(folder, "train", "--seed", 7, "--deepspeed.config", "zero0") == 2
    message = capsys.readouterr().err
    assert "have no reference log-prob" in message and "seed: this run has 7, the artefact was made with 42" in message
    scored, kept = precompute(folder, capsys, "--seed", 7)
    split = TokenizedSplit.load(folder / "run" / "dataset" / "train")
    matched = {key.tobytes() for key in split.pair_keys[: split.num_examples]}
    assert (scored, kept) == (len(new - old), len(new & old)) and scored <= len(new) - len(matched) and kept >= len(matched)
    assert train_accepts(folder, "--seed", 7)


def test_another_limit_that_cuts_nothing_scores_nothing(folder, capsys):
    assert run(folder, "prepare", "--data.max_length", 14) == 0
    assert precompute(folder, capsys, "--data.max_length", 14) == (0, len(keys_of(folder)))
    assert train_accepts(folder, "--data.max_length", 14)
    assert run(folder, "prepare") == 0
    assert run(folder, "train") == 2
    assert "max_length: this run has 12, the artefact has 14" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "field"), [("--reference.path", "reference model"), ("--reference.dtype", "dtype")])
def test_log_probs_of_another_reference_are_neither_taken_over_nor_deleted(folder, capsys, option, field):
    value = folder / "other" if option == "--reference.path" else "bfloat16"
    before = content_of(folder / "run" / "reference")
    assert run(folder, "precompute-ref", option, value) == 2
    message = capsys.readouterr().err
    assert "log-probs of another reference lie here" in message and f"{field}: this run has" in message and "set another reference.artifact, or delete" in message
    assert content_of(folder / "run" / "reference") == before
    place = ("--reference.artifact", folder / "second")
    assert precompute(folder, capsys, option, value, *place) == (len(keys_of(folder)), 0)
    assert precompute(folder, capsys, option, value, *place) == (0, 0)


def test_nothing_is_taken_over_where_the_tokens_are_missing(folder, capsys):
    assert precompute(folder, capsys, "--reference.per_token", "true") == (len(keys_of(folder)), 0)
    assert precompute(folder, capsys, "--reference.per_token", "true") == (0, 0)


def test_the_tokens_add_up_to_the_sequences(folder, capsys):
    before = read_shards((folder / "run" / "reference").glob("*.safetensors"))
    precompute(folder, capsys, "--reference.per_token", "true")
    artefact = folder / "run" / "reference"
    assert read_manifest(artefact, kind="reference", remedy="")["per_token"] is True
    after = read_shards(artefact.glob("*.safetensors"), per_token=True)
    places = find(after.keys, before.keys)
    assert (after.logps[places] == before.logps).all() and after.token_logps.dtype == np.float32
    sums = np.add.reduceat(after.token_logps, np.cumsum([0, *after.num_tokens[:-1]]))
    np.testing.assert_allclose(sums, after.logps, rtol=1e-6)
    chosen = after.select(np.array([5, 2]))
    ends = np.cumsum(after.num_tokens)
    assert chosen.token_logps.tolist() == [*after.token_logps[ends[4] : ends[5]], *after.token_logps[ends[1] : ends[2]]]
    # Back without tokens: the sums are all that is needed, and they are there.
    assert precompute(folder, capsys) == (0, 0)


class Interrupted(Exception):
    pass


def interrupt(folder: Path, monkeypatch, *overrides: object, after: int) -> None:
    """End a fresh precompute-ref, as a crash of this process would, when `after` shards are committed."""
    shutil.rmtree(folder / "run" / "reference", ignore_errors=True)
    write, count = precompute_ref.write_shard, iter(range(10**6))

    def write_some(target: Path, kind: str, number: int, shard):
        if kind != KEPT and next(count) == after:
            raise Interrupted
        return write(target, kind, number, shard)

    with monkeypatch.context() as patch:
        patch.setattr(precompute_ref, "write_shard", write_some)
        assert run(folder, "precompute-ref", *overrides) == 1


def scored_pairs(paths) -> int:
    return sum(len(load_file(path)["logps"]) for path in paths)


def test_an_interrupted_run_goes_on_and_ends_in_the_same_bytes(folder, base, capsys, monkeypatch):
    artefact, staging = folder / "run" / "reference", incomplete_path(folder / "run" / "reference")
    interrupt(folder, monkeypatch, after=3)
    left = sorted(staging.glob("scored-*"))
    assert len(left) == 3 and not artefact.exists()
    stamps = [path.stat().st_mtime_ns for path in left]
    assert run(folder, "train") == 2 and "reference artefact is unfinished" in capsys.readouterr().err
    scored, kept = precompute(folder, capsys)
    assert scored == len(keys_of(folder)) - sum(len(load_file(artefact / path.name)["logps"]) for path in left) and kept == 0
    assert [(artefact / path.name).stat().st_mtime_ns for path in left] == stamps, "committed shards are not written again"
    whole = content_of(artefact)
    shutil.rmtree(artefact)
    precompute(folder, capsys)
    assert content_of(artefact) == whole
    assert {name for name in whole if name != "manifest.json"} == {path.name for path in (base / "run" / "reference").glob("*.safetensors")}


def test_a_damaged_shard_of_an_unfinished_run_is_scored_again(folder, capsys, monkeypatch):
    staging = incomplete_path(folder / "run" / "reference")
    interrupt(folder, monkeypatch, after=4)
    one, two, three, whole = sorted(staging.glob("scored-*"))
    flipped = bytearray(one.read_bytes())
    flipped[-1] ^= 4
    one.write_bytes(flipped)
    two.write_bytes(two.read_bytes()[:-1])
    three.rename(staging / f".{three.name}.123.tmp")
    done = scored_pairs([whole])
    assert precompute(folder, capsys)[0] == len(keys_of(folder)) - done
    assert train_accepts(folder)


def test_rows_of_an_unfinished_run_are_taken_over_by_another_one(folder, capsys, monkeypatch):
    interrupt(folder, monkeypatch, after=5)
    done = scored_pairs(incomplete_path(folder / "run" / "reference").glob("scored-*"))
    # Other micro-batches: the shards do not fit, the values do.
    scored, kept = precompute(folder, capsys, "--reference.max_tokens_per_microbatch", 48)
    assert kept == done > 0 and scored == len(keys_of(folder)) - done
    assert train_accepts(folder)


def test_what_was_taken_over_survives_an_interruption(folder, capsys, monkeypatch):
    old = keys_of(folder)
    assert run(folder, "prepare", "--seed", 7) == 0
    new = keys_of(folder)
    reference = folder / "run" / "reference"
    shutil.copytree(reference, folder / "old")
    write, calls = precompute_ref.write_shard, []

    def write_kept(target, kind, number, shard):
        calls.append(kind)
        if kind != KEPT:
            raise Interrupted
        return write(target, kind, number, shard)

    with monkeypatch.context() as patch:
        patch.setattr(precompute_ref, "write_shard", write_kept)
        assert run(folder, "precompute-ref", "--seed", 7) == 1
    assert calls[0] == KEPT and len(calls) == 2 and reference.is_dir(), "the older artefact stays until the new one is complete"
    shutil.rmtree(reference)
    capsys.readouterr()
    assert precompute(folder, capsys, "--seed", 7) == (len(new - old), 0)
    assert train_accepts(folder, "--seed", 7)


def test_a_log_prob_that_rounds_to_0_is_stored_below_it(folder, capsys):
    """A model that is certain of its tokens: sums of exactly 0 are values then, and must not look like rows that were never scored."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
        model.model.norm.weight.zero_()
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight[:, 0] = 1
        model.model.norm.weight[0] = 1
        model.lm_head.weight.zero_()
        model.lm_head.weight[7, 0] = 1000.0
    model.save_pretrained(folder / "model")
    shutil.rmtree(folder / "run" / "reference")
    write_rows(folder / "rows.jsonl", [{"prompt": f"t{3 + number}", "completion": " t7 t7", "label": number % 2 == 0} for number in range(8)])
    assert run(folder, "prepare", "--data.append_eos", "false") == 0
    assert precompute(folder, capsys, "--data.append_eos", "false")[0] == 8
    scored = read_shards((folder / "run" / "reference").glob("*.safetensors"))
    assert (scored.logps == LARGEST_LOGP).all()


def test_an_artefact_with_an_unscored_row_cannot_become_complete(folder, capsys, monkeypatch):
    shutil.rmtree(folder / "run" / "reference")
    write = precompute_ref.write_shard
    with monkeypatch.context() as patch:
        patch.setattr(precompute_ref, "write_shard", lambda target, kind, number, shard: write(target, kind, number, shard.select(np.arange(len(shard.keys) - (number == 2)))))
        assert run(folder, "precompute-ref") == 1
    assert "1 of" in (message := capsys.readouterr().err) and "have no log-prob" in message
    assert not (folder / "run" / "reference").exists()


def test_the_example_of_the_docs_prints_the_tokens(folder, capsys, monkeypatch):
    precompute(folder, capsys, "--reference.per_token", "true")
    text = (Path(__file__).parents[2] / "docs" / "reference.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.S)
    (folder / "runs").mkdir()
    (folder / "run").rename(folder / "runs" / "mine")
    monkeypatch.chdir(folder)
    exec(compile(example, "docs/reference.md", "exec"), {})
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    split = TokenizedSplit.load(folder / "runs" / "mine" / "dataset" / "train")
    assert [int(token) for token, _ in printed] == split.completion(0).tolist()
    assert sum(float(logp) for _, logp in printed) == pytest.approx(naive_logps(folder, split)[0], rel=1e-5)


def test_a_full_disk_is_told_and_what_was_committed_stays(folder, capsys, monkeypatch):
    shutil.rmtree(folder / "run" / "reference")
    write, count = precompute_ref.write_shard, iter(range(100))

    def write_two(*parts):
        if next(count) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*parts)

    with monkeypatch.context() as patch:
        patch.setattr(precompute_ref, "write_shard", write_two)
        assert run(folder, "precompute-ref") == 2
    message = capsys.readouterr().err
    assert "cannot write: No space left on device" in message and str(folder / "run" / "reference") in message and "Traceback" not in message
    assert len(list(incomplete_path(folder / "run" / "reference").glob("scored-*"))) == 2
    precompute(folder, capsys)
    assert train_accepts(folder)


def drift_line(folder: Path, capsys, *overrides: object) -> str:
    precompute(folder, capsys, *overrides)
    assert train_accepts(folder, *overrides)
    (line,) = re.findall("policy and reference before the first update differ by .*", capsys.readouterr().out)
    return line


def test_the_drift_before_the_first_update_is_told_with_its_worst_row(folder, capsys):
    same = drift_line(folder, capsys)
    assert float(re.search(r"([\d.e+-]+) nats a token", same)[1]) < 1e-5 and re.search(r"worst sequence, .*rows.jsonl:\d+$", same)


@pytest.mark.parametrize(("overrides", "least", "most"), [(("--reference.dtype", "bfloat16"), 1e-6, 1e-2), (("--reference.path", "other"), 1e-2, 1.0)])
def test_a_reference_of_another_dtype_or_model_is_measured_not_refused(folder, capsys, overrides, least, most):
    option, value = overrides
    line = drift_line(folder, capsys, option, folder / value if option == "--reference.path" else value, "--output_dir", folder / "another", "--data.artifact", folder / "run" / "dataset", "--reference.artifact", folder / "second")
    assert least < float(re.search(r"([\d.e+-]+) nats a token", line)[1]) < most


def test_a_policy_that_is_not_its_reference_is_refused_before_the_first_step(folder, capsys, monkeypatch):
    """The log-probs belong to the weights by their digest, yet something scores otherwise now: libraries, kernels, a broken GPU."""
    sum_by_pair = policy.sum_by_pair
    with monkeypatch.context() as patch:
        patch.setattr(policy, "sum_by_pair", lambda token_logps, batch: 1.01 * sum_by_pair(token_logps, batch))
        assert run(folder, "train", "--deepspeed.config", "zero0") == 2
    message = capsys.readouterr().err
    assert "the policy does not reproduce its own reference log-probs" in message and "rows.jsonl:" in message
    assert not list((folder / "run").glob("checkpoints/*"))


def test_a_quantised_policy_is_refused_and_a_quantised_reference_is_recorded(folder, capsys):
    shutil.copytree(folder / "model", folder / "quantised")
    config = json.loads((folder / "quantised" / "config.json").read_text())
    (folder / "quantised" / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}))
    assert run(folder, "train", "--model.path", folder / "quantised") == 2
    assert "quantised, and cannot be trained without adapters" in capsys.readouterr().err
    run_config, _ = cli.read_config("precompute-ref", ["--config", str(folder / "run.yaml"), "--reference.path", str(folder / "quantised")])
    manifest = read_manifest(folder / "run" / "dataset", kind="dataset", remedy="")
    assert json.loads(reference_identity(run_config, manifest)["quantization"]) == {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert run(folder, "train", "--reference.path", folder / "quantised") == 2
    message = capsys.readouterr().err
    assert "quantization: this run has" in message and "fp8" in message


def test_shards_of_another_plan_that_a_leftover_rank_writes_are_not_taken_for_own_ones(folder, capsys, monkeypatch):
    """A rank that outlived its run goes on writing; its shards may be of another model, under numbers and keys that are ours."""
    staging = incomplete_path(folder / "run" / "reference")
    interrupt(folder, monkeypatch, after=2)
    foreign = read_shards(sorted(staging.glob("scored-000000*")))
    plan = sorted(staging.glob("scored-*"))[0].name.split(".")[1]
    write_shard(staging, "f" * 32, 5, foreign._replace(logps=foreign.logps - 5))
    (staging / "scored-000007.folder").mkdir()
    precompute(folder, capsys)
    names = [path.name for path in (folder / "run" / "reference").glob("scored-*")]
    assert all(f".{plan}." in name for name in names) and run(folder, "verify") == 0
    split = TokenizedSplit.load(folder / "run" / "dataset" / "train")
    scored = read_shards((folder / "run" / "reference").glob("*.safetensors"))
    np.testing.assert_allclose(scored.logps[find(scored.keys, split.pair_keys)], naive_logps(folder, split), rtol=1e-5)


def test_whole_shards_of_a_damaged_artefact_are_taken_over_and_the_damaged_one_is_not(folder, capsys):
    one, *others = sorted((folder / "run" / "reference").glob("scored-*"))
    whole = scored_pairs(others)
    damaged = bytearray(one.read_bytes())
    damaged[-1] ^= 1  # a length, or a log-prob that could be one
    one.write_bytes(damaged)
    assert run(folder, "train") == 2 and "damaged" in capsys.readouterr().err
    scored, kept = precompute(folder, capsys)
    assert kept == whole and scored == len(keys_of(folder)) - kept
    split = TokenizedSplit.load(folder / "run" / "dataset" / "train")
    rows = read_shards((folder / "run" / "reference").glob("*.safetensors"))
    np.testing.assert_allclose(rows.logps[find(rows.keys, split.pair_keys)], naive_logps(folder, split), rtol=1e-5)


def test_a_slip_in_the_config_does_not_throw_unfinished_work_away(folder, capsys, monkeypatch):
    staging = incomplete_path(folder / "run" / "reference")
    interrupt(folder, monkeypatch, after=3)
    left = content_of(staging)
    for option, value, field in (("--reference.dtype", "bfloat16", "dtype"), ("--reference.path", folder / "other", "reference model")):
        assert run(folder, "precompute-ref", option, value) == 2
        message = capsys.readouterr().err
        assert f"{staging}: log-probs of another reference lie here" in message and f"{field}: this run has" in message and "delete this folder" in message
    assert content_of(staging) == left
    assert precompute(folder, capsys)[0] == len(keys_of(folder)) - sum(scored_pairs([folder / "run" / "reference" / name]) for name in left if name.startswith("scored-"))


def test_a_kept_shard_that_is_lost_is_made_up_for(folder, capsys, monkeypatch):
    assert run(folder, "prepare", "--seed", 7) == 0
    interrupted = iter(range(10))
    write = precompute_ref.write_shard

    def write_some(target, plan, number, shard):
        if plan != KEPT and next(interrupted) == 2:
            raise Interrupted
        return write(target, plan, number, shard)

    with monkeypatch.context() as patch:
        patch.setattr(precompute_ref, "write_shard", write_some)
        assert run(folder, "precompute-ref", "--seed", 7) == 1
    staging = incomplete_path(folder / "run" / "reference")
    for path in staging.glob("kept-*"):
        path.unlink()
    scored, kept = precompute(folder, capsys, "--seed", 7)
    assert scored + kept == len(keys_of(folder)) and kept > 0
    assert train_accepts(folder, "--seed", 7)


def test_a_reference_with_too_few_positions_is_refused(folder, capsys):
    make_model(folder / "short", seed=0, max_position_embeddings=6)
    assert run(folder, "precompute-ref", "--reference.path", folder / "short") == 2
    assert "reference.path: the longest sequence has" in (message := capsys.readouterr().err) and "only 6 positions" in message


def test_a_reference_folder_that_is_a_link_is_replaced_by_a_folder(folder, capsys):
    reference = folder / "run" / "reference"
    reference.rename(folder / "elsewhere")
    reference.symlink_to(folder / "elsewhere")
    before = content_of(folder / "elsewhere")
    for seed in (7, 8):
        assert run(folder, "prepare", "--seed", seed) == 0
        precompute(folder, capsys, "--seed", seed)
        assert reference.is_dir() and not reference.is_symlink() and train_accepts(folder, "--seed", seed)
        shutil.rmtree(folder / "run" / "checkpoints")
    assert content_of(folder / "elsewhere") == before


def test_the_same_model_named_twice_is_still_held_to_its_own_log_probs(folder, capsys, monkeypatch):
    again = ("--reference.path", f"{folder / 'model'}/")
    assert precompute(folder, capsys, *again) == (0, 0)
    sum_by_pair = policy.sum_by_pair
    with monkeypatch.context() as patch:
        patch.setattr(policy, "sum_by_pair", lambda token_logps, batch: 1.01 * sum_by_pair(token_logps, batch))
        assert run(folder, "train", "--deepspeed.config", "zero0", *again) == 2
    message = capsys.readouterr().err
    assert "does not reproduce its own reference" in message and f"delete {folder / 'run' / 'reference'}" in message


def things_lost(before: dict[Path, bytes]) -> list[Path]:
    """Return the files that are not as they were; those in `ranks`, `stacks` and `logs` say of the last start where its ranks are."""
    kept = {path: content for path, content in before.items() if not {"ranks", "stacks", "logs"} & set(path.parts)}
    return [path for path, content in kept.items() if not path.is_file() or path.read_bytes() != content]


@pytest.mark.parametrize(
    ("command", "place", "saying"),
    [
        ("precompute-ref", "run", "lies here, which is no part of a reference artefact and would be deleted"),
        ("precompute-ref", "model", "'chat_template.jinja' and 5 more lies here"),
        ("precompute-ref", "run/dataset", "'data_report.json' and"),
        ("precompute-ref", "run/dataset/ref", "would lie inside another artefact"),
        ("precompute-ref", "run/reference/again", "would lie inside another artefact"),
        ("precompute-ref", "rows.jsonl", "there is a file where the reference artefact is to be"),
        ("precompute-ref", "notes", "'thesis.tex' lies here"),
        ("prepare", "run", "no part of a dataset artefact"),
        ("prepare", "run/reference", "no part of a dataset artefact"),
        ("prepare", "notes", "'thesis.tex' lies here"),
    ],
)
def test_an_artefact_is_never_put_where_something_else_lies(folder, capsys, command, place, saying):
    (folder / "notes").mkdir()
    (folder / "notes" / "thesis.tex").write_text("years of work")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    option = "--reference.artifact" if command == "precompute-ref" else "--data.artifact"
    assert run(folder, command, option, folder / place, *(["--seed", 9] if command == "prepare" else [])) == 2
    message = capsys.readouterr().err
    assert saying in message and str(folder / place) in message and "Traceback" not in message
    assert not things_lost(before)


def test_the_folder_one_is_in_is_no_place_for_an_artefact(folder, capsys, monkeypatch):
    (folder / "empty").mkdir()
    monkeypatch.chdir(folder / "empty")
    for place in (".", ".."):
        assert run(folder, "precompute-ref", "--reference.artifact", place) == 2
        assert "a reference artefact needs a folder of its own" in capsys.readouterr().err
