"""The whole pipeline on a task that a program can check: the commands a user would type, and what they changed."""

import json
import shlex
import shutil
import time
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from kto_ds.demo import base_model, task
from kto_ds.errors import KtoError, UserError
from kto_ds.launching import launcher_arguments, run_module
from kto_ds.report.metrics_file import METRICS_FILE, read_records

SEED = 0
CONFIG_FILE = "demo.yaml"
NUM_TRAINING_PROMPTS, NUM_VALIDATION_PROMPTS, NUM_TEST_PROMPTS = 1500, 150, 500
COMPLETIONS_PER_PROMPT = 2
LEAST_RISE = 0.30  # in the share of right answers

CONFIG = """\
output_dir: {output_dir}
model: {{path: {base}, dtype: float32, gradient_checkpointing: false}}
data:
  train: [{{path: {train}}}]
  eval: [{{path: {eval}}}]
  max_length: 32
  kl_group_size: 4
reference: {{max_tokens_per_microbatch: 4096}}
loss: {{beta: 0.5, desirable_weight: 1.5}}
batch: {{global_batch_size: 32, max_tokens_per_microbatch: 1024}}  # one micro-batch a rank
optim: {{learning_rate: 4.0e-4, lr_scheduler_type: linear, warmup_ratio: 0.05}}  # hundreds of times what a large model takes
train: {{num_train_epochs: 6}}
deepspeed: {{config: zero3}}
checkpoint: {{save_steps: 100, save_total_limit: 2}}
report: {{logging_steps: 5}}
"""


class CommandFailed(KtoError):
    """A command of the pipeline failed and has said why; the demo ends with its exit code."""

    def __init__(self, typed: str, exit_code: int):
        self.exit_code = exit_code
        super().__init__(f"the demo stops here: exit code {exit_code} from {typed}")


def main(output_dir: Path, num_ranks: int = 2) -> None:
    """Make a model that answers half of its sums wrong, align it with `num_ranks` ranks, and measure it before and after."""
    began = time.monotonic()
    # More threads cost a model this small more than they bring, and their number would change its weights.
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _make_folder(output_dir)
    prompts = task.split_prompts(SEED)
    test_prompts = prompts.test[:NUM_TEST_PROMPTS]

    tokenizer = base_model.build_tokenizer()
    model = _make_base_model(tokenizer, prompts.training, device)
    _save(model, tokenizer, output_dir / "base")
    _write_rows(output_dir / "train.jsonl", model, tokenizer, prompts.training[:NUM_TRAINING_PROMPTS])
    _write_rows(output_dir / "eval.jsonl", model, tokenizer, prompts.validation[:NUM_VALIDATION_PROMPTS])
    before = base_model.measure_accuracy(model, tokenizer, test_prompts, seed=SEED)
    print(f"base model: {before:.1%} of {len(test_prompts)} held-out sums right", flush=True)

    config = _write_config(output_dir)
    _run_single("prepare", config)
    _run_ranks("precompute-ref", config, num_ranks)
    _run_ranks("train", config, num_ranks)
    _require_completed(output_dir)
    _run_single("export", config)
    _run_single("evaluate", config)

    disable_progress_bar()
    aligned = AutoModelForCausalLM.from_pretrained(output_dir / "export", dtype=torch.float32).to(device)
    after = base_model.measure_accuracy(aligned, tokenizer, test_prompts, seed=SEED)
    _print_table(output_dir, before=before, after=after, num_test_prompts=len(test_prompts), seconds=time.monotonic() - began)
    if after - before < LEAST_RISE:
        raise KtoError(f"KTO took right answers from {before:.1%} to {after:.1%}; expected a rise of {100 * LEAST_RISE:.0f} points or more")


