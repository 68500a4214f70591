"""kto-ds verify, through the command line, on small artefacts that no model was needed for."""

import json
import os
from pathlib import Path

import pytest

from kto_ds import cli
from kto_ds.artifacts import describe_folder, incomplete_path, seal
from kto_ds.stages.verify import mismatches
from tests.distributed.runs import write_config

DATASET = {"tokenizer": "t-1", "chat_template": "c-1", "max_length": 512, "truncation_mode": "keep_start", "seed": 42}
REFERENCE = {"reference model": "m-1", "dtype": "float32", "tokenizer": "t-1", "chat_template": "c-1", "max_length": 512, "truncation_mode": "keep_start"}


def make(folder: Path, kind: str, content: bytes = b"0123456789", **manifest) -> Path:
    """A sealed folder of two files, 14 bytes."""
    (folder / "part").mkdir(parents=True)
    (folder / "part" / "rows.bin").write_bytes(content)
    (folder / "names").write_text("a\nb\n")
    seal(folder, {"kind": kind, **manifest}, describe_folder(folder))
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """run.yaml of a model that is not there, and the folder of its run, with everything in it."""
    write_config(tmp_path / "run.yaml", output_dir=str(tmp_path / "run"), model={"path": str(tmp_path / "none")}, data={"train": [{"path": str(tmp_path / "none.jsonl")}]})
    make(tmp_path / "run" / "dataset", "dataset", identity=DATASET)
    make(tmp_path / "run" / "reference", "reference", identity=REFERENCE)
    for step in (10, 20):
        make(tmp_path / "run" / "checkpoints" / f"step-{step:08d}", "checkpoint", step=step)
    return tmp_path / "run"


def verify(capsys, run_dir: Path, *overrides: str) -> tuple[int, list[str], str]:
    """Return the exit code, the lines of stdout and what was said on stderr besides the progress bar."""
    capsys.readouterr()
    exit_code = cli.run(["verify", "--config", str(run_dir.parent / "run.yaml"), *overrides])
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err and printed.err.count("kto-ds: error:") == (exit_code != 0)
    return exit_code, printed.out.splitlines(), printed.err[printed.err.find("kto-ds: error:") :] if exit_code else ""


def intact(kind: str, folder: Path) -> str:
    return f"{kind:<10}  {folder}  2 files, 14.0B, intact"


def test_a_run_that_is_intact(run_dir, capsys):
    exit_code, lines, _ = verify(capsys, run_dir)
    assert exit_code == 0 and lines == [
        intact("dataset", run_dir / "dataset"),
        intact("reference", run_dir / "reference"),
        intact("checkpoint", run_dir / "checkpoints" / "step-00000010"),
        intact("checkpoint", run_dir / "checkpoints" / "step-00000020"),
    ]


def flip(folder: Path) -> None:
    content = bytearray((folder / "part" / "rows.bin").read_bytes())
    content[3] ^= 1
    (folder / "part" / "rows.bin").write_bytes(content)


def lose(folder: Path) -> None:
    (folder / "part" / "rows.bin").unlink()


def add(folder: Path) -> None:
    (folder / "part" / "more\x1b").touch()


def block(folder: Path) -> None:
    lose(folder)
    os.mkfifo(folder / "part" / "rows.bin")


