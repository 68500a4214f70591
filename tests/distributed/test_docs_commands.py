"""Every kto-ds command that a page shows runs here, in a folder that has the files it names, on a tiny run and one rank; or in the test that ELSEWHERE names. Every option that a page names is in a test."""

import glob
import os
import re
import shlex
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from kto_ds.cli import COMMANDS, OWN_OPTIONS
from tests.distributed import ranks
from tests.distributed.runs import ROOT, write_config
from tests.distributed.tiny_run import make_tiny_run
from tests.unit.made_up_runs import make_run, records_of
from tests.unit.test_docs import PAGES
from tests.unit.test_docs_data import blocks

pytestmark = pytest.mark.distributed

# The order in which they make what the next ones need.
ORDER = ("import-trl", "plan", "doctor", "prepare", "inspect", "precompute-ref", "train", "export", "evaluate", "report", "verify", "chat", "sweep")
# What needs more than a tiny run: the option, or the command, and the test that runs it.
ELSEWHERE = {
    "demo": "tests/unit/test_demo_task.py",
    "--wandb-sync": "tests/unit/test_report_command.py",
    "--merge": "tests/distributed/test_lora.py",
    "--profile": "tests/distributed/test_train.py",
    "--accept-changes": "tests/unit/test_resume.py",
    "--push-to-hub": "tests/unit/test_push.py",
}
SLOW = {("sweep", "--config", "run.yaml", "--loss.beta", "0.05,0.1,0.3", "--optim.learning_rate", "5e-7,1e-6")}  # six trials
APART = {"out", "png", "num_gpus", "num_ranks", "output_dir"}  # options of demo, import-trl and report RUN
SPOKEN = re.compile(r"<|\.\.\.|\bRUN\b|\|")  # a form, not a command
NAMES = [("import-trl",), ("sweep",)]  # no commands without their arguments


def commands_shown() -> list[tuple[str, ...]]:
    """Return (command, options ...) of every line of a block, or piece of code in a sentence, that starts kto_ds."""
    found = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [line for block in re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) for line in block.replace("\\\n", " ").splitlines()]
        for line in [*lines, *re.findall(r"`((?:kto-ds|deepspeed|torchrun) [^`\n]+)`", text)]:
            called = re.search(r"(?:^|\s)(?:kto-ds|--module kto_ds|-m kto_ds)\s+(.+)", line.split(" #")[0])
            if called and not SPOKEN.search(called[1]):
                words = tuple(shlex.split(called[1].partition(" > ")[0]))
                assert words[0] in {*COMMANDS, "--help"}, f"{page.name}: {line}"
                if words not in NAMES:
                    found.setdefault(words, page.name)
    return sorted(found, key=lambda words: ORDER.index(words[0]) if words[0] in ORDER else len(ORDER))


SHOWN = commands_shown()


def is_elsewhere(words: tuple[str, ...]) -> bool:
    return any(word.split("=")[0] in ELSEWHERE for word in words)


def run_in(command: list[str]) -> None:
    """Be a rank: run a command in a folder."""
    folder, *words = command
    os.chdir(folder)
    ranks.kto_ds(words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the files that commands name."""
    folder = make_tiny_run(tmp_path_factory.mktemp("shown"))
    config = YAML(typ="safe").load(folder / "run.yaml")
    write_config(folder / "run.yaml", **{**config, "checkpoint": {**config["checkpoint"], "metric_for_best_model": "eval/rewards/auc"}})
    for name in ("mine", "beta01", "beta03"):
        make_run(folder / "runs" / name, records_of(3))
    (folder / "kto.yaml").write_text("model_name_or_path: Qwen/Qwen3-0.6B\ndataset_name: trl-lib/kto-mix-14k\n")
    [values] = [block.text for block in blocks(ROOT / "docs" / "sweep.md") if block.file == "sweep.yaml"]
    (folder / "sweep.yaml").write_text(values)
    return folder


def test_there_are_commands_and_what_is_left_out_runs_elsewhere():
    assert len(SHOWN) >= 40 and {words[0] for words in SHOWN} >= {*ORDER} - {"verify"} and {*SLOW} <= {*SHOWN}
    used = {word.split("=")[0] for words in SHOWN for word in words} & ELSEWHERE.keys()
    for option in used:
        text = (ROOT / ELSEWHERE[option]).read_text(encoding="utf-8")
        assert option.lstrip("-").replace("-", "_") in text or option in text, option


@pytest.mark.parametrize("words", [pytest.param(words, marks=pytest.mark.slow if words in SLOW else ()) for words in SHOWN if not is_elsewhere(words)], ids=" ".join)
def test_a_command_that_is_shown_runs(folder, words):
    place = folder
    if words[0] == "import-trl":  # which overwrites nothing
        place = folder / f"moving{SHOWN.index(words)}"
        place.mkdir()
        (place / "kto.yaml").symlink_to(folder / "kto.yaml")
    elif words == ("report",) or words[0] not in ("report", "--help") and "--config" not in words:
        words = (*words, "--config", "run.yaml")  # in a sentence it is left out
    given = [found for word in words for found in (sorted(glob.glob(word, root_dir=folder)) if "*" in word else [word.replace("/shared/run.yaml", "run.yaml")])]
    with ranks.Ranks([place, *given], log=folder / "log", num_ranks=1, program=run_in) as job:
        exit_codes = job.wait(ranks.COMMANDS_SECONDS)
    output = job.output()
    assert exit_codes == [0] and output.strip() and "Traceback" not in output, output[-4000:]


def test_every_option_that_a_page_names_is_in_a_test():
    """Keys of the config are options too; tests/unit/test_config_cli.py goes through all of those."""
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    tests = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").rglob("*.py")) if path != Path(__file__))
    named = [name for name in {*APART, *(name for options in OWN_OPTIONS.values() for name in options)} if re.search(rf"--{name.replace('_', '[-_]')}\b", pages)]
    assert len(named) > 25
    assert [name for name in named if not re.search(rf"--{name.replace('_', '[-_]')}\b|\b{name}=", tests)] == []
