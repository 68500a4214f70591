"""docs/moving.md and docs/sweep.md: the table of TRL's options is what import-trl does, and every command shown runs.

After a change of the rules: python -m tests.unit.test_docs_moving writes the table anew.
"""

import re
import shlex
from pathlib import Path

import pytest

from kto_ds import cli
from kto_ds.moving.trl_command import Command
from kto_ds.moving.trl_import import translate
from kto_ds.moving.trl_options import EARLIER, OPTIONS
from tests.distributed.runs import ROOT, write_config

MOVING, SWEEP = ROOT / "docs" / "moving.md", ROOT / "docs" / "sweep.md"
MARKS = "<!-- options: begin -->\n", "<!-- options: end -->"
# A value that shows what an option can become; others are shown with a number or a word.
PROBES = {
    "lr_scheduler_type": "cosine", "loss_type": "kto", "dtype": "bfloat16", "attn_implementation": "sdpa", "report_to": "all", "metric_for_best_model": "eval_loss", "optim": "adamw_torch",
    "train_sampling_strategy": "sequential", "model_revision": "v1", "max_steps": "100", "warmup_steps": "0.1", "logging_steps": "5", "save_steps": "50", "eval_steps": "50", "test_split_size": "0.1",
    "dataset_name": "org/rows", "model_name_or_path": "some/model", "deepspeed": "zero2.json", "eval_strategy": "steps", "save_strategy": "steps", "logging_strategy": "steps", "truncation_mode": "drop",
    "warmup_ratio": "0.1", "per_device_train_batch_size": "8", "lora_task_type": "CAUSAL_LM", "bnb_4bit_quant_type": "nf4", "hub_model_id": "me/my-model",
}  # fmt: skip
AROUND = {"max_prompt_length": "512", "use_peft": "true", "load_best_model_at_end": "true", "eval_strategy": "steps", "push_to_hub": "true", "hub_model_id": "me/my-model"}  # other options that it takes for an option to count


def option_table() -> str:
    rows = []
    for name, option in {**OPTIONS, **EARLIER}.items():
        value = [{"path": "org/rows"}] if name == "datasets" else PROBES.get(name, "true" if option.kind == "flag" else "7")
        around = AROUND | ({"datasets": [{"path": "org/rows"}]} if name == "test_split_size" else {})
        found = translate(Command({**around, name: value}, {}, {}), num_gpus=1, sharding=("zero2", "the file itself, or the one of ds_configs/ with its stage and offload"), defaults={})
        [outcome] = [outcome for outcome in found.outcomes if outcome.option == name]
        keys = list(dict.fromkeys(key for key in found.settings if f"{key}: " in outcome.text))
        why = outcome.text.split("; ", len(keys))[-1] if len(outcome.text.split("; ")) > len(keys) else ""
        becomes = ", ".join(f"`{key}`" for key in keys) or ("no counterpart" if outcome.kind == "no counterpart" else "no key")
        rows.append(f"| `{name}`{' (earlier releases)' if name in EARLIER else ''} | {becomes} | {why.replace('|', ' ')} |\n")
    return "| option of TRL | becomes | |\n|---|---|---|\n" + "".join(rows)


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def test_the_table_is_what_import_trl_does():
    text = MOVING.read_text(encoding="utf-8")
    begin, end = text.index(MARKS[0]) + len(MARKS[0]), text.index(MARKS[1])
    assert text[begin:end] == option_table()


@pytest.mark.parametrize("command", commands(MOVING) + commands(SWEEP))
def test_every_command_shown_runs(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    [values] = re.findall(r"^```yaml sweep.yaml\n(.*?)^```$", SWEEP.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    Path("sweep.yaml").write_text(values)
    [script] = re.findall(r"^```bash train.sh\n(.*?)^```$", MOVING.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    Path("train.sh").write_text(script)
    Path("kto.yaml").write_text("model_name_or_path: some/model\ndataset_name: org/rows\n")
    write_config(Path("run.yaml"), output_dir="run", model={"path": "m"}, data={"train": [{"path": "rows.jsonl"}], "held_out_fraction": 0.1})
    program, *words = shlex.split(command.split(" > ")[0])
    assert program == "kto-ds"
    if words[0] == "sweep" and not {"--dry-run", "--print-commands"} & set(words):
        words.append("--dry-run")  # the trials themselves are run by test_sweep.py
    if words[0] == "export":
        return  # needs a hub: test_push.py has a stand-in for one
    if words[0] == "import-trl" and "--out" in words:
        Path("run.yaml").unlink()
    assert cli.run(words) == 0, capsys.readouterr().err
    if words[0] == "import-trl" and "--out" in words:
        config, _ = cli.read_config("train", ["--config", "run.yaml"])
        assert config.batch.global_batch_size == 8 * (4 if "--num_processes" in words else 8)


def test_every_option_of_the_sweep_is_explained():
    text = SWEEP.read_text(encoding="utf-8")
    for name in cli.OWN_OPTIONS["sweep"]:
        assert f"--{name}" in text or f"--{name.replace('_', '-')}" in text, name


if __name__ == "__main__":
    page = MOVING.read_text(encoding="utf-8")
    MOVING.write_text(page.split(MARKS[0])[0] + MARKS[0] + option_table() + MARKS[1] + page.split(MARKS[1])[1], encoding="utf-8")
