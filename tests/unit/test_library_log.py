"""What goes to a rank's log, what stays on the console, and that nothing of a crash is lost. In processes of their own, as descriptors are at stake."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.runs import ROOT, environment

SECRET = "hf_" + "abcdefghijklmnopqrstuvwxyzABCDEFGH"
BEFORE = """
import logging, os, subprocess, sys, warnings
from pathlib import Path
from kto_ds.errors import UserError
from kto_ds.runtime.library_log import library_log

own = logging.getLogger("own")
own.addHandler(logging.StreamHandler(sys.stdout))
own.propagate = False
with library_log(Path(sys.argv[1]), 3):
"""
NOISE = """
    own.warning("through a handler of its own")
    logging.getLogger("other").warning("through the root, %s", "SECRET")
    for _ in range(3):
        warnings.warn("a warning")
    os.write(2, b"from C\\n")
    subprocess.run(["sh", "-c", "echo from a child >&2"])
    print("to stderr", file=sys.stderr)
    print("to stdout", flush=True)
os.write(2, b"C afterwards\\n")
own.warning("its own afterwards")
print("stderr afterwards", file=sys.stderr)
"""


def run(folder: Path, inside: str) -> tuple[int, str, str, str]:
    """Return exit code, stdout, stderr and the log of a program."""
    command = [sys.executable, "-c", BEFORE + inside.replace("SECRET", SECRET), str(folder)]
    ended = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    return ended.returncode, ended.stdout, ended.stderr, (folder / "rank3.log").read_text()


def test_what_libraries_say_is_in_the_log_alone(tmp_path):
    exit_code, out, err, log = run(tmp_path, NOISE)
    assert exit_code == 0 and out == "to stdout\nits own afterwards\n" and err == "to stderr\nC afterwards\nstderr afterwards\n"
    for words in ("through a handler of its own", "WARNING other: through the root", "UserWarning: a warning", "from C", "from a child"):
        assert log.count(words) == 1, log
    assert SECRET not in log and "afterwards" not in log and "to std" not in log and log.startswith("\n== ")
    run(tmp_path, "    pass")
    assert (tmp_path / "rank3.log").read_text().startswith(log), "a later start adds to it"


def test_a_signal_that_kills_leaves_its_stacks_on_the_console(tmp_path):
    exit_code, _, err, log = run(tmp_path, "    os.write(2, b'what(): from C\\n')\n    os.abort()")
    assert exit_code == -6 and "Fatal Python error: Aborted" in err and "what(): from C" in log


@pytest.mark.parametrize(("error", "is_ours"), [("ZeroDivisionError('text')", False), ("UserError('text')", True)])
def test_an_error_of_libraries_names_the_log(tmp_path, error, is_ours):
    exit_code, _, err, _ = run(tmp_path, f"    raise {error}")
    assert exit_code == 1 and "text" in err and (f"what the libraries said is in {tmp_path / 'rank3.log'}" in err) != is_ours
