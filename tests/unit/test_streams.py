"""A program whose terminal is gone."""

import io
import os
import pty
import subprocess
import sys

import pytest

from kto_ds.streams import surviving
from tests.distributed.runs import ROOT, environment, write_config


@pytest.mark.parametrize("unbuffered", [[], ["-u"]])
def test_a_program_whose_terminal_is_gone_comes_to_its_end(tmp_path, unbuffered):
    write_config(tmp_path / "run.yaml", output_dir=str(tmp_path), model={"path": "m"}, data={"train": [{"path": "rows.jsonl"}]})
    leader, follower = pty.openpty()
    command = [sys.executable, *unbuffered, "-m", "kto_ds", "plan", "--config", str(tmp_path / "run.yaml"), "--print-config"]
    program = subprocess.Popen(command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=follower, stderr=follower, start_new_session=True)
    os.close(follower)
    os.close(leader)
    assert program.wait(300) == 0


@pytest.mark.parametrize("words, exit_code", [
    ("from kto_ds import early; early.leave_on_signals(); os.kill(os.getpid(), signal.SIGTERM); sys.exit(3)", 75),
    (f"os.execvp('bash', ['bash', '-ec', 'source {ROOT}/launch/ranks.sh; say something; exit 4'])", 4),
])  # fmt: skip
def test_nor_does_it_keep_a_signal_or_the_next_stage_from_coming(words, exit_code):
    leader, follower = pty.openpty()
    program = f"import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); sys.stdin.readline(); {words}"
    started = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=follower, stderr=follower, start_new_session=True)
    os.close(follower)
    os.close(leader)
    started.communicate(b"go on\n", timeout=60)
    assert started.returncode == exit_code


def test_other_errors_of_a_stream_are_errors():
    with open("/dev/full", "w") as full:
        stream = surviving(full.fileno(), io.TextIOWrapper(io.BytesIO(), write_through=True))
        with pytest.raises(OSError, match="No space left"):
            stream.write("a word")
