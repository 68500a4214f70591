"""What kto-ds inspect says about the reference artefact, compared with numpy on its shards."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from kto_ds import cli
from kto_ds.artifacts import MANIFEST, describe_folder, incomplete_path, read_manifest, seal
from kto_ds.config import RunConfig
from kto_ds.data.dataset import TokenizedSplit
from kto_ds.data.keys import distinct, find
from kto_ds.data.reference import KEPT, ReferenceRows, plan_of, read_shards, write_shard
from kto_ds.report.reference_view import Scored, facts_table, lowest_examples
from kto_ds.stages.identity import library_versions, reference_origin
from kto_ds.staging import write_resume
from tests.distributed.runs import write_config, write_rows
from tests.unit.test_inspect import inspect, make_split, numbered_rows, save_run
from tests.unit.test_refusals import make_model

DIGEST = "0123456789abcdef" * 2


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def score(splits: dict[str, TokenizedSplit], *, per_token: bool = False) -> ReferenceRows:
    """A number for every distinct pair of the splits, between -5 and -0.1 a token."""
    keys, lengths = (np.concatenate(parts) for parts in zip(*((split.pair_keys, split.pair_lengths) for split in splits.values())))
    _, first = distinct(keys)
    keys, lengths = keys[first], lengths[first].astype(np.int32)
    tokens = -np.random.default_rng(0).uniform(0.1, 5, lengths.sum()).astype(np.float32)
    sums = np.add.reduceat(tokens, np.cumsum([0, *lengths[:-1]]))
    return ReferenceRows(keys, sums, lengths, tokens if per_token else None)


def made_by(config: RunConfig, *, per_token: bool = False, identity: dict | None = None, origin: dict | None = None) -> dict:
    """The manifest of a reference artefact that belongs to the dataset artefact of the run, but for what is given."""
    dataset = read_manifest(config.dataset_dir, kind="dataset", remedy="")
    carried = {key: dataset["identity"][key] for key in ("tokenizer", "chat_template", "max_length", "truncation_mode")}
    return {
        "kind": "reference",
        "identity": {"reference model": DIGEST, "dtype": "float32", "quantization": "null", **carried, **(identity or {})},
        "origin": {**reference_origin(config, dataset), **(origin or {})},
        "layout": "prefix_shared",
        "attention": "sdpa",
        "per_token": per_token,
        "libraries": library_versions(),
    }


def write_shards(folder: Path, rows: ReferenceRows, *, plan: str = "a" * 32, count: int = 2) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    return [write_shard(folder, plan, number, rows.select(np.arange(len(rows.keys))[number::count])) for number in range(count)]


def save_reference(config: RunConfig, rows: ReferenceRows, **changes) -> list[Path]:
    paths = write_shards(config.reference_dir, rows)
    seal(config.reference_dir, made_by(config, per_token=rows.token_logps is not None, **changes), describe_folder(config.reference_dir))
    return paths


def part_of(output: str) -> str:
    """The part about the reference artefact, up to the decoded examples."""
    return re.split(r"\n⟦ ⟧ a special token|\n\S+: step ", output[output.index("\nreference artefact ") :])[0]


def dataset_is_shown(output: str) -> bool:
    return "1,234,567" in output and "answer 2 xx⟦<eos>⟧" in output and "picture of the lengths" in output


def by_pair(rows: ReferenceRows, split: TokenizedSplit) -> np.ndarray:
    places = find(rows.keys, split.pair_keys)
    return np.where(places < 0, np.nan, rows.logps[places].astype(np.float64))


def expected_table(splits: dict[str, TokenizedSplit], rows: ReferenceRows) -> list[list[str]]:
    table = []
    for name, split in splits.items():
        values, size = by_pair(rows, split) / split.pair_lengths, split.num_examples
        for kind, chosen in (("desirable", values[:size][split.desirable]), ("undesirable", values[:size][~split.desirable]), ("mismatched", values[size:])):
            chosen = chosen[~np.isnan(chosen)]
            table.append([f"{name}: {kind}", str(len(chosen)), *(f"{np.percentile(chosen, percent):.2f}" for percent in (5, 50, 95))])
    return table


def table_of(output: str) -> list[list[str]]:
    return [re.split(r"\s{2,}", line.strip()) for line in part_of(output).splitlines() if re.match(r"\S+: (un)?desirable |\S+: mismatched ", line)]


# complete


def test_a_complete_artefact(tmp_path, capsys):
    splits = {"train": make_split(numbered_rows(12)), "eval/held_out": make_split(numbered_rows(6), kl_group_size=3)}
    config = save_run(tmp_path, splits)
    rows = score(splits)
    save_reference(config, rows)
    output = inspect(config, capsys, num_rows=6)
    part = part_of(output)
    assert f"complete: {len(rows.keys)} log-probs in 2 shards\n" in part
    for fact in (r"model +\S", r"revision +none", f"digest of its files +{DIGEST[:12]} ", "dtype +float32", "quantisation +none", "layout +prefix_shared", "attention kernel +sdpa",
                 "single tokens +no, sums only", f"libraries +kto_ds {library_versions()['kto_ds']}, torch"):  # fmt: skip
        assert re.search(rf"^{fact}", part, re.MULTILINE), fact
    assert config.model.path in re.sub(r"\s", "", part)
    assert re.search(r"train +12 of 12 +12 of 12 *\neval/held_out +6 of 6 +6 of 6", part)
    assert table_of(output) == expected_table(splits, rows)
    assert "train would find every pair" in part and "notice" not in output and "other settings" not in output
    # Only what may hold a path is longer than the terminal is wide.
    assert all(len(line) <= 80 or str(tmp_path) in line or "rows.jsonl" in line or "inspect-train.png" in line for line in output.splitlines())
    assert dataset_is_shown(output)


def test_the_lowest_rows_and_the_examples(tmp_path, capsys):
    split = make_split(numbered_rows(12))
    config = save_run(tmp_path, {"train": split})
    rows = score({"train": split})
    save_reference(config, rows)
    output = inspect(config, capsys, num_rows=6)
    logps = by_pair(rows, split)
    values = logps / split.pair_lengths
    lines = [
        f"  rows.jsonl:{example + 1}, {'desirable' if split.desirable[example] else 'undesirable'}: {logps[example]:.1f} nats, {values[example]:.2f} a token"
        for example in np.argsort(values[:12])[:3].tolist()
    ]
    assert "\n".join(["lowest log-probs a token in train, where a broken row would be:", *lines]) in part_of(output)
    shown = [example + 1 for half in (True, False) for example in np.flatnonzero(split.desirable == half)]
    found = re.findall(r"example \d of 6, rows\.jsonl:(\d+) .*?\nreference +matched: (.*?) *\n +mismatched: (.*?) *\n", output, re.DOTALL)
    assert found == [(str(row), *(f"{logps[pair]:.1f} nats, {values[pair]:.2f} a token" for pair in (row - 1, row + 11))) for row in shown]


def test_of_single_tokens_the_sums_are_shown(tmp_path, capsys):
    split = make_split(numbered_rows(8))
    config = save_run(tmp_path, {"train": split})
    rows = score({"train": split}, per_token=True)
    save_reference(config, rows)
    output = inspect(config, capsys)
    assert re.search("single tokens +each has its log-prob", output) and table_of(output) == expected_table({"train": split}, rows)


def test_a_loss_without_a_reference_point_needs_the_matched_pairs_only(tmp_path, capsys):
    split = make_split(numbered_rows(8))
    config = save_run(tmp_path, {"train": split}, loss={"loss_type": "apo_zero_unpaired"})
    rows = score({"train": split})
    rows = rows.select(find(rows.keys, split.pair_keys[:8]))
    save_reference(config, rows)
    part = part_of(inspect(config, capsys))
    assert re.search(r"train +8 of 8 +not needed", part) and "train would find every pair" in part and "train: mismatched" not in part


@pytest.mark.parametrize(
    "values, keys, lowest",
    [
        ([-1, -9, -9, -8, -7, -6], [0, 1, 1, 2, 3, 4], [1, 3, 4]),  # a row that its source's weight repeats
        ([np.nan, -2, np.nan, -3], [0, 1, 2, 3], [3, 1]),
        ([np.nan] * 3, [0, 1, 2], []),
    ],
)
def test_the_lowest_are_distinct_and_have_a_value(values, keys, lowest):
    scored = Scored(np.array([*values, *[-99.0] * len(values)]), np.ones(2 * len(values)), np.ones(len(values), bool), 2 * len(values))
    assert lowest_examples(scored, np.array([[key, 7] for key in keys * 2], np.uint64)) == lowest


# not all of it, or not of this run


def test_partial_coverage_is_counted_and_told(tmp_path, capsys):
    """As after rows were appended: the artefact knows the old ones, and train will refuse it."""
    splits = {"train": make_split(numbered_rows(12)), "eval": make_split(numbered_rows(4))}
    config = save_run(tmp_path, splits)
    rows = score(splits)
    known = find(rows.keys, splits["train"].pair_keys[[0, 1, 2, 12, 13]])
    rows = rows.select(np.unique(known))
    save_reference(config, rows)
    output = inspect(config, capsys, num_rows=6)
    found = {name: ~np.isnan(by_pair(rows, split)) for name, split in splits.items()}
    for name, split in splits.items():
        matched, mismatched = np.split(found[name], 2)
        assert re.search(rf"\n{name} +{matched.sum()} of {len(matched)} +{mismatched.sum()} of {len(matched)} *\n", output)
    absent = sum((~mask).sum() for mask in found.values())
    assert 0 < absent < 32 and f"notice: train will refuse this artefact: {absent} of 32 pairs have no log-prob; run kto-ds precompute-ref" in output
    assert "train would find" not in output and "mismatched: no log-prob" in output
    assert table_of(output) == [line for line in expected_table(splits, rows) if line[1] != "0"]


@pytest.mark.parametrize(
    "changes, notice",
    [
        ({"identity": {"max_length": 14}, "origin": {"max_length": 14}}, "max_length: this run has 2048, the artefact has 14"),
        ({"identity": {"truncation_mode": "drop"}}, "truncation_mode: this run has 'keep_start', the artefact has 'drop'"),
        ({"identity": {"tokenizer": "\x1b[2J"}}, r"the artefact has '\x1b[2J'"),
        ({"identity": {"chat_template": "x" * 32}}, "chat_template: this run has '"),
        ({"identity": {"dtype": "bfloat16"}}, "dtype: this run has 'float32', the artefact has 'bfloat16'"),
    ],
)
def test_fields_that_differ_are_named(tmp_path, capsys, changes, notice):
    split = make_split(numbered_rows(8))
    config = save_run(tmp_path, {"train": split})
    save_reference(config, score({"train": split}), **changes)
    output = inspect(config, capsys)
    assert "notice: train will refuse this artefact: run kto-ds precompute-ref" in output and notice in output and "\x1b[2J" not in output
    assert "made with other settings" not in output, "nothing is said twice"
    assert "train would find" not in output and re.search("train +8 of 8 +8 of 8", output) and dataset_is_shown(output)


def test_settings_that_train_does_not_compare_are_told_apart(tmp_path, capsys):
    split = make_split(numbered_rows(8))
    config = save_run(tmp_path, {"train": split})
    save_reference(config, score({"train": split}), origin={"model.path": "org/\x1b]0;x\x07other", "seed": 7})
    output = inspect(config, capsys)
    told = output[output.index("made with other settings") :]
    assert "model.path: this run has " in told and r"the artefact was made with 'org/\x1b]0;x\x07other'" in told and "seed: this run has 42, the artefact was made with 7" in told
    assert "notice" not in output and "train would find every pair" in output and "\x1b" not in output


# unfinished, missing, damaged


def test_an_unfinished_artefact_is_counted_and_left_as_it_is(tmp_path, capsys):
    split = make_split(numbered_rows(12))
    config = save_run(tmp_path, {"train": split})
    rows = score({"train": split})
    folder = incomplete_path(config.reference_dir)
    [kept] = write_shards(folder, rows.select(np.arange(5)), plan=KEPT, count=1)
    state = {name: value for name, value in made_by(config).items() if name not in ("kind", "origin")}
    whole, damaged, _ = write_shards(folder, rows.select(np.arange(5, 17)), plan=plan_of(state), count=3)
    write_shards(folder, rows.select(np.arange(17, 20)), count=1)  # of another plan
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x07")
    (folder / ".scored-000007.tmp").write_bytes(b"being written")
    write_resume(folder, state)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    output = inspect(config, capsys, num_rows=6)
    assert "unfinished: 13 log-probs in 3 shards so far, 5 of them taken over; to go on, run kto-ds precompute-ref" in output
    there = rows.select(np.flatnonzero(~np.isin(np.arange(len(rows.keys)), [6, 9, 12, 15]) & (np.arange(len(rows.keys)) < 17)))
    assert table_of(output) == [line for line in expected_table({"train": split}, there) if line[1] != "0"]
    assert f"{(~np.isnan(by_pair(there, split)[:12])).sum()} of 12" in output and "attention kernel" in output and "revision" not in output
    assert "train would find" not in output and "notice" not in output and dataset_is_shown(output)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before, "a precompute-ref may be at work there"
    assert not config.reference_dir.exists() and whole.exists() and kept.exists()


def test_an_unfinished_artefact_of_other_settings_or_without_a_word_of_them(tmp_path, capsys):
    split = make_split(numbered_rows(8))
    config = save_run(tmp_path, {"train": split})
    folder = incomplete_path(config.reference_dir)
    folder.mkdir()
    output = inspect(config, capsys)
    assert "unfinished: 0 log-probs in 0 shards so far; to go on" in output and re.search("train +0 of 8 +0 of 8", output) and "lowest" not in output
    write_resume(folder, {"identity": {"max_length": 14, "dtype": "bfloat16"}})
    output = inspect(config, capsys)
    assert "notice: begun for another run:\n  dtype: this run has 'float32', the artefact has 'bfloat16'\n  max_length: this run has 2048, the artefact has 14\n" in output


def test_an_unfinished_one_beside_a_complete_one(tmp_path, capsys):
    split = make_split(numbered_rows(8))
    config = save_run(tmp_path, {"train": split})
    rows = score({"train": split})
    save_reference(config, rows)
    write_shards(incomplete_path(config.reference_dir), rows.select(np.arange(3)), plan=KEPT, count=1)
    output = inspect(config, capsys)
    assert f"complete: {len(rows.keys)} log-probs in 2 shards\nbeside it, unfinished: 3 log-probs in 1 shard so far, 3 of them taken over; to go on" in output
    assert table_of(output) == expected_table({"train": split}, rows) and "train would find every pair" in output


def test_a_missing_artefact(tmp_path, capsys):
    output = inspect(save_run(tmp_path, {"train": make_split(numbered_rows(8))}), capsys)
    assert part_of(output).splitlines()[2:] == ["missing: run kto-ds precompute-ref --config RUN.yaml"]
    assert dataset_is_shown(output) and "nats" not in output


def flip(folder: Path, paths: list[Path]) -> None:
    content = paths[1].read_bytes()
    paths[1].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def zero(folder: Path, paths: list[Path]) -> None:
    """A shard of the right digest with a row that nobody scored."""
    rows = read_shards(paths[:1])
    rows.logps[0] = 0
    paths[0].unlink()
    write_shard(folder, "a" * 32, 0, rows)
    seal(folder, read_manifest(folder, kind="reference", remedy=""), describe_folder(folder))


DAMAGE = {
    "a bit": (flip, "does not have the digest of the manifest"),
    "a missing shard": (lambda folder, paths: paths[0].unlink(), "is missing"),
    "no JSON": (lambda folder, paths: (folder / MANIFEST).write_text("{"), "damaged manifest"),
    "an old format": (lambda folder, paths: (folder / MANIFEST).write_text('{"format": 1}'), "written in format 1"),
    "a row that was never scored": (zero, "a row that was never scored"),
    "no shard": (lambda folder, paths: ((folder / "x\x1b").write_bytes(b"?"), seal(folder, {"kind": "reference"}, describe_folder(folder))), "not a shard of reference log-probs"),
    "nothing said": (lambda folder, paths: seal(folder, {"kind": "dataset"}, {}), "expected a reference artefact"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_artefact_takes_one_line_and_the_dataset_is_shown(tmp_path, capsys, damage):
    split = make_split(numbered_rows(8))
    config = save_run(tmp_path, {"train": split})
    paths = save_reference(config, score({"train": split}))
    change, problem = DAMAGE[damage]
    change(config.reference_dir, paths)
    output = inspect(config, capsys)
    [line] = part_of(output).splitlines()[2:]
    assert line.startswith(f"notice: train will refuse this artefact. {config.reference_dir}") and problem in line and "; run kto-ds precompute-ref" in line
    assert dataset_is_shown(output) and "nats" not in output and "\x1b" not in output


@pytest.mark.parametrize("made", [{}, {"identity": [], "origin": 3, "libraries": None}, {"identity": {"dtype": ["\x1b"]}, "layout": {"a": "\n"}, "origin": {}}])
def test_facts_of_any_manifest_are_printable(made):
    cells = [str(cell) for column in facts_table(made).columns for cell in column.cells]
    assert all(cell.isprintable() for cell in cells) and "single tokens" in cells


# the stages themselves


def test_after_prepare_and_precompute_ref(tmp_path, capsys):
    make_model(tmp_path / "model", seed=0)
    rows = [{"prompt": f"t{3 + number // 3} t4", "completion": f" t{5 + number} t7", "label": number % 2 == 0} for number in range(30)]
    for name, part in (("rows", rows[:24]), ("more", rows[24:])):
        write_rows(tmp_path / f"{name}.jsonl", part)
    write_config(
        tmp_path / "run.yaml", output_dir=str(tmp_path / "run"), model={"path": str(tmp_path / "model"), "dtype": "float32"},
        data={"train": [{"path": str(tmp_path / "rows.jsonl")}], "max_length": 12, "dataset_num_proc": 1},
        batch={"global_batch_size": 16, "max_tokens_per_microbatch": 64}, reference={"max_tokens_per_microbatch": 32, "per_token": "true"},
    )  # fmt: skip

    def run(command: str, *overrides: str) -> str:
        capsys.readouterr()
        assert cli.run([command, "--config", str(tmp_path / "run.yaml"), *overrides]) == 0
        return capsys.readouterr().out

    run("prepare")
    assert "missing: run kto-ds precompute-ref" in run("inspect")
    run("precompute-ref")
    stored = read_shards((tmp_path / "run" / "reference").glob("*.safetensors"))
    output = run("inspect")
    split = TokenizedSplit.load(tmp_path / "run" / "dataset" / "train")
    assert table_of(output) == expected_table({"train": split}, stored) and "train would find every pair" in output and "notice" not in output
    assert str(json.loads((tmp_path / "run" / "reference" / MANIFEST).read_text())["identity"]["reference model"])[:12] in output
    assert re.search("single tokens +each has its log-prob", output)
    both = json.dumps([{"path": str(tmp_path / f"{name}.jsonl")} for name in ("rows", "more")])
    run("prepare", "--data.train", both)
    output = run("inspect", "--data.train", both)
    assert re.search("train +24 of 30 +", output) and "have no log-prob; run kto-ds" in output
    assert "made with other settings" in output and "\n  sources: this run has " in output
