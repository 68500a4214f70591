"""Faults in the artefacts of a run, each injected on its own: train refuses every one before step 1, and takes every clean artefact.

The counts of docs/reliability.md are those of this file; the test at the end holds the page to them.
"""

import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kto_ds import cli
from kto_ds.artifacts import MANIFEST, MAX_JSON_BYTES, canonical_json, describe_file, digest_of, read_manifest, seal
from kto_ds.data.keys import find
from kto_ds.data.reference import ReferenceRows, read_shards
from tests.distributed.runs import ROOT, environment, number_tokenizer, write_config, write_rows
from tests.faults.ledger import tally
from tests.unit.test_precompute import rows
from tests.unit.test_refusals import VOCAB_SIZE, make_model

FLIPS, CLEAN_RUNS, MUTATIONS, PICKLES = 200, 20, 2000, 7
ONE_STEP = ("--train.max_steps", 1, "--deepspeed.config", "zero0")


class Run(NamedTuple):
    """A prepared run (model, rows, both artefacts), the copies of its artefacts that a test may damage, and where train would write."""

    base: Path
    dataset: Path
    reference: Path
    output_dir: Path

    @property
    def shards(self) -> list[Path]:
        return sorted(self.reference.glob("*.safetensors"))

    def command(self, command: str, *overrides: object) -> int:
        places = ("--output_dir", self.output_dir, "--data.artifact", self.dataset, "--reference.artifact", self.reference)
        return cli.run([command, "--config", str(self.base / "run.yaml"), *map(str, [*places, *overrides])])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    make_model(folder / "model", seed=0)
    write_rows(folder / "rows.jsonl", rows(0, 90))
    write_rows(folder / "eval.jsonl", rows(90, 102))
    write_config(
        folder / "run.yaml",
        output_dir=str(folder / "run"),
        model={"path": str(folder / "model"), "dtype": "float32"},
        data={"train": [{"path": str(folder / "rows.jsonl")}], "eval": [{"path": str(folder / "eval.jsonl")}], "max_length": 12, "dataset_num_proc": 1},
        batch={"global_batch_size": 16, "max_tokens_per_microbatch": 64},
        reference={"max_tokens_per_microbatch": 128},
    )
    for command in ("prepare", "precompute-ref"):
        assert cli.run([command, "--config", str(folder / "run.yaml")]) == 0
    return folder


def copy_of(base: Path, folder: Path) -> Run:
    for name in ("dataset", "reference"):
        shutil.copytree(base / "run" / name, folder / name)
    return Run(base, folder / "dataset", folder / "reference", folder / "out")


@pytest.fixture
def run(base, tmp_path) -> Run:
    return copy_of(base, tmp_path)


@pytest.fixture(scope="module")
def shared(base, tmp_path_factory) -> Run:
    """For tests that put back what they damage."""
    return copy_of(base, tmp_path_factory.mktemp("shared"))


def state_of_files(run: Run) -> dict[str, tuple]:
    """What tells whether anything was written, but for what marks the folder of a run as its own."""
    found = {}
    for path in run.dataset.parent.rglob("*"):
        if path != run.output_dir and not {"status.json", ".lock", "ranks", "stacks", "logs"} & set(path.parts):
            status = path.lstat()
            found[path.relative_to(run.dataset.parent).as_posix()] = (status.st_mode, status.st_size, status.st_mtime_ns, status.st_ino)
    return found


def refuse(run: Run, capsys, *overrides: object, saying: tuple | list = ()) -> str:
    """Train must end with code 2 and one message, and neither wait, nor write a metric, a checkpoint or anything else; the message is returned."""
    with tally("R8", "an artefact that is damaged or of another run: `train` refuses it before step 1") as counts:
        counts.injected += 1
        before = state_of_files(run)
        capsys.readouterr()
        signal.alarm(60)  # a FIFO that is opened never answers
        try:
            assert run.command("train", *ONE_STEP, *overrides) == 2, capsys.readouterr().err[-3000:]
        finally:
            signal.alarm(0)
        printed = capsys.readouterr()
        assert printed.err.count("kto-ds: error:") == 1 and "Traceback" not in printed.err + printed.out
        assert len(printed.err) < 5000 and "step 1" not in printed.out
        for text in saying:
            assert text in printed.err, printed.err
        assert state_of_files(run) == before, "something was written"
        assert not [path for path in run.output_dir.glob("*") if path.name not in ("status.json", ".lock", "ranks", "stacks", "logs")]
        counts.survived += 1
    return printed.err


@contextmanager
def restored(path: Path, *others: Path) -> Iterator[None]:
    """Put files back as they were, whatever lies in their place then."""
    contents = [(target, target.read_bytes()) for target in (path, *others)]
    try:
        yield
    finally:
        for target, content in contents:
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            target.unlink(missing_ok=True)
            target.write_bytes(content)


def files_of(run: Run) -> list[Path]:
    return sorted(path for folder in (run.dataset, run.reference) for path in folder.rglob("*") if path.is_file())


# Damage: single bits


