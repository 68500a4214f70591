"""The console on a real pseudo-terminal of several widths, and in a pipe."""

import io
import os
import pty
import re
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest

from kto_ds.report import screen
from kto_ds.report.console import Console, fitting
from kto_ds.report.run_view import Closing, Estimate, Opening, closing_rows, closing_title, opening_rows, opening_title
from kto_ds.report.screen import WorkBar, counted, duration, plain_lines, show, work_line
from kto_ds.streams import surviving
from tests.unit.log_records import eval_record, train_record

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
HIDES_CURSOR, SHOWS_CURSOR = "\x1b[?25l", "\x1b[?25h"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def on_terminal(action: Callable[[TextIO], None], columns: int, encoding: str = "utf-8") -> str:
    """Return what an action writes to a pseudo-terminal of so many columns."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, columns))
    with os.fdopen(follower, "w", encoding=encoding) as stream:
        action(stream)
    written = b""
    try:
        while chunk := os.read(leader, 4096):
            written += chunk
    except OSError:  # how Linux ends a pseudo-terminal whose other side is closed
        pass
    os.close(leader)
    return written.decode()


def a_run(stream: TextIO) -> None:
    console = Console(300, done_steps=10, stream=stream)
    console.log(train_record(11, tokens_per_second=5812.4, mfu=0.412, learning_rate=2e-4, grad_norm=1.2345))
    console.log(eval_record(11))
    print("step 12: its update is left out")
    console.log(train_record(12, tokens_per_second=5812.4, mfu=0.412, learning_rate=2e-4, grad_norm=1.2345))
    console.close()


def lines_of(written: str) -> list[str]:
    return re.split(r"[\r\n]+", CONTROL.sub("", written))


def test_without_a_terminal_a_record_is_one_plain_line(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    console = Console(300, stream=stream)
    console.log(train_record(12, learning_rate=2e-4, grad_norm=1.2345, tokens_per_second=5812.4, **{"logratios/chosen": [1, 2]}))
    console.log(eval_record(12))
    console.close()
    train, evaluation = stream.getvalue().splitlines()
    assert re.fullmatch(r"step 12/300  epoch 0\.24  loss 0\.4831  kl 0\.12  margin 0\.31  lr 2\.0e-04  grad 1\.23  tok/s 5,812  eta 7m1[12]s", train)
    assert evaluation == "eval  step 12/300  loss 0.5000  kl 0.1  auc 0.750"


def test_the_page_shows_the_lines_that_scripts_read():
    stream = io.StringIO()
    console = Console(300, stream=stream)
    console.log(train_record(12, learning_rate=2e-4, grad_norm=1.2345, tokens_per_second=5812.4, mfu=0.412))
    console.log({**eval_record(12), "epoch": 0.24, "rewards/margins": 0.2})
    train, evaluation = stream.getvalue().splitlines()
    page = (Path(__file__).parents[2] / "docs" / "watching.md").read_text(encoding="utf-8").splitlines()
    assert evaluation in page and any(line.startswith(train.split("eta")[0] + "eta ") for line in page)


def test_what_came_before_the_first_step_is_not_in_the_time_that_is_left(monkeypatch):
    now, stream = [0.0], io.StringIO()
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    console = Console(110, done_steps=10, stream=stream)
    for step, moment in ((12, 1003), (20, 1030)):  # 1.5 s a step to begin with, 3.375 s from there on
        now[0] = moment
        console.log(train_record(step))
    assert [line.split("eta ")[1] for line in stream.getvalue().splitlines()] == ["2m27s", "4m30s"]


@pytest.mark.parametrize("columns", [20, 40, 60, 120])
def test_a_terminal_gets_a_bar_of_its_width_and_other_lines_above_it(columns):
    written = on_terminal(a_run, columns)
    lines = lines_of(written)
    drawn = [line for line in lines if line.startswith(("step 11/300 ", "step 12/300 ", "loss"))]
    assert drawn and all(len(line) <= columns for line in drawn), drawn
    assert any(line.startswith("loss 0.4831" if columns < 40 else "loss 0.4831  margin 0.31  z 0.12") for line in drawn)
    assert "eval  step 11/300  loss 0.5000  kl 0.1  auc 0.750" in lines and "step 12: its update is left out" in CONTROL.sub("", written).replace("update \r\n", "update ")
    assert written.rindex(SHOWS_CURSOR) > written.rindex(HIDES_CURSOR)
    if columns >= 60:
        assert any("━" in line and "eta" in line for line in drawn) and any("z 0.12  tok/s 5,812  MFU 41.2%" in line for line in drawn)


def test_a_run_that_is_ended_from_outside_leaves_the_terminal_its_cursor():
    def ended_here(stream: TextIO) -> None:
        console = Console(300, stream=stream)
        console.log(train_record(1))
        stream.write("ended here")
        console.close()

    written = on_terminal(ended_here, 80).split("ended here")[0]
    assert HIDES_CURSOR in written and written.rindex(SHOWS_CURSOR) > written.rindex(HIDES_CURSOR)


def test_a_terminal_that_goes_away_ends_nothing():
    leader, follower = pty.openpty()
    with surviving(follower, sys.__stdout__) as stream:
        console, bar = Console(300, stream=stream), WorkBar("verify", unit="B", total=2, stream=stream)
        console.log(train_record(1))
        os.close(leader)
        with pytest.raises(OSError, match="Input/output error"):
            os.write(follower, b"gone")
        for record in (train_record(2), eval_record(2)):
            console.log(record)
        console.tell("a notice")
        print("to what the bar has in place of stdout", flush=True)
        bar.advance(1)
        bar.tell("a notice")
        bar.__exit__()
        console.close()
        show("title", [("model", "m")], stream)
    os.close(follower)


def test_a_narrow_terminal_of_another_encoding_gets_what_it_can_show():
    def everything(stream: TextIO) -> None:
        a_run(stream)
        show("title of a box", [("a label that is long", "value")], stream)

    assert "loss" in on_terminal(everything, 9, encoding="latin-1")


def test_no_color_and_terminals_that_cannot_redraw(monkeypatch):
    is_coloured = re.compile(r"\x1b\[[0-9;]*3\d[;0-9]*m").search
    assert is_coloured(on_terminal(a_run, 80))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not is_coloured(on_terminal(a_run, 80))
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in on_terminal(a_run, 80)


def test_as_many_metrics_as_fit_are_shown():
    assert fitting(["loss 1", "margin 2", "z 3"], 19) == "loss 1  margin 2" and fitting(["loss 1", "margin 2", "z 3"], 21) == "loss 1  margin 2  z 3"
    assert fitting(["loss 1"], 2) == "loss 1" and fitting([], 2) == ""


@pytest.mark.parametrize(
    "seconds, text", [(0, "0s"), (45.9, "45s"), (60, "1m00s"), (192, "3m12s"), (3840, "1h04m"), (86399, "23h59m"), (183600, "2d03h")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_one_of_a_thing_is_no_plural():
    assert [counted(1, "step"), counted(1200, "step"), counted(1.0, "epoch"), counted(0.9999, "epoch"), counted(0.25, "epoch")] == ["1 step", "1,200 steps", "1 epoch", "1 epoch", "0.25 epochs"]


# boxes

OPENING = Opening(
    model="an-organisation/a-model-whose-name-does-not-end-before-the-terminal-does-and-goes-on", dtype="bfloat16", num_parameters=596_049_920, num_trainable=596_049_920,
    num_examples=32, global_batch_size=8, num_epochs=3.0, done_steps=0, num_steps=12, num_ranks=2, ranks_of_a_row=1, zero_stage=3, deepspeed_config="zero3",
    way="prefix_shared, sdpa, torch kernels", micro_batch_tokens=8192, scoring_tokens=16384, checkpointing="activations of every layer checkpointed",
    estimate=Estimate(15 * 2**30, 80 * 2**30), output_dir=Path("runs/mine"), log_folder=Path("runs/mine/logs"),
)  # fmt: skip


def test_what_will_run():
    assert plain_lines(opening_title(OPENING), opening_rows(OPENING)) == [
        "kto-ds train: starting at step 1 of 12",
        f"  model    {OPENING.model}",
        "           596,049,920 parameters, bfloat16",
        "  data     32 examples, 8 a step; 12 steps are 3 epochs",
        "  ranks    2, ZeRO 3 (zero3)",
        "  batches  micro-batches of 8,192 tokens, 16,384 without gradients",
        "  compute  prefix_shared, sdpa, torch kernels; activations of every layer checkpointed",
        "  memory   about 15.0 of 80.0 GiB a rank at the highest moment of a step",
        "  files    runs/mine; what libraries say: runs/mine/logs",
    ]
    other = OPENING._replace(
        num_trainable=1_000, ranks_of_a_row=2, estimate=None, weights="automatic: 1.9 and 1", aux_loss="load-balancing loss", done_steps=4
    )  # fmt: skip
    rows = dict(opening_rows(other))
    assert opening_title(other) == "kto-ds train: resuming at step 5 of 12"
    assert dict(opening_rows(OPENING._replace(num_steps=1, num_epochs=1.0)))["data"] == "32 examples, 8 a step; 1 step is 1 epoch"
    assert opening_title(OPENING._replace(done_steps=12)) == "kto-ds train: nothing left to do of 12 steps"
    assert rows[""] == "596,049,920 parameters, 1,000 of them trained, bfloat16" and rows["batches"].endswith("each shared by 2 ranks that take so many")
    assert "memory" not in rows and rows["weights"] == "automatic: 1.9 and 1" and rows["experts"] == "load-balancing loss"


def test_what_a_run_came_to():
    records = [
        train_record(1), {**eval_record(4), "loss": 0.4}, train_record(12, loss=0.2), {**eval_record(12), "loss": 0.5}, {**eval_record(12), "split": "eval/other"},
        {"split": "train", "step": 13, "skipped_steps": 1},
    ]  # fmt: skip
    closing = Closing(13, 192.0, records, None, [("speed", "592 tokens/s")], Path("runs/mine"))
    assert plain_lines(closing_title(closing), closing_rows(closing)) == [
        "done: 13 steps, 3m12s since this start",
        "  train       loss 0.2000, margin 0.31, z 0.12 at step 12",
        "  eval        loss 0.5000, z 0.1, AUC 0.750 at step 12; lowest loss 0.4000 at step 4",
        "  eval/other  loss 0.5000, z 0.1, AUC 0.750 at step 12",
        "  speed       592 tokens/s",
        "  files       checkpoints/, metrics.jsonl, metrics.png and logs/ in runs/mine",
        "  next        kto-ds export --config RUN.yaml",
    ]
    assert "checkpoints/ (best: step 4), " in dict(closing_rows(closing._replace(best_step=4)))["files"]
    assert closing_rows(closing._replace(records=[], speed=[]))[0][0] == "files"
    assert closing_title(closing._replace(num_steps=1)).startswith("done: 1 step, ")


@pytest.mark.parametrize("columns", [40, 60, 100])
def test_a_box_fits_the_terminal_and_loses_nothing(columns):
    written = on_terminal(lambda stream: show(opening_title(OPENING), opening_rows(OPENING), stream), columns)
    lines = [line for line in lines_of(written) if line]
    assert all(len(line) == columns for line in lines if line[0] in "╭│╰") and lines[0].startswith("╭─ kto-ds train: starting at step 1 of 12"[: columns - 3])
    assert OPENING.model in "".join(line.strip("│ ").removeprefix("model").strip() for line in lines[1:-1])


def test_in_a_pipe_a_box_is_lines_and_control_codes_are_spelled_out():
    stream = io.StringIO()
    show("title", [("model", "a\x1b[31mb"), ("data", "c")], stream)
    assert stream.getvalue() == "title\n  model  a\\x1b[31mb\n  data   c\n"


# bars of work


def test_a_work_bar_in_a_pipe_speaks_now_and_then(monkeypatch):
    stream = io.StringIO()
    with WorkBar("verify", unit="B", total=4000, stream=stream) as bar:
        bar.advance(1000)
        assert stream.getvalue() == ""
        monkeypatch.setattr(screen, "LINE_SECONDS", 0.0)
        bar.advance(1000)
    assert re.fullmatch(r"verify: 2\.00k of 4\.00k B, \S+ B/s, eta \S+\n", stream.getvalue())


def test_a_work_bar_on_a_terminal_fits_it_and_one_that_is_not_shown_says_nothing():
    def work(stream: TextIO, is_shown: bool) -> None:
        with WorkBar("precompute-ref, rank 0", unit=" tokens", total=4000, is_shown=is_shown, stream=stream) as bar:
            bar.advance(4000)

    written = on_terminal(lambda stream: work(stream, True), 60)
    assert "100%" in written and all(len(line) <= 60 for line in lines_of(written))
    assert on_terminal(lambda stream: work(stream, False), 60) == ""


def test_what_a_work_bar_says():
    assert work_line("tokenize", 1500, None, " rows", 3.0) == "tokenize: 1.50k rows, 500 rows/s"
    assert work_line("verify", 1000, 4000, "B", 10.0) == "verify: 1.00k of 4.00k B, 100 B/s, eta 30s"
    assert work_line("verify", 0, 4000, "B", 10.0) == "verify: 0.00 B, 0.00 B/s"
