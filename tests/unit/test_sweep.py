"""`kto-ds sweep`: which trials there are, what becomes of them, the table; and, marked slow, real trials that fail, are stopped and go on."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from transformers import LlamaConfig

from kto_ds import cli
from kto_ds.cli_apart import sweep_options
from kto_ds.config import LoraConfig, TrainConfig
from kto_ds.errors import UserError
from kto_ds.runtime.jobs import run_job
from kto_ds.stages import sweep as stage
from kto_ds.sweep.grid import REFUSED, all_trials, choose
from kto_ds.sweep.results import Metric, Spent, as_csv, best_first, read_result
from tests.distributed import ranks
from tests.distributed.runs import ROOT, environment, write_config
from tests.distributed.tiny_run import config_of, make_tiny_run
from tests.unit.test_docs_data import byte_tokenizer

AUC = Metric("eval", "rewards/auc", takes_best=False, greater_is_better=True)


# which trials


def test_trials_are_all_combinations():
    trials = all_trials({"loss.beta": ["0.05", "0.1"], "optim.learning_rate": [5e-7, 1e-6, 2e-6]})
    assert [trial.name for trial in trials][:2] == ["beta-0.05_learning_rate-5e-07", "beta-0.05_learning_rate-1e-06"] and len({trial.name for trial in trials}) == 6
    assert trials[5].settings == {"loss.beta": "0.1", "optim.learning_rate": 2e-6}
    assert [trial.name for trial in all_trials({"model.lora.r": [8, 16], "deepspeed.config": ["zero2", "a/b c.json"]})][1] == "r-8_config-a-b-c.json"


def test_a_choice_of_trials_is_seeded():
    trials = all_trials({"loss.beta": list(range(1, 11)), "optim.warmup_ratio": [0, 0.1]})
    chosen = choose(trials, 5, seed=3)
    assert chosen == choose(trials, 5, seed=3) != choose(trials, 5, seed=4) and len(chosen) == 5 and [trials.index(trial) for trial in chosen] == sorted(map(trials.index, chosen))
    assert choose(trials, 0, seed=3) == choose(trials, 99, seed=3) == trials


@pytest.mark.parametrize("key", [key.replace("data.", "data.max_length").replace("reference.", "reference.path") for key in REFUSED])
def test_keys_that_need_another_reference_are_refused(key):
    with pytest.raises(UserError) as refused:
        all_trials({key: ["1", "2"]})
    assert refused.value.where == key and "cannot be swept: " in refused.value.what


@pytest.mark.parametrize("grid", [{}, {"loss.beta": ["0.1", "0.1"]}, {"loss.beta": list(range(1001))}, {"deepspeed.config": ["a b", "a/b"]}])
def test_what_is_no_grid_is_refused(grid):
    with pytest.raises(UserError):
        all_trials(grid)


def test_options_with_commas_have_several_values():
    options = ["--config", "a,b.yaml", "--loss.beta", "0.1,0.3", "--optim.learning_rate=1e-6, 2e-6", "--seed", "7", "--dry-run", "--num_trials", "3", "--data.train", '[{"path": "x"}, {"path": "y"}]', "--metric=eval/loss"]
    found = sweep_options(options, {"dry_run": False, "num_trials": 0, "metric": None}, {"loss.beta", "optim.learning_rate", "seed", "data.train"})
    assert found.values == {"loss.beta": ["0.1", "0.3"], "optim.learning_rate": ["1e-6", "2e-6"]}
    assert found.base == ["--config", "a,b.yaml", "--seed", "7", "--data.train", '[{"path": "x"}, {"path": "y"}]'] and found.own == ["--dry-run", "--num_trials", "3", "--metric=eval/loss"]


# the command line


def run_file(folder: Path, **sections) -> str:
    sections = {"model": {"path": "m"}, "data": {"train": [{"path": "rows.jsonl"}], "held_out_fraction": 0.1}, **sections}
    return str(write_config(folder / "run.yaml", output_dir=str(folder / "run"), **sections))


def one_label_run(folder: Path) -> str:
    """Return the config of a run whose evaluation rows are all desirable."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 2048}
    LlamaConfig(vocab_size=len(tokenizer), **shape).save_pretrained(folder / "model")
    for name, labels in (("train", (True, False)), ("eval", (True, True))):
        rows = [{"prompt": [{"role": "user", "content": f"{number}?"}], "completion": [{"role": "assistant", "content": "yes"}], "label": labels[number % 2]} for number in range(8)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {name: [{"path": str(folder / f"{name}.jsonl")}] for name in ("train", "eval")}
    return str(write_config(folder / "run.yaml", output_dir=str(folder / "run"), model={"path": str(folder / "model")}, data={**data, "dataset_num_proc": 1}, batch={"global_batch_size": 4}))


def test_dry_run_and_commands_write_nothing(tmp_path, capsys):
    run = run_file(tmp_path)
    values = tmp_path / "values.yaml"
    values.write_text("sweep:\n  optim: {learning_rate: [5e-7, 1e-6]}\n  loss.loss_type: [kto, apo_zero_unpaired]\n")
    assert cli.run(["sweep", "--config", run, "--loss.beta", "0.1,0.3", "--values", str(values), "--num_gpus", "2", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(": not begun") == 8 and "8 trials in" in printed and "on 2 ranks each; compared by eval/held_out/rewards/auc" in printed
    assert cli.run(["sweep", "--config", run, "--loss.beta", "0.1,0.3", "--train.max_steps", "3", "--num_gpus", "2", "--print-commands"]) == 0
    commands = capsys.readouterr().out.splitlines()
    folder = tmp_path / "run"
    shared = f"--data.artifact {folder}/dataset --reference.artifact {folder}/reference --checkpoint.resume auto"
    assert commands == [
        f"deepspeed --num_gpus 2 --module kto_ds train --config {run} --train.max_steps 3 --output_dir {folder}/sweep/beta-{beta} {shared} --loss.beta {beta}" for beta in ("0.1", "0.3")
    ]  # fmt: skip
    for command in commands:  # what is printed is a command line that train takes
        config, _ = cli.read_config("train", command.split()[6:])
        assert config.output_dir.parent == folder / "sweep" and config.dataset_dir == folder / "dataset"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml", "values.yaml"]


MISTAKES = {
    "loss.beta: Input should be greater than 0": ["--loss.beta", "0.1,-1"],
    "did you mean loss.beta?": ["--loss.bta", "0.1,0.3"],
    "seed: it cannot be swept: all trials share one": ["--seed", "1,2"],
    "data: it cannot be swept: all trials share one": ["--values", "VALUES"],
    "sweep: no key has several values": ["--loss.beta", "0.1"],
    "'test/auc' is no metric of a split": ["--loss.beta", "0.1,0.3", "--metric", "test/auc"],
    "-1 is no number of trials": ["--loss.beta", "0.1,0.3", "--num_trials", "-1"],
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_told_before_anything_is_run(tmp_path, capsys, message):
    values = tmp_path / "values.yaml"
    values.write_text("data: [{train: [{path: a}]}, {train: [{path: b}]}]\n")
    assert cli.run(["sweep", "--config", run_file(tmp_path), *(word.replace("VALUES", str(values)) for word in MISTAKES[message])]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and not (tmp_path / "run").exists()


def test_without_evaluation_rows_a_metric_of_training_is_asked_for(tmp_path, capsys):
    run = run_file(tmp_path, data={"train": [{"path": "rows.jsonl"}]})
    assert cli.run(["sweep", "--config", run, "--loss.beta", "0.1,0.3", "--dry-run"]) == 2
    assert "data.held_out_fraction" in capsys.readouterr().err
    assert cli.run(["sweep", "--config", run, "--loss.beta", "0.1,0.3", "--dry-run", "--metric", "train/loss"]) == 0


BEST_FIRST = [({}, None, True), ({}, "eval/held_out/loss", False), ({"greater_is_better": True}, "eval/held_out/loss", True), ({"greater_is_better": False}, "eval/held_out/rewards/auc", True)]


@pytest.mark.parametrize("checkpoint, metric, is_greatest", BEST_FIRST)
def test_which_way_the_metric_goes_is_that_of_its_checkpoint(tmp_path, checkpoint, metric, is_greatest):
    section = {"metric_for_best_model": "eval/held_out/loss", **checkpoint}
    config, _ = cli.read_config("train", ["--config", run_file(tmp_path, checkpoint=section)])
    assert stage._metric(config, metric).greater_is_better == is_greatest


@pytest.mark.parametrize("key, value", [("reference.path", "other"), ("reference.dtype", "float32"), ("reference.artifact", "elsewhere"), ("optim.weight_decay", "0.1")])
def test_another_base_is_refused(tmp_path, capsys, key, value):
    run = run_file(tmp_path)
    base, _ = cli.read_config("train", ["--config", run])
    folder = tmp_path / "run" / "sweep"
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(json.dumps({"base": base.model_dump(mode="json"), "trials": []}))
    assert cli.run(["sweep", "--config", run, "--loss.beta", "0.1,0.3", f"--{key}", value]) == 2
    error = capsys.readouterr().err
    assert "the config has changed since the trials that are there" in error and f"{key}: was " in error


def test_a_mapping_changes_what_it_names_of_a_section(tmp_path, capsys):
    run = run_file(tmp_path, model={"path": "m", "lora": {"r": 4, "lora_alpha": 99, "use_rslora": True}})
    values = tmp_path / "values.yaml"
    values.write_text("model.lora: [{r: 8}]\ntrain: [{num_train_epochs: 2}]\n")
    assert cli.run(["sweep", "--config", run, "--values", str(values), "--train.max_steps", "5", "--model.lora.target_modules", '["q_proj"]', "--num_gpus", "1", "--print-commands"]) == 0
    [command] = capsys.readouterr().out.splitlines()
    config, _ = cli.read_config("train", shlex.split(command)[2:])
    assert config.model.lora == LoraConfig(r=8, lora_alpha=99, use_rslora=True, target_modules=["q_proj"]) and config.train == TrainConfig(num_train_epochs=2, max_steps=5)


@pytest.mark.parametrize("metric", [[], ["--metric", "eval/rewards/acu"]])
def test_a_metric_that_no_evaluation_gives_is_refused_before_any_trial(tmp_path, capsys, metric):
    run = one_label_run(tmp_path)
    assert cli.run(["prepare", "--config", run]) == 0
    assert cli.run(["sweep", "--config", run, "--loss.beta", "0.1,0.3", "--num_gpus", "1", *metric]) == 2
    printed = capsys.readouterr()
    assert "no evaluation gives 'eval/rewards/" in printed.err and "eval/rewards/chosen" in printed.err and ("have one label" in printed.err) == (not metric)
    assert "$ kto-ds" not in printed.out
    assert cli.run(["sweep", "--config", run, "--loss.beta", "0.1,0.3", "--num_gpus", "1", "--print-commands", *metric]) == 2
    assert cli.run(["sweep", "--config", run, "--loss.beta", "0.1,0.3", "--num_gpus", "1", "--print-commands", "--metric", "eval/rewards/chosen"]) == 0


# results


def write_trial(folder: Path, state: str, *aucs: float, reason: str = "") -> Path:
    folder.mkdir()
    (folder / "status.json").write_text(json.dumps({"state": state, "step": 4 * len(aucs), "exit_code": 0, "reason": reason}))
    records = [{"split": "eval", "step": 4 * number, "rewards/auc": auc, "loss": 1 - auc} for number, auc in enumerate(aucs, start=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [{"split": "train", "step": 1, "loss": 0.5}, *records]))
    return folder


def test_results_are_ranked_by_the_metric_and_only_when_completed(tmp_path):
    trials = {trial.name: trial for trial in all_trials({"loss.beta": ["0.1", "0.2", "0.3", "0.4", "0.5"]})}
    for name, state, aucs in (("beta-0.1", "completed", (0.9, 0.6)), ("beta-0.2", "completed", (0.5, 0.7)), ("beta-0.3", "failed", (0.99,)), ("beta-0.4", "completed", ())):
        write_trial(tmp_path / name, state, *aucs, reason="NumericsError: NaN\nmore" if state == "failed" else "")

    def ranked(metric: Metric) -> list:
        return best_first([read_result(trial, tmp_path / name, metric, None) for name, trial in trials.items()], metric)

    results = ranked(AUC)
    assert [result.trial.name for result in results] == ["beta-0.2", "beta-0.1", "beta-0.3", "beta-0.4", "beta-0.5"]
    assert [(result.state, result.value) for result in results] == [("completed", 0.7), ("completed", 0.6), ("failed", 0.99), ("completed", None), ("not begun", None)]
    assert results[2].reason == "NumericsError: NaN"
    refused = read_result(trials["beta-0.5"], tmp_path / "beta-0.5", AUC, Spent(1.0, 2))
    assert (refused.state, refused.reason) == ("failed", "exit code 2")
    stopped = read_result(trials["beta-0.5"], tmp_path / "beta-0.5", AUC, Spent(1.0, 75))
    assert (stopped.state, stopped.reason) == ("not begun", "")
    killed = read_result(trials["beta-0.5"], write_trial(tmp_path / "killed", "running", 0.5), AUC, Spent(1.0, 137))
    assert killed.state == "running" and killed.reason == "killed, or still running elsewhere: its last start here ended with exit code 137"
    assert [result.trial.name for result in ranked(AUC._replace(takes_best=True))][:2] == ["beta-0.1", "beta-0.2"]
    assert [result.trial.name for result in ranked(AUC._replace(name="loss", greater_is_better=False))][:2] == ["beta-0.2", "beta-0.1"]
    assert [result.trial.name for result in ranked(AUC._replace(greater_is_better=False))][:2] == ["beta-0.1", "beta-0.2"]
    rows = list(csv.DictReader(as_csv(results, AUC).splitlines()))
    assert [row["loss.beta"] for row in rows] == ["0.2", "0.1", "0.3", "0.4", "0.5"] and rows[0]["eval/rewards/auc"] == "0.7" and rows[4]["state"] == "not begun"


def test_the_commands_in_the_end_can_be_pasted(tmp_path, capsys):
    folder = tmp_path / "a run"
    folder.mkdir()
    config, _ = cli.read_config("train", ["--config", run_file(tmp_path), "--output_dir", str(folder)])
    [trial] = all_trials({"loss.beta": ["0.1"]})
    sweep = stage.Sweep(config, [], [trial], AUC, 1)
    stage._finish(sweep, [read_result(trial, write_trial(folder / trial.name, "completed", 0.5), AUC, None)])
    [export] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("the best: ")]
    assert shlex.split(export)[-1] == f"{folder}/beta-0.1/config.yaml"


# processes

LISTENER = "import signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75)); print('ready', flush=True); time.sleep(60)"


def test_a_signal_reaches_the_processes_that_listen():
    began = time.monotonic()
    # A launcher that does not listen, and the rank that it has started, which does after a while.
    launcher = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-S', '-c', {('import time; time.sleep(0.5); ' + LISTENER)!r}]).returncode)"
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert run_job([sys.executable, "-S", "-c", launcher]) == (75, "SIGTERM")
    assert time.monotonic() - began < 40
    assert run_job([sys.executable, "-S", "-c", "import sys; sys.exit(3)"]) == (3, None)
    assert run_job([sys.executable, "-S", "-c", "import os; os.kill(os.getpid(), 9)"]) == (137, None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_tiny_run(tmp_path_factory.mktemp("swept"))


def sweep_command(folder: Path, run: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "kto_ds", "sweep", *config_of(folder, output_dir=folder / run, train__num_train_epochs=1), "--num_gpus", "1", *options]


@pytest.mark.slow
def test_a_failed_trial_is_told_and_finished_ones_are_not_repeated(tiny):
    command = sweep_command(tiny, "failing", "--loss.beta", "0.1,0.5", "--batch.max_tokens_per_microbatch", "128,4")
    first = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert first.returncode == 1 and "2 of 4 trials have no eval/rewards/auc" in first.stderr, first.stdout + first.stderr
    folder = tiny / "failing" / "sweep"
    record = json.loads((folder / "sweep.json").read_text())
    assert [entry["state"] for entry in record["trials"]] == ["completed", "completed", "failed", "failed"]
    assert record["trials"][0]["value"] >= record["trials"][1]["value"] and "max_tokens_per_microbatch" in record["trials"][2]["reason"]
    assert f"kto-ds export --config {record['trials'][0]['folder']}/config.yaml" in first.stdout and "to compare: kto-ds report " in first.stdout
    # One reference for all: made here, once, and no trial has one of its own.
    assert first.stdout.count("$ kto-ds precompute-ref") == 1 and not list(folder.glob("*/reference"))
    files = {path: path.stat().st_mtime_ns for path in folder.glob("*128/metrics.jsonl")}
    assert len(files) == 2
    second = subprocess.run([*command, "--num_trials", "4"], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert second.returncode == 1 and second.stdout.count("$ kto-ds train") == 2 and {path: path.stat().st_mtime_ns for path in files} == files
    export = ["export", "--config", f"{record['trials'][0]['folder']}/config.yaml"]
    ranks.require_success(export, log=tiny / "log", num_ranks=1)
    assert (Path(record["trials"][0]["folder"]) / "export" / "model.safetensors").is_file()
    changed = subprocess.run([*command, "--optim.weight_decay", "0.1"], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert changed.returncode == 2 and "optim.weight_decay: was 0.0, now 0.1" in changed.stderr


@pytest.mark.slow
def test_a_sweep_that_is_stopped_goes_on_where_it_was(tiny):
    command = sweep_command(tiny, "stopped", "--loss.beta", "0.1,0.5", "--train.max_steps", "40", "--checkpoint.save_steps", "10")
    log = tiny / "stopped.log"
    with open(log, "w") as stream, subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT) as process:
        metrics = tiny / "stopped" / "sweep" / "beta-0.1" / "metrics.jsonl"
        deadline = time.monotonic() + 400
        while not metrics.exists():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(200) == 75, log.read_text()
    state = json.loads((metrics.parent / "status.json").read_text())
    assert state["state"] == "preempted" and 0 < state["step"] < 40 and "start the same command again" in log.read_text()
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [record["step"] for line in metrics.read_text().splitlines() if (record := json.loads(line))["split"] == "train"]
    assert steps == list(range(1, 41)) and f"resuming at step {state['step'] + 1} of 40" in done.stdout