def edit(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"bytes": 10', '"bytes": 11'))


def cut(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 20)


DAMAGE = {
    flip: "'part/rows.bin' does not have the digest of the manifest: its bytes have changed",
    lose: "'part/rows.bin' is missing",
    add: r"'part/more\x1b' is not listed in the manifest",
    block: "'part/rows.bin' is not a plain file inside the folder",
    edit: "damaged manifest: its content does not have its own digest",
    cut: "damaged manifest: ",
}
REMEDIES = {
    "dataset": "run kto-ds prepare --config RUN.yaml",
    "reference": "run kto-ds precompute-ref --config RUN.yaml",
    "checkpoints/step-00000010": "remove this folder; train goes on from an older one",
}


@pytest.mark.parametrize("place", REMEDIES)
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_told_and_the_rest_is_looked_at(run_dir, capsys, damage, place):
    damage(run_dir / place)
    exit_code, lines, message = verify(capsys, run_dir)
    assert exit_code == 2 and len(lines) == 4 and sum(line.endswith("14.0B, intact") for line in lines) == 3
    kind = "checkpoint" if "step" in place else place
    [line] = [line for line in lines if not line.endswith("intact")]
    assert line.startswith(f"{kind:<10}  {run_dir / place}  {DAMAGE[damage]}")
    assert message == f"kto-ds: error: {run_dir}: 1 of 4 artefacts and checkpoints is damaged:\n  {kind} {run_dir / place}: {REMEDIES[place]}\n"


def test_every_problem_has_a_line_and_every_damaged_artefact_a_remedy(run_dir, capsys):
    for place in REMEDIES:
        lose(run_dir / place)
        (run_dir / place / "names").write_text("a\nc\n")
    exit_code, lines, message = verify(capsys, run_dir)
    assert exit_code == 2 and len(lines) == 7 and "3 of 4 artefacts and checkpoints are damaged" in message
    assert [line.count("'names' does not have the digest") for line in lines] == [1, 0, 1, 0, 1, 0, 0]
    assert [line.count("'part/rows.bin' is missing") for line in lines] == [0, 1, 0, 1, 0, 1, 0]
    assert all(f"{run_dir / place}: {remedy}" in message for place, remedy in REMEDIES.items())


def test_what_is_missing_or_unfinished_is_no_damage(run_dir, capsys):
    (run_dir / "reference").rename(incomplete_path(run_dir / "reference"))
    exit_code, lines, _ = verify(capsys, run_dir)
    assert exit_code == 0 and len(lines) == 4
    assert lines[1] == f"reference   {run_dir / 'reference'}  unfinished, run kto-ds precompute-ref --config RUN.yaml to go on"
    exit_code, lines, _ = verify(capsys, run_dir, "--data.artifact", str(run_dir / "elsewhere"), "--reference.artifact", str(run_dir / "none"))
    assert exit_code == 0 and lines[:2] == [f"dataset     {run_dir / 'elsewhere'}  missing", f"reference   {run_dir / 'none'}  missing"]


def test_a_checkpoint_that_was_not_sealed_is_left_to_train(run_dir, capsys):
    (run_dir / "checkpoints" / ".tmp-step-00000030").mkdir()
    (run_dir / "checkpoints" / "step-00000005.corrupt.1").mkdir()
    assert verify(capsys, run_dir)[0] == 0


def test_a_folder_that_lost_its_manifest(run_dir, capsys):
    (run_dir / "dataset" / "manifest.json").unlink()
    exit_code, lines, message = verify(capsys, run_dir)
    assert exit_code == 2 and lines[0] == f"dataset     {run_dir / 'dataset'}  there is no manifest.json in it" and "kto-ds prepare" in message


@pytest.mark.parametrize("exists", [False, True])
def test_where_there_is_nothing(run_dir, capsys, exists):
    if exists:
        (run_dir.parent / "other" / "dataset").mkdir(parents=True)
        (run_dir.parent / "other" / "checkpoints").mkdir()
    exit_code, lines, message = verify(capsys, run_dir, "--output_dir", str(run_dir.parent / "other"))
    assert exit_code == 2 and lines == [] and "nothing to verify" in message and "kto-ds prepare" in message
    assert (run_dir.parent / "other").exists() == exists


def test_another_kind_and_another_format_are_told(run_dir, capsys):
    options = ["--data.artifact", str(run_dir / "reference"), "--reference.artifact", str(run_dir / "old")]
    make(run_dir / "old", "reference")
    (run_dir / "old" / "manifest.json").write_text(json.dumps({"format": 2, "kind": "reference", "files": {}}))
    exit_code, lines, _ = verify(capsys, run_dir, *options)
    assert exit_code == 2 and lines[0].endswith("expected a dataset artefact, found 'reference'") and "written in format 2, this version reads " in lines[1]


def test_a_reference_that_was_made_for_another_dataset(run_dir, capsys):
    make(run_dir / "other", "reference", identity={**REFERENCE, "max_length": 1024, "chat_template": "c-2"})
    exit_code, lines, message = verify(capsys, run_dir, "--reference.artifact", str(run_dir / "other"))
    said = "made for another dataset: chat_template: the dataset has 'c-1', the reference 'c-2'; max_length: the dataset has 512, the reference 1024"
    assert exit_code == 2 and lines[1] == f"reference   {run_dir / 'other'}  {said}" and "kto-ds precompute-ref" in message


def test_a_reference_is_compared_with_an_intact_dataset_only(run_dir, capsys):
    make(run_dir / "other", "reference", identity={**REFERENCE, "max_length": 1024})
    flip(run_dir / "dataset")
    exit_code, lines, message = verify(capsys, run_dir, "--reference.artifact", str(run_dir / "other"))
    assert exit_code == 2 and lines[1] == intact("reference", run_dir / "other") and "1 of 4" in message


@pytest.mark.parametrize("identity", [None, [], "text"])
def test_an_identity_of_another_shape_is_a_problem(identity):
    assert mismatches({"identity": DATASET}, {"identity": REFERENCE}) == []
    assert mismatches({"identity": DATASET}, {"identity": identity}) == mismatches({"identity": identity}, {"identity": REFERENCE}) != []
    assert mismatches({}, {}) != []


def test_a_checkpoint_that_a_running_train_takes_away_is_no_damage(run_dir, capsys, monkeypatch):
    from kto_ds.stages import verify as stage

    def list_and_retire(root: Path) -> list[tuple[int, Path]]:
        listed = stage_list(root)
        listed[0][1].rename(root / ".del-step-00000010")
        return listed

    stage_list = stage.list_checkpoints
    monkeypatch.setattr(stage, "list_checkpoints", list_and_retire)
    exit_code, lines, _ = verify(capsys, run_dir)
    assert exit_code == 0 and lines[2] == f"checkpoint  {run_dir / 'checkpoints' / 'step-00000010'}  gone"


def test_the_bytes_of_empty_and_of_many_files_are_read(run_dir, capsys):
    folder = run_dir / "many"
    folder.mkdir()
    for number in range(100):
        (folder / f"{number:03d}").write_bytes(bytes(number))
    seal(folder, {"kind": "dataset", "identity": DATASET}, describe_folder(folder))
    assert verify(capsys, run_dir, "--data.artifact", str(folder))[1][0].endswith("100 files, 4.95kB, intact")
    (folder / "099").write_bytes(bytes(98) + b"\1")
    (folder / "001").write_bytes(b"\1")
    exit_code, lines, _ = verify(capsys, run_dir, "--data.artifact", str(folder))
    assert exit_code == 2 and ["'001' does" in lines[0], "'099' does" in lines[1]] == [True, True]


def test_under_the_launcher_it_is_refused(run_dir, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    exit_code, _, message = verify(capsys, run_dir)
    assert exit_code == 2 and "verify runs as one process" in message