def _make_folder(folder: Path) -> None:
    """Make an empty folder, in place of an earlier demo if need be."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / CONFIG_FILE).is_file():
            raise UserError("the folder is not empty, and not of an earlier demo", where=str(folder), remedy="give another one with --output_dir")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # First of all, so that a demo cut short is known as one.
    (folder / CONFIG_FILE).touch()


def _make_base_model(tokenizer: PreTrainedTokenizerFast, prompts: list[str], device: torch.device) -> PreTrainedModel:
    model = base_model.build_model(tokenizer, SEED).to(device)
    print(f"base model: {model.num_parameters():,} parameters; supervised start on sums of which half are wrong", flush=True)
    base_model.supervised_start(model, tokenizer, prompts, seed=SEED, progress=lambda step, loss: print(f"  step {step}  loss {loss:.3f}", flush=True))
    return model


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_rows(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> None:
    asked = [prompt for prompt in prompts for _ in range(COMPLETIONS_PER_PROMPT)]
    rows = base_model.label_rows(asked, base_model.sample_completions(model, tokenizer, asked, seed=SEED))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} sampled answers, {sum(row['label'] for row in rows)} of them labelled right by the program", flush=True)


def _write_config(output_dir: Path) -> Path:
    paths = {"output_dir": output_dir, "base": output_dir / "base", "train": output_dir / "train.jsonl", "eval": output_dir / "eval.jsonl"}
    path = output_dir / CONFIG_FILE
    # A JSON string is a YAML string, whatever the path holds.
    path.write_text(CONFIG.format(**{name: json.dumps(str(value)) for name, value in paths.items()}), encoding="utf-8")
    return path


def _run_single(command: str, config: Path) -> None:
    _run("kto-ds", "kto_ds", [command, "--config", str(config)])


def _run_ranks(command: str, config: Path, num_ranks: int) -> None:
    if torch.cuda.is_available():
        num_ranks = min(num_ranks, torch.cuda.device_count())
    _run("deepspeed", "deepspeed.launcher.runner", launcher_arguments([command, "--config", str(config)], num_ranks=num_ranks))


def _run(program: str, module: str, arguments: list[str]) -> None:
    """Print what a user would type and run the module behind it."""
    typed = shlex.join([program, *arguments])
    print(f"\n$ {typed}", flush=True)
    if exit_code := run_module(module, arguments):
        raise CommandFailed(typed, exit_code)


def _require_completed(output_dir: Path) -> None:
    # The launcher may exit with 0 after its ranks were killed.
    status = json.loads((output_dir / "status.json").read_text(encoding="utf-8"))
    if status["state"] != "completed":
        raise KtoError(f"training is {status['state']} at step {status['step']}: {status.get('reason')}")


def _print_table(output_dir: Path, *, before: float, after: float, num_test_prompts: int, seconds: float) -> None:
    records = read_records(output_dir / METRICS_FILE)
    steps = [record for record in records if record["split"] == "train"]
    held_out = [record for record in records if record["split"] == "eval"][-1]
    plot = output_dir / "metrics.png"
    table = Table(title="KTO on sums of two numbers", show_header=False)
    for name, value in (
        (f"right answers before ({num_test_prompts} held-out sums)", f"{before:.1%}"),
        ("right answers after", f"{after:.1%}"),
        ("reward margin, right minus wrong (held out)", f"{held_out['rewards/margins']:.2f}"),
        ("reference point z (held out / in training)", f"{held_out['kl']:.3f} / {sum(record['kl'] for record in steps) / len(steps):.3f}"),
        ("tokens/s, median", f"{median(record['tokens_per_second'] for record in steps):,.0f}"),
        ("peak memory a rank, GiB", f"{max(record['peak_memory_gib'] for record in steps):.2f}"),
        ("model", str(output_dir / "export")),
        ("metrics", str(output_dir / METRICS_FILE)),
        ("plot", str(plot) if plot.is_file() else "none"),
        ("whole demo", f"{seconds / 60:.1f} minutes"),
    ):
        table.add_row(name, value)
    # Wide enough for any path to stay in one piece; the table takes no more than it needs.
    Console(width=1000, markup=False, highlight=False).print(table)
