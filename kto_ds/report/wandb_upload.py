"""A process of its own that copies metrics.jsonl to wandb: `python -m kto_ds.report.wandb_upload`, an order as JSON on its stdin.

Training never waits for wandb and cannot fail by it, as it only starts this and tells it the end: stdin is closed. The record of a run is its metrics.jsonl;
line n of it is step n of the wandb run, so that what is there already is left out when a run goes on, or is uploaded afterwards.
Every line printed is for the user.
"""

import json
import os
import sys
import threading
from pathlib import Path
from typing import Literal, NamedTuple

import wandb

from kto_ds.artifacts import write_atomically
from kto_ds.report.metrics_file import METRICS_FILE, Record, whole_records

INIT_SECONDS = 20  # wandb itself adds up to 10 before it gives up
POLL_SECONDS = 0.5
HOW_TO_UPLOAD = "to upload it: kto-ds report --config RUN.yaml --wandb-sync"


class Order(NamedTuple):
    mode: Literal["online", "offline"]
    project: str
    name: str
    run_id: str
    output_dir: str
    run_config: dict
    goes_offline: bool  # where the server cannot be reached; else that is an error
    finish_seconds: float  # to hand over what is left, once training has ended


def main() -> int:
    order = Order(**json.loads(sys.stdin.buffer.readline()))
    ended = threading.Event()
    threading.Thread(target=_await_the_end, args=(ended, order.finish_seconds), daemon=True).start()
    try:
        folder = Path(order.output_dir) / "wandb"
        folder.mkdir(exist_ok=True)
        write_atomically(folder / "run_id", order.run_id)
        run = _open(order)
    except Exception as error:
        _say(f"warning: wandb is off; metrics.jsonl goes on: {_one_line(error)}" if order.goes_offline else _one_line(error))
        return 1
    try:
        num_records = _follow(run, Path(order.output_dir) / METRICS_FILE, ended)
        run.finish()
    except Exception as error:
        _say(f"warning: wandb is off from here on; metrics.jsonl goes on, {HOW_TO_UPLOAD}: {_one_line(error)}" if order.goes_offline else _one_line(error))
        return 1
    if not order.goes_offline:
        _say(f"wandb: all {num_records} records of {METRICS_FILE} are in run {order.run_id}")
    return 0


def _await_the_end(ended: threading.Event, finish_seconds: float) -> None:
    """Wait until training closes the pipe, or is gone; from then on there is only so much time, whatever wandb waits for."""
    sys.stdin.buffer.read()
    ended.set()
    deadline = threading.Timer(finish_seconds, os._exit, args=(1,))
    deadline.daemon = True
    deadline.start()


def _open(order: Order) -> wandb.Run:
    """Return the run, and tell where it is; offline where the server does not answer, if the order allows that."""
    if order.mode == "online":
        try:
            if not wandb.login(prompt=False, verify=False):
                raise ConnectionError("no API key; run `wandb login` or set WANDB_API_KEY")
            run = _init("online", order)
            _say(f"wandb: {run.url}")
            return run
        except Exception as error:
            if not order.goes_offline:
                raise
            _say(f"warning: wandb goes offline, {HOW_TO_UPLOAD}: {_one_line(error)}")
            wandb.teardown()  # its service may go on trying, and would say that the run is in use
            return _init("offline", order)
    run = _init("offline", order)
    _say(f"wandb: offline, in {Path(run.dir).parent}; {HOW_TO_UPLOAD}")
    return run


def _init(mode: str, order: Order) -> wandb.Run:
    # Neither console nor git nor code: what this process is given is all that wandb gets, besides figures of the machine.
    settings = wandb.Settings(silent=True, console="off", disable_git=True, save_code=False, init_timeout=INIT_SECONDS, finish_timeout=order.finish_seconds)
    known = dict(project=order.project, name=order.name, id=order.run_id, dir=order.output_dir, config=order.run_config)
    run = wandb.init(mode=mode, resume="allow", settings=settings, **known)
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def _follow(run: wandb.Run, metrics_file: Path, ended: threading.Event) -> int:
    """Log every record until training has ended, and return how many there are; those that the run has already are left out."""
    present, done, rest = run.step, 0, b""
    with metrics_file.open("rb") as file:
        is_last = False
        while not is_last:
            is_last = ended.wait(POLL_SECONDS)  # and once more, for what came in between
            records, rest = whole_records(rest + file.read())
            for record in records:
                if done >= present:
                    run.log(named(record), step=done)
                done += 1
    return done


def named(record: Record) -> dict[str, float | int | str]:
    """Return the numbers of a record under the names that wandb shows: <split>/<metric>, and step, the axis of all."""
    numbers = {name: value for name, value in record.items() if name not in ("split", "step") and not isinstance(value, list)}
    return {"step": record["step"], **{f"{record['split']}/{name}": value for name, value in numbers.items()}}


def _say(line: str) -> None:
    try:
        print(line, flush=True)
    except OSError:  # training has ended in the meantime
        sys.stdout = open(os.devnull, "w")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    os._exit(exit_code)  # wandb waits for its own processes in an exit handler, dead ones included