@pytest.mark.parametrize("count", [60, pytest.param(FLIPS, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_found_and_its_file_named(run, capsys, count):
    """Over all files in turn; in a shard now in the header, now in the data."""
    chance = random.Random(count)
    files = [path for path in files_of(run) if path.stat().st_size]
    assert len(files) <= 60 and len(run.shards) == 9
    refused = 0
    for number, path in zip(range(count), itertools.cycle(files)):
        content = bytearray(path.read_bytes())
        header = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else 0
        start, stop = (0, header) if header and (number // len(files)) % 2 == 0 else (header, len(content))
        bit = chance.randrange(8 * start, 8 * stop)
        content[bit // 8] ^= 1 << bit % 8
        with restored(path):
            path.write_bytes(content)
            refuse(run, capsys, saying=["damaged", path.name])
        refused += 1
    assert refused == count
    assert run.command("train", *ONE_STEP) == 0, "put back, all is well"


# Damage: whole files


def cut_to_nothing(path: Path, _: Run) -> None:
    path.write_bytes(b"")


def cut_by_a_byte(path: Path, _: Run) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def cut_to_half(path: Path, _: Run) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def grown_by_a_byte(path: Path, _: Run) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def half_of_zeros(path: Path, _: Run) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2].ljust(len(content), b"\0"))


def deleted(path: Path, _: Run) -> None:
    path.unlink()


def a_folder(path: Path, _: Run) -> None:
    path.unlink()
    path.mkdir()


def a_fifo(path: Path, _: Run) -> None:
    path.unlink()
    os.mkfifo(path)


def a_link_to_the_right_content(path: Path, run: Run) -> None:
    target = run.base / "run" / path.relative_to(run.dataset.parent)
    assert target.read_bytes() == path.read_bytes()
    path.unlink()
    path.symlink_to(target)


FILE_FAULTS = (cut_to_nothing, cut_by_a_byte, cut_to_half, grown_by_a_byte, half_of_zeros, deleted, a_folder, a_fifo, a_link_to_the_right_content)
KINDS = {
    "shard": "reference/scored-000003.*",
    "manifest of the reference": "reference/manifest.json",
    "tokens": "dataset/train/completion_tokens.npy",
    "groups of an evaluation split": "dataset/eval/kl_group_of.npy",
    "names of the sources": "dataset/train/files.json",
    "report": "dataset/data_report.json",
    "manifest of the dataset": "dataset/manifest.json",
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_fault_of_a_whole_file_is_found_and_the_file_named(run, capsys, kind):
    [path] = run.dataset.parent.glob(KINDS[kind])
    for fault in FILE_FAULTS:
        with restored(path):
            fault(path, run)
            # Without a manifest there is no artefact, whatever else lies there.
            is_gone = fault is deleted and path.name == MANIFEST
            refuse(run, capsys, saying=[f"{path.parent.name} artefact is missing"] if is_gone else ["damaged", path.name])


REMEDIES = [(kind, fault) for kind in ("shard", "manifest of the reference", "tokens", "manifest of the dataset") for fault in FILE_FAULTS]
TRIED_ALWAYS = (("manifest of the reference", a_fifo), ("tokens", a_folder))


@pytest.mark.parametrize(("kind", "fault"), [pytest.param(*case, marks=[] if case in TRIED_ALWAYS else pytest.mark.slow) for case in REMEDIES])
def test_the_command_that_the_message_names_makes_the_artefact_anew(run, capsys, kind, fault):
    [path] = run.dataset.parent.glob(KINDS[kind])
    fault(path, run)
    error = refuse(run, capsys)
    command = re.search(r"remedy: run kto-ds (\S+)", error)[1]
    assert command == ("prepare" if run.dataset in path.parents else "precompute-ref")
    assert run.command(command) == 0 and run.command("train", *ONE_STEP) == 0


def swap_contents(one: Path, two: Path) -> None:
    first, second = one.read_bytes(), two.read_bytes()
    assert first != second
    one.write_bytes(second)
    two.write_bytes(first)


def swap_names(one: Path, two: Path) -> None:
    one.rename(spare := one.with_name("spare"))
    two.rename(one)
    spare.rename(two)


def with_another_number(path: Path, _: Path) -> None:
    path.rename(path.with_name(path.name.replace("scored-", "scored-9")))


def one_twice(one: Path, two: Path) -> None:
    two.write_bytes(one.read_bytes())


SHARD_MIXES = (swap_contents, swap_names, with_another_number, one_twice)
# Arrays of one size and dtype, so that nothing but their digests tells them apart.
ARRAY_SWAPS = (("prompt_of", "mismatched_prompt_of"), ("kl_group_of", "matched_lengths"), ("row_of", "prompt_of"))


def test_files_that_are_mixed_up_are_found(run, capsys):
    one, two = run.shards[1:3]
    assert one.stat().st_size == two.stat().st_size
    for mix in SHARD_MIXES:
        with restored(one, two):
            mix(one, two)
            error = refuse(run, capsys, saying=["damaged"])
            assert one.name in error or two.name in error
        for path in run.reference.glob("scored-9*"):
            path.unlink()
    for names in ARRAY_SWAPS:
        one, two = (run.dataset / "train" / f"{name}.npy" for name in names)
        assert one.stat().st_size == two.stat().st_size
        with restored(one, two):
            swap_contents(one, two)
            refuse(run, capsys, saying=["damaged", f"train/{names[0]}.npy", f"train/{names[1]}.npy"])


# Mix-ups: artefacts that are whole, of something else


def other_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    arrays = load_file(path)
    name = min(arrays)
    arrays[name] = arrays[name].copy()
    arrays[name].flat[3] += 0.001
    save_file(arrays, path, metadata={"format": "pt"})


def other_tokenizer(folder: Path) -> None:
    number_tokenizer(VOCAB_SIZE - 1).save_pretrained(folder)


def other_chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}! {% endfor %}")


def copy_of_model(run: Run, *changes: Callable[[Path], None]) -> Path:
    folder = run.dataset.parent / "other"
    shutil.copytree(run.base / "model", folder)
    for change in changes:
        change(folder)
    return folder


def both_values(error: str, field: str) -> tuple[str, str]:
    """The two values that a message gives for a field."""
    found = re.search(rf"^ *{re.escape(field)}: this run has (.+), the artefact (?:has|was made with) (.+)$", error, re.MULTILINE)
    assert found and found[1] != found[2], error
    return found[1], found[2]


def identity_of(folder: Path, kind: str) -> dict:
    return read_manifest(folder, kind=kind, remedy="")["identity"]


# Field -> options of a run for which neither artefact was made, whether the reference names the field by itself once the dataset is of that run.
OTHER_RUNS = {
    "max_length": (("--data.max_length", 10), "12"),
    "truncation_mode": (("--data.truncation_mode", "drop"), "'keep_start'"),
    "seed": (("--seed", 7), "42"),
    "kl_group_size": (("--data.kl_group_size", 2), "4"),
    "shuffle": (("--data.shuffle", "false"), "True"),
    "max_completion_length": (("--data.max_completion_length", 3), "None"),
    "append_eos": (("--data.append_eos", "false"), "True"),
}


@pytest.mark.parametrize("field", [field if field in ("max_length", "seed") else pytest.param(field, marks=pytest.mark.slow) for field in OTHER_RUNS])
def test_the_dataset_of_another_run_is_refused_and_then_its_reference(run, capsys, field):
    options, made_with = OTHER_RUNS[field]
    error = refuse(run, capsys, *options, saying=[str(run.dataset), "does not belong to this run", "kto-ds prepare"])
    assert both_values(error, field)[1] == made_with
    assert run.command("prepare", *options) == 0
    clear_output(run)
    error = refuse(run, capsys, *options, saying=[str(run.reference), "kto-ds precompute-ref"])
    assert both_values(error, field)[1] == made_with
    assert run.command("precompute-ref", *options) == 0 and run.command("train", *ONE_STEP, *options) == 0


def clear_output(run: Run) -> None:
    for path in run.output_dir.glob("*"):
        if path.name != ".lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(("change", "field"), [(other_tokenizer, "tokenizer"), (other_chat_template, "chat_template")])
def test_another_tokenizer_or_template_is_refused_by_dataset_and_reference(run, capsys, change, field):
    options = ("--model.path", copy_of_model(run, change))
    before = identity_of(run.dataset, "dataset")[field]
    error = refuse(run, capsys, *options, saying=[str(run.dataset), "kto-ds prepare"])
    assert both_values(error, field)[1] == repr(before)
    assert run.command("prepare", *options) == 0
    clear_output(run)
    error = refuse(run, capsys, *options, saying=[str(run.reference), "kto-ds precompute-ref"])
    assert both_values(error, field) == (repr(identity_of(run.dataset, "dataset")[field]), repr(before))
    assert run.command("precompute-ref", *options) == 0 and run.command("train", *ONE_STEP, *options) == 0


def test_another_model_is_refused_with_its_name_and_digest(run, capsys):
    other = copy_of_model(run, other_weights)
    made_with = repr(identity_of(run.reference, "reference")["reference model"])
    for option in ("--model.path", "--reference.path"):
        error = refuse(run, capsys, option, other, saying=[str(run.reference), "kto-ds precompute-ref"])
        assert both_values(error, "reference model")[1] == made_with
        assert both_values(error, "model.path") == (repr(str(other)), repr(str(run.base / "model")))
    # The same name, its content changed since.
    here = run.base / "model" / "model.safetensors"
    with restored(here):
        other_weights(here.parent)
        error = refuse(run, capsys, saying=[str(run.reference)])
        assert both_values(error, "reference model")[1] == made_with and "model.path" not in error


@pytest.mark.parametrize("option", ["--model.dtype", "--reference.dtype"])
def test_another_dtype_is_refused(run, capsys, option):
    assert both_values(refuse(run, capsys, option, "bfloat16"), "dtype") == ("'bfloat16'", "'float32'")


def test_rows_that_were_edited_since_are_refused_by_dataset_and_reference(run, capsys):
    path = run.base / "rows.jsonl"
    with restored(path):
        edited = rows(0, 90)
        edited[5]["completion"] += " t9"
        write_rows(path, edited)
        refuse(run, capsys, saying=["rows.jsonl' has changed since prepare", "kto-ds prepare"])
        assert run.command("prepare") == 0
        clear_output(run)
        refuse(run, capsys, saying=["have no reference log-prob", "rows.jsonl:6", "kto-ds precompute-ref"])


SEVERAL_COMMANDS = "import json, sys; from kto_ds import cli; print('exit codes:', [cli.run(command) for command in json.loads(sys.argv[1])])"
REVISIONS = {"1" * 40: (), "2" * 40: (other_weights,), "3" * 40: (), "4" * 40: (other_tokenizer,)}


@pytest.mark.slow
def test_another_revision_of_the_same_model_is_refused(run):
    """A hub cache on disk. Another commit of the same files is the same model."""
    model = run.dataset.parent / "hub" / "models--org--name"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("1" * 40)
    for commit, changes in REVISIONS.items():
        shutil.copytree(run.base / "model", model / "snapshots" / commit)
        for change in changes:
            change(model / "snapshots" / commit)
    places = ["--config", run.base / "run.yaml", "--output_dir", run.output_dir, "--model.path", "org/name"]
    for folder in (run.dataset, run.reference):
        shutil.rmtree(folder)
    places += ["--data.artifact", run.dataset, "--reference.artifact", run.reference]
    commands = [[command, "--model.revision", "1" * 40] for command in ("prepare", "precompute-ref")]
    commands += [["train", *ONE_STEP, "--model.revision", commit] for commit in ("2" * 40, "4" * 40, "3" * 40)]
    lines = json.dumps([[str(part) for part in [*command, *places]] for command in commands])
    # Not what this process set for its own group.
    variables = {name: value for name, value in environment().items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    variables |= {"HF_HUB_CACHE": str(model.parent), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", SEVERAL_COMMANDS, lines], env=variables, cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert "exit codes: [0, 0, 2, 2, 0]" in done.stdout, done.stdout + done.stderr
    _, of_weights, of_tokenizer = done.stderr.split("kto-ds: error:")
    assert both_values(of_weights, "model.revision") == (repr("2" * 40), repr("1" * 40)) and both_values(of_weights, "reference model")
    assert str(run.dataset) in of_tokenizer and both_values(of_tokenizer, "tokenizer")


# Values that cannot be, under digests that fit


def seal_again(folder: Path, kind: str, changed: Path) -> None:
    """Make an artefact's manifest anew, with the size and digest that a file has now."""
    manifest = read_manifest(folder, kind=kind, remedy="")
    seal(folder, manifest, {**manifest["files"], changed.relative_to(folder).as_posix(): describe_file(changed)})


def at(place: int, value: float) -> Callable[[dict], dict]:
    return lambda arrays: {**arrays, "logps": np.where(np.arange(len(arrays["logps"])) == place, np.float32(value), arrays["logps"])}


def column(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict], dict]:
    return lambda arrays: {**arrays, name: np.array(change(arrays[name]), order="C")}


def all_columns(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict], dict]:
    return lambda arrays: {name: np.ascontiguousarray(change(value)) for name, value in arrays.items()}


NOT_A_LOGP = "1 of {rows} log-probs are not finite, 0 or above 0"
BAD_VALUES = {
    "NaN": (at(2, math.nan), NOT_A_LOGP),
    "+inf": (at(0, math.inf), NOT_A_LOGP),
    "-inf": (at(3, -math.inf), NOT_A_LOGP),
    "positive": (at(2, 0.25), NOT_A_LOGP),
    "least positive": (at(2, 1e-45), NOT_A_LOGP),
    "0.0": (at(1, 0.0), NOT_A_LOGP),
    "-0.0": (at(1, -0.0), NOT_A_LOGP),
    "all NaN": (column("logps", lambda logps: logps * math.nan), "{rows} of {rows} log-probs"),
    "all 0": (column("logps", np.zeros_like), "{rows} of {rows} log-probs"),
    "a row missing": (all_columns(lambda values: values[1:]), "have no reference log-prob"),
    "all rows missing": (all_columns(lambda values: values[:0]), "have no reference log-prob"),
    "a row twice": (all_columns(lambda values: np.concatenate([values, values[-1:]])), "are there twice"),
    "another key": (column("keys", lambda keys: keys ^ np.uint64(1)), "have no reference log-prob"),
    "another length": (column("num_tokens", lambda lengths: lengths + 1), "of another length than its completion"),
    "length 0": (column("num_tokens", np.zeros_like), "do not fit together"),
    "a negative length": (column("num_tokens", np.negative), "do not fit together"),
    "logps as float64": (column("logps", lambda logps: logps.astype(np.float64)), "do not fit together"),
    "logps as int32": (column("logps", lambda logps: logps.astype(np.int32)), "do not fit together"),
    "keys as int64": (column("keys", lambda keys: keys.view(np.int64)), "do not fit together"),
    "lengths as int64": (column("num_tokens", lambda lengths: lengths.astype(np.int64)), "do not fit together"),
    "lengths as float32": (column("num_tokens", lambda lengths: lengths.astype(np.float32)), "do not fit together"),
    "logps in two dimensions": (column("logps", lambda logps: logps[:, None]), "do not fit together"),
    "one logp without dimensions": (column("logps", lambda logps: np.array(logps[0])), "do not fit together"),
    "keys in one dimension": (column("keys", np.ravel), "do not fit together"),
    "fewer keys": (column("keys", lambda keys: keys[1:]), "do not fit together"),
    "an extra tensor": (lambda arrays: {**arrays, "more": np.zeros(3, np.float32)}, "do not fit together"),
    "tokens that do not add up": (lambda arrays: {**arrays, "token_logps": np.zeros(1, np.float32)}, "do not fit together"),
    "NaN among the tokens": (lambda arrays: {**arrays, "token_logps": np.full(arrays["num_tokens"].sum(), math.nan, np.float32)}, "not finite"),
    "a missing tensor": (lambda arrays: {name: value for name, value in arrays.items() if name != "num_tokens"}, "not a shard of reference log-probs"),
    "no tensor": (lambda arrays: {}, "not a shard of reference log-probs"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_a_shard_with_values_that_cannot_be_is_refused(shared, capsys, case):
    change, saying = BAD_VALUES[case]
    shard = shared.shards[2]
    arrays = load_file(shard)
    with restored(shard, shared.reference / MANIFEST):
        save_file(change(arrays), shard)
        seal_again(shared.reference, "reference", shard)
        refuse(shared, capsys, saying=[str(shared.reference), saying.format(rows=len(arrays["logps"]))])


class Payload:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mknod, (str(self.marker),)


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def claims(**entries: dict) -> bytes:
    return with_header(json.dumps(entries).encode(), b"\0" * 64)


HUGE = {"dtype": "F32", "shape": [10 << 28], "data_offsets": [0, 10 << 30]}
NO_SHARDS = {
    "an empty file": b"",
    "7 bytes": b"\1" * 7,
    "zeros": b"\0" * 4096,
    "a header of 100 MB": (100_000_001).to_bytes(8, "little") + b"{}",
    "a header of 2**64 - 1 bytes": b"\xff" * 8 + b"{}",
    "a header that is longer than the file": (400).to_bytes(8, "little") + b"{}",
    "a tensor of 10 GB": claims(logps=HUGE),
    "a shape that overflows": claims(logps={"dtype": "F32", "shape": [1 << 63, 1 << 63], "data_offsets": [0, 64]}),
    "offsets that run backwards": claims(logps={"dtype": "F32", "shape": [16], "data_offsets": [64, 0]}),
    "negative offsets": claims(logps={"dtype": "F32", "shape": [16], "data_offsets": [-64, 0]}),
    "tensors that overlap": claims(keys={"dtype": "U64", "shape": [4, 2], "data_offsets": [0, 64]}, logps={"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}),
    "an unknown dtype": claims(logps={"dtype": "X9", "shape": [16], "data_offsets": [0, 64]}),
    "a dtype numpy has not": claims(logps={"dtype": "F8_E5M2", "shape": [64], "data_offsets": [0, 64]}),
    "a header that is no JSON": with_header(b"not JSON"),
    "a header that is a list": with_header(b"[1, 2]"),
    "a header that is nested deeply": with_header(b"[" * 100_000),
    "a header that is not UTF-8": with_header(b'{"\xff": 1}'),
    "a NumPy file": b"\x93NUMPY\x01\x00v\x00",
}


@pytest.mark.parametrize("case", NO_SHARDS)
def test_a_shard_that_is_none_is_refused(shared, capsys, case):
    shard = shared.shards[2]
    with restored(shard, shared.reference / MANIFEST):
        shard.write_bytes(NO_SHARDS[case])
        seal_again(shared.reference, "reference", shard)
        refuse(shared, capsys, saying=[shard.name, "not a shard of reference log-probs"])


def test_a_shard_beyond_every_size_is_not_read(run, capsys):
    shard = run.shards[2]
    os.truncate(shard, 257 << 20)
    seal_again(run.reference, "reference", shard)
    refuse(run, capsys, saying=[shard.name, "no shard has more than"])


def test_nothing_is_unpickled(run, capsys):
    """A pickle in place of a shard, of the list of files, of an array, and as an array of objects."""
    marker = run.dataset.parent / "marker"
    loaded = pickle.loads(content := pickle.dumps(Payload(marker)))
    assert loaded is None and marker.exists(), "the payload works"
    marker.unlink()
    objects = np.array([Payload(marker)] * 90, dtype=object)
    np.save(run.dataset.parent / "objects.npy", objects, allow_pickle=True)
    array_of_objects = (run.dataset.parent / "objects.npy").read_bytes()
    cases = [(content, run.reference, run.shards[2]), (array_of_objects, run.reference, run.shards[2])]
    cases += [(content, run.dataset, run.dataset / "train" / name) for name in ("desirable.npy", "files.json")]
    cases += [(array_of_objects, run.dataset, run.dataset / name) for name in ("train/kl_group_of.npy", "eval/pair_keys.npy", "train/files.json")]
    assert len(cases) == PICKLES
    for changed, folder, path in cases:
        with restored(path, folder / MANIFEST):
            path.write_bytes(changed)
            seal_again(folder, folder.name, path)
            refuse(run, capsys, saying=[path.name])
    assert not marker.exists()


BAD_ARRAYS = {
    "an empty file": b"",
    "an archive": b"PK\x03\x04" + b"\0" * 200,
    "numbers with a point": np.lib.format.magic(1, 0) + b"v\0" + b"{'descr': '<f8', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n" + b"\0" * 8,
    "two dimensions": np.lib.format.magic(1, 0) + b"v\0" + b"{'descr': '<i8', 'fortran_order': False, 'shape': (1, 1), }".ljust(117) + b"\n" + b"\0" * 8,
    "10 GB claimed": np.lib.format.magic(1, 0) + b"v\0" + b"{'descr': '<i8', 'fortran_order': False, 'shape': (1342177280,), }".ljust(117) + b"\n" + b"\0" * 8,
    "a header nested deeply": np.lib.format.magic(1, 0) + (9000).to_bytes(2, "little") + b"(" * 9000,
    "a header of 4 GB": np.lib.format.magic(2, 0) + b"\xff\xff\xff\xff{}",
    "a header that is a call": np.lib.format.magic(1, 0) + b"v\0" + b"__import__('os').abort()".ljust(118),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_an_array_of_the_dataset_that_is_none_is_refused(shared, capsys, case):
    path = shared.dataset / "train" / "row_of.npy"
    with restored(path, shared.dataset / MANIFEST):
        path.write_bytes(BAD_ARRAYS[case])
        seal_again(shared.dataset, "dataset", path)
        refuse(shared, capsys, saying=["'train/row_of.npy' is not an array"])


# Manifests that say what cannot be, under a digest of their own that fits


def write_manifest(folder: Path, content: dict) -> None:
    """Whatever the content, its own digest fits: what reads on has to look."""
    content = {key: value for key, value in content.items() if key != "digest"}
    (folder / MANIFEST).write_text(json.dumps({**content, "digest": digest_of(canonical_json(content))}))


def entry_named(name: str) -> Callable[[dict], dict]:
    """One more file, of this name."""
    return lambda manifest: {**manifest, "files": {**manifest["files"], name: {"bytes": 5, "digest": "0" * 32}}}


def first_entry(**changes: object) -> Callable[[dict], dict]:
    def change(manifest: dict) -> dict:
        name, entry = next(iter(manifest["files"].items()))
        return {**manifest, "files": {**manifest["files"], name: {**entry, **changes}}}

    return change


def field(name: str, value: object) -> Callable[[dict], dict]:
    return lambda manifest: {**manifest, name: value}


def without(name: str) -> Callable[[dict], dict]:
    return lambda manifest: {key: value for key, value in manifest.items() if key != name}


def identity(**changes: object) -> Callable[[dict], dict]:
    return lambda manifest: {**manifest, "identity": {**manifest["identity"], **changes}}


BAD_NAMES = ("../x", "/etc/passwd", "a/../../x", "a\0b", "", ".", "..", MANIFEST, "./x", "a//b", "a/", "\ud800", "../reference/manifest.json", "a" * 5000, "\x1b[2J")
OTHER_TYPES = (None, [], "text", 7, True, [["a", "b"]])
BAD_MANIFESTS = {
    **{f"a file named {name[:30]!a}": entry_named(name) for name in BAD_NAMES},
    **{f"a file of {value!a} bytes": first_entry(bytes=value) for value in (-1, 10**30, 10 << 30, "488", 488.0, True, None, [1])},
    **{f"the digest {value!a}": first_entry(digest=value) for value in ("", "0" * 31, "0" * 33, "g" * 32, 7, None, "0" * 32, "00" * 40)},
    "an entry with more": first_entry(mode=0o777),
    "an entry that is text": lambda manifest: {**manifest, "files": {name: "0" * 32 for name in manifest["files"]}},
    "another kind": field("kind", "checkpoint"),
    **{f"kind {value!a}": field("kind", value) for value in OTHER_TYPES},
    **{f"format {value!a}": field("format", value) for value in (2, 4, "3", 3.0, [3], None, 10**30)},
    **{f"no {name}": without(name) for name in ("format", "kind", "files", "identity")},
    **{f"files {value!a}": field("files", value) for value in OTHER_TYPES},
    "no files at all": field("files", {}),
    **{f"identity {value!a}": field("identity", value) for value in (*OTHER_TYPES, {})},
    "an identity with a list": identity(max_length=[12]),
    "an identity with text": identity(max_length="12"),
    "an identity with a mapping": identity(max_length={"max_length": 12}),
}
OF_ONE_KIND = {
    "reference": {
        **{f"per_token {value!a}": field("per_token", value) for value in (None, "no", 0)},
        "no per_token": without("per_token"),
        "an identity of another model": identity(**{"reference model": "0" * 32}),
    },
    "dataset": {
        **{f"splits {value!a}": field("splits", value) for value in (*OTHER_TYPES, {}, ["train", "../dataset/train"], ["/train"], ["eval"], [["train"]], ["train", "more"])},
        "no splits": without("splits"),
        **{f"contents {value!a}": identity(contents=value) for value in OTHER_TYPES},
        "sources of another type": identity(sources=["train"]),
    },
}
MANIFEST_CASES = [(kind, case) for kind in ("dataset", "reference") for case in (*BAD_MANIFESTS, *OF_ONE_KIND[kind])]


def in_turns(cases: list[tuple[str, str]]) -> list:
    """What is the same for both kinds goes through one of them in the fast run."""
    marks = [[pytest.mark.slow] if case in BAD_MANIFESTS and (kind == "dataset") == bool(list(BAD_MANIFESTS).index(case) % 2) else [] for kind, case in cases]
    return [pytest.param(*names, marks=found, id=f"{names[0]}-{number}") for number, (names, found) in enumerate(zip(cases, marks))]


@pytest.mark.parametrize(("kind", "case"), in_turns(MANIFEST_CASES))
def test_a_manifest_that_says_what_cannot_be_is_refused(shared, capsys, kind, case):
    change = {**BAD_MANIFESTS, **OF_ONE_KIND[kind]}[case]
    folder = shared.dataset if kind == "dataset" else shared.reference
    (folder.parent / "x").write_bytes(b"12345")  # where a name that leads out of the folder would arrive
    with restored(folder / MANIFEST):
        write_manifest(folder, change(json.loads((folder / MANIFEST).read_text())))
        error = refuse(shared, capsys, saying=[str(folder), f"kto-ds {'prepare' if kind == 'dataset' else 'precompute-ref'}"])
    assert "\x1b" not in error


def nested(depth: int, brackets: str = "[]") -> str:
    return f'{{"format": 3, "kind": "reference", "identity": {"[" * depth}{"]" * depth}}}'


RAW_MANIFESTS = {
    "empty": "",
    "no JSON": "{",
    "a list": "[3]",
    "a number": "3",
    "null": "null",
    "not UTF-8": b'{"format": 3, "\xff": 1}',
    "a key twice": '{"format": 3, "format": 3}',
    "nested deeply": nested(100_000),
    "a number of 10,000 digits": '{"format": 3, "kind": ' + "9" * 10_000 + "}",
    "NaN": '{"format": NaN}',
    "70 MB": '{"format": 3}' + " " * (70 << 20),
}


@pytest.mark.parametrize("case", RAW_MANIFESTS)
def test_a_manifest_that_is_none_is_refused(shared, capsys, case):
    content = RAW_MANIFESTS[case]
    assert case != "70 MB" or len(content) > MAX_JSON_BYTES
    for folder in (shared.dataset, shared.reference):
        with restored(folder / MANIFEST):
            (folder / MANIFEST).write_bytes(content if isinstance(content, bytes) else content.encode())
            refuse(shared, capsys, saying=[str(folder / MANIFEST)])


DEPTHS = (200, *range(800, 1001))


@pytest.mark.parametrize("depths", [DEPTHS[::25], pytest.param(DEPTHS, marks=pytest.mark.slow)], ids=["some", "all"])
def test_no_depth_of_nesting_gets_through_as_anything_but_a_message(run, capsys, depths):
    """Around the depth at which Python gives up: one function may still manage what the next one cannot."""
    shallow = json.loads((run.reference / MANIFEST).read_text())
    for number, depth in enumerate(depths):
        deep: object = 1
        for _ in range(depth):
            deep = {"a": deep} if number % 2 else [deep]
        content = {key: value for key, value in {**shallow, "identity": {**shallow["identity"], "max_length": deep}}.items() if key != "digest"}
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(10_000)
        try:
            write_manifest(run.reference, content)
        finally:
            sys.setrecursionlimit(limit)
        refuse(run, capsys, saying=[str(run.reference)])


@pytest.mark.parametrize("of_folder", [False, True])
def test_links_below_the_folder_are_not_followed(run, capsys, of_folder):
    """The content is right, and so are all digests."""
    target = run.dataset / "train" if of_folder else run.dataset / "train" / "row_of.npy"
    target.rename(run.dataset.parent / "elsewhere")
    target.symlink_to(run.dataset.parent / "elsewhere")
    refuse(run, capsys, saying=["row_of.npy' is not a plain file inside the folder"] if not of_folder else ["train/", "is not a plain file inside the folder"])
    target.unlink()
    (run.dataset.parent / "elsewhere").rename(target)
    run.dataset.rename(run.dataset.parent / "moved")
    run.dataset.symlink_to(run.dataset.parent / "moved")
    assert run.command("train", *ONE_STEP) == 0, "the folder itself may lie elsewhere: the user said so"


# Clean artefacts


HELD_OUT = ("--data.held_out_fraction", 0.3)
CLEAN = (
    (),
    ("--model.layout", "packed"),
    ("--reference.per_token", "true"),
    ("--loss.loss_type", "apo_zero_unpaired", "--seed", 3),
    ("--model.layout", "padded", "--seed", 1),
    ("--model.dtype", "bfloat16"),
    ("--model.dtype", "bfloat16", "--model.layout", "packed", "--seed", 2),
    ("--model.dtype", "bfloat16", "--model.layout", "padded"),
    ("--reference.dtype", "bfloat16", "--seed", 11),
    ("--data.eval", "[]", "--seed", 5),
    ("--data.eval", "[]", *HELD_OUT),
    (*HELD_OUT, "--model.layout", "packed", "--reference.per_token", "true"),
    ("--data.max_length", 6, "--data.kl_group_size", 2),
    ("--data.max_length", 7, "--data.truncation_mode", "drop", "--seed", 8),
    ("--data.max_completion_length", 2, "--data.append_eos", "false"),
    ("--data.kl_group_size", 8, "--batch.global_batch_size", 30),
    ("--data.shuffle", "false", "--loss.desirable_weight", "auto", "--loss.undesirable_weight", "auto"),
    ("--loss.loss_type", "apo_zero_unpaired", "--model.dtype", "bfloat16", "--reference.per_token", "true"),
    ("--reference.max_tokens_per_microbatch", 24, "--batch.max_tokens_per_microbatch", 24, "--seed", 13),
    ("taken over",),
)


@pytest.mark.parametrize("number", [number if number in (10, 19) else pytest.param(number, marks=pytest.mark.slow) for number in range(CLEAN_RUNS)])
def test_a_clean_artefact_is_taken(run, capsys, number):
    """Rows of their own each: other lengths, other labels, another number of them."""
    chance = random.Random(number)

    def text(size: int) -> str:
        return " ".join(f"t{chance.randrange(3, VOCAB_SIZE)}" for _ in range(size))
    made = [{"prompt": text(chance.randrange(1, 4)), "completion": " " + text(chance.randrange(1, 6)), "label": chance.random() < 0.6} for _ in range(40 + 3 * number)]
    made[:2] = [{**made[0], "label": True}, {**made[1], "label": False}]
    path = write_rows(run.dataset.parent / "clean.jsonl", made[:-8])
    options = ["--data.train", json.dumps([{"path": str(path)}]), *(CLEAN[number] if CLEAN[number] != ("taken over",) else ())]
    for folder in (run.dataset, run.reference):
        shutil.rmtree(folder)
    assert [run.command(command, *options) for command in ("prepare", "precompute-ref")] == [0, 0]
    if CLEAN[number] == ("taken over",):
        write_rows(path, made)
        assert [run.command(command, *options) for command in ("prepare", "precompute-ref")] == [0, 0]
        assert "taken over:" in capsys.readouterr().out and list(run.reference.glob("kept-*"))
    with tally("R8", "a clean artefact: `train` and `verify` take it") as counts:
        counts.injected += 1
        assert run.command("train", *ONE_STEP, *options) == 0
        assert run.command("verify", *options) == 0
        counts.survived += 1


# The parser of the format


def mutated(content: bytes, chance: random.Random) -> bytes:
    """Some bytes of a shard changed, put in, taken out or moved, mostly in its header."""
    changed = bytearray(content)
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(chance.randrange(1, 4)):
        place = chance.randrange(header if chance.random() < 0.75 else len(changed)) % max(1, len(changed))
        size = chance.choice((1, 1, 1, 2, 4, 8))
        match chance.randrange(5):
            case 0 | 1:
                changed[place : place + size] = chance.randbytes(size)
            case 2:
                changed[place:place] = chance.randbytes(size)
            case 3:
                del changed[place : place + size]
            case 4:
                start = chance.randrange(max(1, len(changed)))
                changed[place : place + size] = changed[start : start + size]
    return bytes(changed)


@pytest.mark.parametrize("count", [40, pytest.param(MUTATIONS, marks=pytest.mark.slow)])
def test_no_mutation_of_a_shard_gets_through_unless_it_means_the_same(run, capsys, count):
    """Digests fit, so that the format and the values are all there is to find it by. A log-prob that could be one is not found that way: see the page."""
    chance = random.Random(count)
    whole = read_shards(run.shards)
    outcomes = {"refused": 0, "the same values": 0, "another log-prob that could be one": 0}
    with tally("R20", "shards of log-probs, mutated, with digests that fit: a message, or values that could be") as counts:
        for number in range(count):
            shard = run.shards[number % len(run.shards)]
            counts.injected += 1
            with restored(shard, run.reference / MANIFEST):
                content = shard.read_bytes()
                while (changed := mutated(content, chance)) == content:
                    pass
                shard.write_bytes(changed)
                seal_again(run.reference, "reference", shard)
                outcomes[outcome(run, capsys, whole)] += 1
            counts.survived += 1
    assert sum(outcomes.values()) == count and outcomes["refused"] > 0.8 * count
    with capsys.disabled():
        print(f"\nmutations of shards: {outcomes}")


def outcome(run: Run, capsys, whole: ReferenceRows) -> str:
    exit_code = run.command("train", *ONE_STEP)
    error = capsys.readouterr().err
    if exit_code == 2:
        assert error.count("kto-ds: error:") == 1 and "Traceback" not in error
        clear_output(run)
        return "refused"
    assert exit_code == 0, error
    clear_output(run)
    rows = read_shards(run.shards)
    places = find(rows.keys, whole.keys)
    assert len(rows.keys) == len(whole.keys) and (places >= 0).all() and (rows.num_tokens[places] == whole.num_tokens).all()
    return "the same values" if (rows.logps[places] == whole.logps).all() else "another log-prob that could be one"




# The page

PAGE = ROOT / "docs" / "reliability.md"
# A fault of the table -> how often it is injected above; what is refused by the dataset and then, once that is made anew, by the reference counts twice.
INJECTED = {
    "a single flipped bit": FLIPS,
    "a file cut, grown, zeroed, deleted, or with a folder, FIFO or link in its place": len(KINDS) * len(FILE_FAULTS),
    "files swapped, renamed, or there twice": len(SHARD_MIXES) + len(ARRAY_SWAPS),
    "artefacts of another run": 2 * len(OTHER_RUNS) + 2 * 2 + 2 + 3 + 2 + 2,
    "log-probs and rows that cannot be": len(BAD_VALUES),
    "shards and arrays that are none": len(NO_SHARDS) + 1 + len(BAD_ARRAYS),
    "pickles": PICKLES,
    "manifests that say what cannot be": len(MANIFEST_CASES) + len(DEPTHS),
    "manifests that are none": 2 * len(RAW_MANIFESTS),
    "links below the folder": 2,
}


def test_the_page_has_the_counts_of_these_tests():
    page = PAGE.read_text(encoding="utf-8")
    table = {name: (injected, refused) for name, injected, refused in re.findall(r"^\| (.+?)(?:: .*?)? \| ([\d,]+) \| ([\d,]+) \|$", page, re.MULTILINE)}
    assert table == {name: (f"{count:,}", f"{count:,}") for name, count in {**INJECTED, "all of these": sum(INJECTED.values())}.items()}
    assert f"{CLEAN_RUNS} clean artefacts" in page and f"{MUTATIONS:,} mutations" in page and f"{len(REMEDIES)} damaged artefacts" in page
    assert len(CLEAN) == CLEAN_RUNS == len(set(CLEAN))
