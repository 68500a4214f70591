"""Payloads where a run reads what it did not write: a model folder, a config, a chat template. Refused, or read as plain data; none of them runs.

A payload makes a marker file. Each is shown to be a live one first. Artefacts and their manifests are in tests/unit/test_faults.py.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from kto_ds import cli
from kto_ds.artifacts import MANIFEST, describe_folder, seal
from tests.distributed import ranks
from tests.distributed.runs import ROOT, environment
from tests.distributed.tiny_run import config_of
from tests.faults.ledger import record


class MakesMarker:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mknod, (str(self.marker),)


def kto_ds(*command: object) -> subprocess.CompletedProcess:
    """Run a command that nobody can answer a question of."""
    argv = [sys.executable, "-m", "kto_ds", *map(str, command)]
    return subprocess.run(argv, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)


def require_refused(exit_code: int, output: str, *, saying: str) -> None:
    assert exit_code == 2, output[-3000:]
    assert output.count("kto-ds: error:") == 1 and "Traceback" not in output and saying in output, output[-3000:]


# Weights


@pytest.mark.parametrize("command", ["precompute-ref", "train"])
def test_pickled_weights_are_not_opened(tiny, tmp_path, command):
    marker = tmp_path / "marker"
    model = shutil.copytree(tiny / "model", tmp_path / "model")
    (model / "model.safetensors").unlink()
    torch.save({"weight": MakesMarker(marker)}, model / "pytorch_model.bin")
    overrides = dict(model__path=model, reference__path=tiny / "model") if command == "train" else dict(model__path=model, reference__artifact=tmp_path / "reference")
    exit_codes, output = ranks.run([command, *config_of(tiny, output_dir=tmp_path / "run", **overrides)], log=tmp_path / "log", num_ranks=1)
    require_refused(exit_codes[0], output, saying="safetensors")
    assert not marker.exists()
    torch.load(model / "pytorch_model.bin", weights_only=False)
    assert marker.exists(), "the payload is a dud"
    record("R21", f"pickled weights, {command}", injected=1, survived=1, seconds=0.0)


# Code that comes with a model

MODULE = """from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "unheard_of"
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


