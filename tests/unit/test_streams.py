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


def test_other_errors_of_a_stream_are_errors():
    with open("/dev/full", "w") as full:
        stream = surviving(full.fileno(), io.TextIOWrapper(io.BytesIO(), write_through=True))
        with pytest.raises(OSError, match="No space left"):
            stream.write("a word")
