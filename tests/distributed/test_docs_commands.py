"""Every kto-ds command that a page shows runs here, on a tiny run, as it stands but for names of files and numbers of ranks; or in the test that ELSEWHERE names."""

import re
import shlex
from pathlib import Path

import pytest

from kto_ds.cli import COMMANDS
from tests.distributed import ranks
from tests.distributed.runs import ROOT
from tests.distributed.tiny_run import make_tiny_run
from tests.unit.test_docs import PAGES

pytestmark = pytest.mark.distributed

# The order in which they make what the next ones need.
ORDER = ("plan", "doctor", "prepare", "inspect", "precompute-ref", "train", "export", "evaluate", "report", "verify")
# What needs more than a tiny run: the option, or the command, and the test that runs it.
ELSEWHERE = {
    "demo": "tests/unit/test_demo_task.py",
    "--wandb-sync": "tests/unit/test_report_command.py",
    "--merge": "tests/distributed/test_lora.py",
    "--profile": "tests/distributed/test_train.py",
    "--accept-changes": "tests/unit/test_resume.py",
}
SPOKEN = re.compile(r"<|\.\.\.|\bRUN\b")  # a form, not a command


def commands_shown() -> list[tuple[str, ...]]:
    """Return (command, options ...) of every line of a block, or piece of code in a sentence, that starts kto_ds."""
    found = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [line for block in re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) for line in block.replace("\\\n", " ").splitlines()]
        for line in [*lines, *re.findall(r"`((?:kto-ds|deepspeed|torchrun) [^`\n]+)`", text)]:
            called = re.search(r"(?:^|\s)(?:kto-ds|--module kto_ds|-m kto_ds)\s+(.+)", line.split(" #")[0])
            if called and not SPOKEN.search(called[1]):
                words = shlex.split(called[1])
                assert words[0] in {*COMMANDS, "--help"}, f"{page.name}: {line}"
                found.setdefault(tuple(words), page.name)
    return sorted(found, key=lambda words: ORDER.index(words[0]) if words[0] in ORDER else len(ORDER))


SHOWN = commands_shown()


def is_elsewhere(words: tuple[str, ...]) -> bool:
    return any(word.split("=")[0] in ELSEWHERE for word in words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_tiny_run(tmp_path_factory.mktemp("shown"))


def test_there_are_commands_and_what_is_left_out_runs_elsewhere():
    assert len(SHOWN) >= 12 and {words[0] for words in SHOWN} >= set(ORDER) - {"precompute-ref", "train", "verify"}
    used = {word.split("=")[0] for words in SHOWN for word in words} & ELSEWHERE.keys()
    for option in used:
        text = (ROOT / ELSEWHERE[option]).read_text(encoding="utf-8")
        assert option.lstrip("-").replace("-", "_") in text or option in text, option


@pytest.mark.parametrize("words", [words for words in SHOWN if not is_elsewhere(words)], ids=" ".join)
def test_a_command_that_is_shown_runs(folder, words):
    words = [str(folder / "run.yaml") if place and words[place - 1] == "--config" else word for place, word in enumerate(words)]
    if "--config" not in words and "--help" not in words and words[0] != "--help":
        words += ["--config", str(folder / "run.yaml")]  # in a sentence it is left out
    for option, value in (("--max-wall-time", "3:50:00"),):
        assert option not in words or value in words
    output = ranks.require_success(words, log=folder / "log", num_ranks=1)
    assert output.strip() and "Traceback" not in output
