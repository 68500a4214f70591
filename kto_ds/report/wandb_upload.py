"""A process of its own that copies a run's record to wandb: `python -m kto_ds.report.wandb_upload`, an order as JSON on its stdin.

Training never waits for wandb and cannot fail by it, as it only starts this and tells it the end: stdin is closed, after a word if the end was a good one. The
record of a run is its metrics.jsonl; line n of it is step n of the wandb run, so that what is there already is left out when a run goes on, or is uploaded
afterwards. Every line printed is for the user.
"""

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import wandb

from kto_ds.artifacts import write_atomically
from kto_ds.report import wandb_lineage
from kto_ds.report.metrics_file import METRICS_FILE
from kto_ds.report.wandb_alerts import has_failed
from kto_ds.report.wandb_follow import alert, follow, how_it_ended
from kto_ds.report.wandb_lineage import Piece

INIT_SECONDS = 20  # wandb itself adds up to 10 before it gives up
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
    sources: dict[str, str]  # folders of the artefacts that the run is made from, by kind
    watch_from: int | None  # the step from which on trouble is worth an alert; None: of nothing that is over
    stall_seconds: float  # without progress of a rank, after which there is an alert
    export: str  # folder of an export to note, and of nothing else; empty: the record is followed


def main() -> int:
    order = Order(**json.loads(sys.stdin.buffer.readline()))
    ended, last_words = threading.Event(), []
    threading.Thread(target=_await_the_end, args=(ended, last_words, order.finish_seconds), daemon=True).start()
    try:
        folder = Path(order.output_dir) / "wandb"
        folder.mkdir(exist_ok=True)
        write_atomically(folder / "run_id", order.run_id)
        run = _open(order)
    except Exception as error:
        _say(f"warning: wandb is off; metrics.jsonl goes on: {_one_line(error)}" if order.goes_offline else _one_line(error))
        return 1
    try:
        if order.export:
            wandb_lineage.log(run, wandb_lineage.export_piece(Path(order.export)))
            run.finish()
            return 0
        folder = Path(order.output_dir)
        for kind, source in order.sources.items():
            _note(wandb_lineage.use, run, wandb_lineage.sealed_piece(kind, Path(source)))
        num_records = follow(run, folder, ended, watch_from=order.watch_from, stall_seconds=order.stall_seconds)
        for piece in (wandb_lineage.newest_checkpoint(folder / "checkpoints"), wandb_lineage.export_piece(folder / "export")):
            _note(wandb_lineage.log, run, piece)
        if order.watch_from is None:
            ended_well = not has_failed(folder / "status.json")
        else:
            ended_well = bool(last_words)
            alert(run, None if ended_well else how_it_ended(folder / "status.json"))
        run.finish(exit_code=0 if ended_well else 1)
    except Exception as error:
        _say(f"warning: wandb is off from here on; metrics.jsonl goes on, {HOW_TO_UPLOAD}: {_one_line(error)}" if order.goes_offline else _one_line(error))
        return 1
    if not order.goes_offline:
        _say(f"wandb: all {num_records} records of {METRICS_FILE} are in run {order.run_id}")
    return 0


def _await_the_end(ended: threading.Event, last_words: list[bytes], finish_seconds: float) -> None:
    """Wait until training closes the pipe, or is gone; from then on there is only so much time, whatever wandb waits for."""
    if words := sys.stdin.buffer.read():
        last_words.append(words)
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
    return wandb.init(mode=mode, resume="allow", settings=settings, **known)


def _note(action: Callable[[wandb.Run, Piece], None], run: wandb.Run, piece: Piece | None) -> None:
    """Note what a run is made from, or what came of it, where there is such a thing; the metrics go on without it."""
    try:
        if piece is not None:
            action(run, piece)
    except Exception as error:
        _say(f"notice: wandb does not know the {piece.kind} of this run: {_one_line(error)}")


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
