"""What goes to a rank's log, what stays on the console, and that nothing of a crash is lost. In a process of its own, as descriptors are at stake."""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.distributed.runs import ROOT, environment

SECRET = "hf_" + "abcdefghijklmnopqrstuvwxyzABCDEFGH"
PROGRAM = f"""
import faulthandler, logging, os, subprocess, sys, threading, warnings
from pathlib import Path
from kto_ds.errors import UserError
from kto_ds.runtime.library_log import library_log

folder = Path(sys.argv[1])
own = logging.getLogger("own")
own.addHandler(logging.StreamHandler(sys.stdout))
own.propagate = False

class LibraryThread(threading.Thread):
    def run(self):
        raise OSError("in a thread of a library")

with library_log(folder, 3):
    own.warning("through a handler of its own")
    logging.getLogger("other").warning("through the root, %s", "{SECRET}")
    logging.getLogger("other").warning("a number: %d", "none")
    try:
        raise ValueError("{SECRET}")
    except ValueError:
        logging.getLogger("other").exception("with a traceback")
    late = logging.StreamHandler()
    for _ in range(3):
        warnings.warn("a warning")
    os.write(2, b"from C\\n")
    subprocess.run(["sh", "-c", "echo from a child >&2"])
    thread = LibraryThread()
    thread.start()
    thread.join()
    print("to stderr", file=sys.stderr)
    print("to stdout", flush=True)
os.write(2, b"C afterwards\\n")
own.warning("its own afterwards")
(folder / "file").touch()
files = [open(folder / "file", "a") for _ in range(10)]
late.handle(logging.makeLogRecord({{"msg": "a late word"}}))
assert faulthandler.is_enabled() == bool(os.environ.get("PYTHONFAULTHANDLER"))
for error in (ZeroDivisionError("theirs"), UserError("ours")):
    try:
        with library_log(folder, 3):
            raise error
    except Exception as found:
        print(type(found).__name__, vars(found).get("__notes__"), file=sys.stderr, flush=True)
with library_log(folder, 3):
    os.write(2, b"what(): from C")
    os.abort()
"""


class Ended(NamedTuple):
    log: Path
    exit_code: int
    out: str
    err: str


@pytest.fixture(scope="module", params=["", "1"], ids=["", "PYTHONFAULTHANDLER"])
def ended(tmp_path_factory, request) -> Ended:
    folder = tmp_path_factory.mktemp("logs")
    variables = {**environment(), "PYTHONFAULTHANDLER": request.param}
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(folder)], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    return Ended(folder / "rank3.log", done.returncode, done.stdout, done.stderr)


def test_what_libraries_say_is_in_the_log_alone(ended):
    log = ended.log.read_text()
    assert ended.out == "to stdout\nits own afterwards\n" and ended.err.startswith("to stderr\nC afterwards\na late word\nZeroDivisionError"), ended
    for words in ("through a handler of its own", "WARNING other: through the root", "UserWarning: a warning", "\nfrom C\n", "from a child", "OSError: in a thread of a library", "ERROR other: with a traceback\nTraceback (most"):
        assert log.count(words) == 1, log
    assert SECRET not in log and "afterwards" not in log and "to std" not in log
    assert log.count("\n== 20") == 4, "every start has a heading, and takes nothing away"
    assert (ended.log.parent / "file").read_text() == "", "what a handler of the block writes later goes into no other file"


def test_an_error_of_libraries_names_the_log_and_one_of_ours_does_not(ended):
    assert f"ZeroDivisionError ['what the libraries said is in {ended.log}']\nUserError None\n" in ended.err


def test_a_signal_that_kills_leaves_its_stacks_on_the_console(ended):
    assert ended.exit_code == -6 and "Fatal Python error: Aborted" in ended.err and "<module>" in ended.err
    assert "what(): from C" in ended.log.read_text() and "what()" not in ended.err