def model_with_code(tiny: Path, folder: Path, marker: Path, kind: str) -> Path:
    """A copy of the model that asks for its own class of config or tokenizer."""
    model = shutil.copytree(tiny / "model", folder)
    (model / "own_code.py").write_text(MODULE.format(marker=str(marker)))
    path = model / ("config.json" if kind == "config" else "tokenizer_config.json")
    entries = json.loads(path.read_text())
    if kind == "config":
        entries |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "own_code.Config"}}
    else:
        entries |= {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": [None, "own_code.Tokenizer"]}}
    path.write_text(json.dumps(entries))
    return model


@pytest.mark.parametrize("kind", ["tokenizer", pytest.param("config", marks=pytest.mark.slow)])
def test_code_that_comes_with_a_model_does_not_run_unasked(tiny, tmp_path, monkeypatch, kind):
    marker = tmp_path / "marker"
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = model_with_code(tiny, tmp_path / "model", marker, kind)
    command = ("prepare" if kind == "tokenizer" else "train", *config_of(tiny, output_dir=tmp_path / "run", model__path=model, data__artifact=tmp_path / "dataset"))
    refused = kto_ds(*command)
    require_refused(refused.returncode, refused.stdout, saying="trust_remote_code")
    assert not marker.exists()
    kto_ds(*command, "--model.trust_remote_code", "true")
    assert marker.exists(), "the payload is a dud"
    record("R21", f"code of a model, {kind}", injected=1, survived=1, seconds=0.0)


# Configs

LAUGHS = "\n".join(["a: &a [x, x, x, x, x, x, x, x, x]", *(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in zip("abcdefghi", "bcdefghij"))])
CONFIGS = {
    "a call": "seed: !!python/object/apply:os.mknod [{marker}]\n",
    "a call, long tag": "seed: !<tag:yaml.org,2002:python/object/apply:os.mknod> [{marker}]\n",
    "a module": "seed: !!python/module:kto_ds.demo.task ''\n",
    "a name": "seed: !!python/name:os.mknod ''\n",
    "a tag of its own": "seed: !mknod {marker}\n",
    "a billion laughs": f"{LAUGHS}\noutput_dir: x\n",
    "a billion laughs as a value": f"{LAUGHS}\nseed: *j\n",
    "a list within itself": "seed: &a [*a]\n",
    "a mapping within itself": "model: &a {path: *a}\n",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_builds_no_objects_and_does_not_explode(tmp_path, capsys, name):
    marker, path = tmp_path / "marker", tmp_path / "run.yaml"
    path.write_text(CONFIGS[name].replace("{marker}", str(marker)))
    began = time.monotonic()
    exit_code = cli.run(["prepare", "--config", str(path)])
    printed = capsys.readouterr()
    require_refused(exit_code, printed.out + printed.err, saying=str(path))
    assert not marker.exists() and time.monotonic() - began < 5 and len(printed.err) < 2000
    record("R21", f"config: {name}", injected=1, survived=1, seconds=time.monotonic() - began)


def test_an_environment_variable_in_a_config_stays_text(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("INJECTED", "expanded")
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: ${INJECTED}/$INJECTED\nmodel: {path: m}\ndata: {train: [{path: r.jsonl}]}\n")
    assert cli.run(["prepare", "--config", str(path), "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "${INJECTED}/$INJECTED" in printed and "expanded" not in printed


# Chat templates

TEMPLATES = {
    "a class": "{{ ''.__class__.__mro__ }}",
    "a class by filter": "{{ (''|attr('__class__')).__mro__ }}",
    "globals of cycler": "{{ cycler.__init__.__globals__.os.mknod('{marker}') }}",
    "globals of joiner": "{{ joiner.__init__.__globals__.os.mknod('{marker}') }}",
    "globals of namespace": "{{ namespace.__init__.__globals__.os.mknod('{marker}') }}",
    "globals of a function": "{{ raise_exception.__globals__['__builtins__']['open']('{marker}', 'w') }}",
    "a change of the rows": "{{ messages.append(1) }}",
    "a format string": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "a long range": "{% for number in range(10 ** 9) %}x{% endfor %}",
    "a file that is included": "{% include '/etc/passwd' %}",
    "a module that is imported": "{% import 'os' as os %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_stays_in_its_sandbox(tiny, tmp_path, capsys, name):
    marker = tmp_path / "marker"
    model = shutil.copytree(tiny / "model", tmp_path / "model")
    (model / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }} {% endfor %}" + TEMPLATES[name].replace("{marker}", str(marker)))
    began = time.monotonic()
    capsys.readouterr()
    overrides = dict(model__path=model, data__artifact=tmp_path / "dataset", output_dir=tmp_path / "run", data__dataset_num_proc=1)
    exit_code = cli.run(["prepare", *config_of(tiny, **overrides)])
    printed = capsys.readouterr()
    require_refused(exit_code, printed.out + printed.err, saying="rows.jsonl")
    assert not marker.exists() and not (tmp_path / "dataset").exists() and time.monotonic() - began < 20
    record("R21", f"chat template: {name}", injected=1, survived=1, seconds=time.monotonic() - began)


def test_no_template_is_rendered_by_ourselves():
    """transformers renders chat templates in a sandbox; a plain Environment has none."""
    used = [path for path in (ROOT / "kto_ds").rglob("*.py") if re.search(r"\bjinja2\b|\bEnvironment\(|\bTemplate\(", path.read_text())]
    assert not used


# Artefacts


def test_an_object_in_an_array_is_not_loaded(tiny, tmp_path):
    """With a size and digest that fit, so that only the format gives it away."""
    marker = tmp_path / "marker"
    dataset = shutil.copytree(tiny / "dataset", tmp_path / "dataset")
    with (dataset / "train" / "prompt_of.npy").open("wb") as file:
        np.save(file, np.array([MakesMarker(marker)], dtype=object), allow_pickle=True)
    manifest = json.loads((dataset / MANIFEST).read_text())
    (dataset / MANIFEST).unlink()
    seal(dataset, {key: value for key, value in manifest.items() if key not in ("format", "files", "digest")}, describe_folder(dataset))
    exit_codes, output = ranks.run(["train", *config_of(tiny, output_dir=tmp_path / "run", data__artifact=dataset)], log=tmp_path / "log", num_ranks=1)
    require_refused(exit_codes[0], output, saying="prompt_of.npy")
    assert not marker.exists()
    np.load(dataset / "train" / "prompt_of.npy", allow_pickle=True)
    assert marker.exists(), "the payload is a dud"
    record("R21", "object array", injected=1, survived=1, seconds=0.0)
