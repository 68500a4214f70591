"""A secret in the environment, in an option, in a config value, in an error: no file and no line of output has it, from prepare to export."""

import json
import os
import re
import sys
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from kto_ds import cli
from kto_ds.redaction import HIDDEN, redact
from kto_ds.stages import train
from tests.distributed import ranks
from tests.distributed.tiny_run import config_of, status_of
from tests.faults.ledger import record

CANARIES = {name: f"canary{number}{'x7Qz9' * 8}" for number, name in enumerate(("WANDB_API_KEY", "HF_TOKEN", "MY_SECRET", "DB_PASSWORD"))}
ON_THE_COMMAND_LINE = f"canary9{'x7Qz9' * 8}"
ALL = [*CANARIES.values(), ON_THE_COMMAND_LINE]


def contents_of(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield every file below a folder, and every member of those that are zip archives, as checkpoints are."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            yield str(path), path.read_bytes()
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    yield from ((f"{path}:{name}", archive.read(name)) for name in archive.namelist())


def hits(folder: Path) -> list[str]:
    return [name for name, content in contents_of(folder) if any(secret.encode() in content for secret in ALL)]


def see(rank: int, *, note: Path) -> None:
    """Note which secrets this process can see."""
    note.write_text(json.dumps([secret for secret in ALL if secret in os.environ.values() or secret in sys.argv]))


def fail(rank: int, *, note: Path) -> None:
    """Fail in step 3 with an error that quotes all that a library may quote."""

    def failing(engine, work, *arguments, **named):
        if work.step < 3:
            return whole_step(engine, work, *arguments, **named)
        note.write_text("raised")
        raise RuntimeError(f"401 for https://user:{CANARIES['DB_PASSWORD']}@host/path with {CANARIES['HF_TOKEN']!r}, key={CANARIES['MY_SECRET']}")

    whole_step, train.train_step = train.train_step, failing


@pytest.mark.distributed
def test_a_pipeline_leaves_no_secret_behind(tiny, tmp_path):
    """The name of the wandb run is one of the secrets too: a config value goes into config.yaml, manifests and wandb."""
    run, unseen = tmp_path / "run", tmp_path / "unseen"
    unseen.mkdir()
    named = dict(output_dir=run, data__artifact=run / "dataset", reference__artifact=run / "reference", report__wandb__mode="offline", report__wandb__name=CANARIES["MY_SECRET"])
    for command in ("prepare", "precompute-ref", "train", "export"):
        note = unseen / command
        more = dict(train__max_steps=4) if command in ("train", "export") else {}
        exit_codes, _ = ranks.run([command, *config_of(tiny, **named, **more)], log=tmp_path / f"{command}.log", num_ranks=1, before=partial(see, note=note), **CANARIES)
        assert exit_codes == [0], (tmp_path / f"{command}.log").read_text()[-3000:]
        assert set(json.loads(note.read_text())) == set(CANARIES.values()), "the process did not see the secrets"
        note.unlink()
    assert hits(tmp_path) == []
    names = {path.name for path in run.rglob("*")}
    assert {"config.yaml", "metrics.jsonl", "status.json", "model.safetensors"} <= names and any(name.endswith(".wandb") for name in names)
    assert HIDDEN in (run / "config.yaml").read_text()
    assert len([name for name, _ in contents_of(run) if ".pt:" in name]) > 10, "no checkpoint was looked into"
    record("R22", "secrets in environment and config, whole pipeline", injected=len(CANARIES), survived=len(CANARIES), seconds=0.0)


@pytest.mark.distributed
def test_an_error_that_quotes_secrets_does_not_print_them(tiny, tmp_path):
    note = tmp_path / "note"
    exit_codes, output = ranks.run(["train", *config_of(tiny, output_dir=tmp_path / "run")], log=tmp_path / "log", num_ranks=1, before=partial(fail, note=note), **CANARIES)
    assert exit_codes == [1] and note.exists()
    assert "Traceback" in output and f"https://{HIDDEN}@host/path" in output
    assert hits(tmp_path) == []
    assert HIDDEN in status_of(tmp_path / "run")["reason"]
    record("R22", "secrets in an error", injected=3, survived=3, seconds=0.0)


SPELLINGS = (["--report.wandb.api_key", ON_THE_COMMAND_LINE], [f"--hf-token={ON_THE_COMMAND_LINE}"], ["--seed", "7", "--password", ON_THE_COMMAND_LINE, "--seeed", "3"])


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_unknown_option_is_named_without_its_value(tmp_path, capsys, spelling):
    assert cli.run(["train", "--config", str(tmp_path / "run.yaml"), *spelling]) == 2
    printed = capsys.readouterr()
    assert spelling[-2 if "=" not in spelling[-1] else -1].split("=")[0] in printed.err and ON_THE_COMMAND_LINE not in printed.out + printed.err


@pytest.mark.parametrize("where", ["model.path", "reference.path", "output_dir", "report.wandb.project", "data.train.0.path"])
def test_a_config_value_with_a_password_in_a_url_is_refused_by_its_key(tmp_path, capsys, where):
    url = f"https://someone:{ON_THE_COMMAND_LINE}@host/place"
    values = {"model.path": "m", "reference.path": "null", "output_dir": "o", "report.wandb.project": "p", "data.train.0.path": "r.jsonl"} | {where: url}
    text = "output_dir: {output_dir}\nmodel: {{path: '{model.path}'}}\nreference: {{path: {reference.path}}}\nreport: {{wandb: {{project: '{report.wandb.project}'}}}}\ndata: {{train: [{{path: '{data.train.0.path}'}}]}}\n"
    (tmp_path / "run.yaml").write_text(re.sub(r"\{([a-z_0-9.]+)\}", lambda match: values[match[1]], text).replace("{{", "{").replace("}}", "}"))
    assert cli.run(["prepare", "--config", str(tmp_path / "run.yaml")]) == 2
    printed = capsys.readouterr()
    assert f"{where}: holds a URL" in printed.err and ON_THE_COMMAND_LINE not in printed.out + printed.err and "Traceback" not in printed.err


# Secrets that show by their form, in pieces so that no scanner takes them for real ones.
SHOWN_BY_FORM = [
    "hf_" + "aB3" * 11, "wandb_v1_" + "aB_3" * 10, "ghp_" + "aB3" * 12, "github_pat_" + "aB_3" * 10, "glpat-" + "aB-3" * 5, "AKIA" + "ABCD2345" * 2,
    "sk-" + "proj-" + "aB3" * 12, "eyJ" + "hbGciOiJIUzI1NiJ9" + ".eyJ" + "zdWIiOiIxMjM0NTY3ODkwIn0" + ".abc_DEF-123", "https://host/rows.jsonl?X-Amz-Signature=0a1b2c3d", "s3://host/a?x=1&token=abcdef",
]  # fmt: skip
ORDINARY = [
    "Qwen/Qwen3-0.6B", "hf-internal-testing/tiny-random-LlamaForCausalLM", "0123456789abcdef0123456789abcdef01234567", "runs/sk-learn-models-of-many-kinds-seed7-2026", "hf://datasets/org/name@main/rows.parquet",
    "data/token=1/key=abcdefgh/part-?.parquet", "rows-?.jsonl.gz", "desk-0123456789012345678901234567890123456789", "eyJ", "api_key questions, and what a token is", "<|im_start|>",
]  # fmt: skip


def config_with(tmp_path: Path, text: str) -> list[str]:
    named = {"output_dir": "o", "model": {"path": "m"}, "report": {"wandb": {"name": text}}, "data": {"train": [{"path": "r.jsonl"}], "chat_template_kwargs": {"note": [text]}}}
    (tmp_path / "run.yaml").write_text(json.dumps(named))
    return ["--config", str(tmp_path / "run.yaml")]


@pytest.mark.parametrize("text", SHOWN_BY_FORM, ids=lambda text: text[:12])
def test_a_config_value_that_shows_to_be_a_secret_is_refused_whatever_the_environment(tmp_path, capsys, text):
    assert cli.run(["prepare", *config_with(tmp_path, f"run of {text}")]) == 2
    printed = capsys.readouterr()
    assert ": holds a" in printed.err and text[-9:] not in printed.out + printed.err
    assert text[-9:] not in redact(f"found '{text}' there") and redact(f"found '{text}' there").startswith("found '") and redact(f"found '{text}' there").endswith("' there")


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_config_values_are_no_secrets(tmp_path, capsys, text):
    assert cli.run(["prepare", *config_with(tmp_path, text), "--print-config"]) == 0
    assert redact(text) == text and HIDDEN not in capsys.readouterr().out


def test_what_is_taken_for_a_secret(monkeypatch, tmp_path):
    for name in [name for name in os.environ if re.search("KEY|TOKEN|SECRET|PASS|CREDENTIAL", name)]:
        monkeypatch.delenv(name)
    hidden = {"SOME_API_KEY": "0123456789abcdef", "github_token": "ghp_abcdefgh", "SERVICE_CREDENTIALS": "user name:pass word", "X_PASSWD": 'quo"ted\\é123'}
    shown = {"TOKENIZERS_PARALLELISM": "forbidden", "TOKENIZER_NAME": "Qwen/Qwen3-0.6B", "MY_KEY": "false", "HF_TOKEN_PATH": str(tmp_path), "HOME": "/home/someone"}
    for name, value in (hidden | shown).items():
        monkeypatch.setenv(name, value)
    for value in hidden.values():
        assert redact(f"before {value} after") == f"before {HIDDEN} after"
        assert redact(f"before {json.dumps(value)} after") == f'before "{HIDDEN}" after'
        assert redact(f"before {[value]} after") == f"before {[HIDDEN]} after"
    for value in shown.values():
        assert redact(f"before {value} after") == f"before {value} after"


def test_values_of_secret_looking_options_are_hidden(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kto-ds", "train", "--x.api-key", "0123456789", "--hub_token=abcdefghij", "--batch.max_tokens_per_microbatch", "1234567890", "--data.special_tokens_in_text", "something"])
    assert redact("0123456789 abcdefghij 1234567890 something") == f"{HIDDEN} {HIDDEN} 1234567890 something"


@pytest.mark.parametrize("text", ["https://user:secret@host/x", "s3+http://token@host", "https:/user:secret@host", "see (postgres://u:p@h:1/d)"])
def test_user_and_password_of_a_url_are_hidden(text):
    assert "secret" not in redact(text) and f"{HIDDEN}@h" in redact(text)


@pytest.mark.parametrize("text", ["hf://datasets/org/name@main/rows.parquet", "someone@example.org", "https://host/path@2", "C://x y@z"])
def test_other_text_with_an_at_sign_stays(text):
    assert redact(text) == text
