"""Runs several kto-ds commands in one process group, because starting one costs seconds: `worker.py COMMANDS.json RESULTS.json`.

The picture at the end of a run is left out, as it takes longer than a tiny run itself; test_train.py starts runs that draw it.
COMMANDS is a list of command lines; RESULTS gets, for each, the exit code and how often DeepSpeed threw its ZeRO-3 parameter trace away.
"""

import json
import os
import sys
from pathlib import Path

from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

from kto_ds import cli
from kto_ds.stages import train


def main(commands_file: str, results_file: str) -> None:
    invalidations = 0
    invalidate = Coordinator._invalidate_trace

    def counted(self):
        nonlocal invalidations
        invalidations += 1
        return invalidate(self)

    Coordinator._invalidate_trace = counted
    train.plot_metrics = lambda *paths: None
    results = []
    for command in json.loads(Path(commands_file).read_text()):
        invalidations = 0
        results.append({"exit_code": cli.run(command), "invalidations": invalidations})
    if os.environ["RANK"] == "0":
        Path(results_file).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
