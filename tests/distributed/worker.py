"""Runs several kto-ds commands in one process group, because starting one costs seconds: `worker.py COMMANDS.json RESULTS.json`.

The picture at the end of a run is left out, as it takes longer than a tiny run itself; test_train.py starts runs that draw it.
COMMANDS is a list of command lines; RESULTS gets, for each, the exit code, how often DeepSpeed threw its ZeRO-3 parameter trace away, its all-gathers and
the elements they brought together.
"""

import json
import os
import sys
from pathlib import Path

from deepspeed.comm.torch import TorchBackend
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

from kto_ds import cli
from kto_ds.stages import train


def main(commands_file: str, results_file: str) -> None:
    counts = dict.fromkeys(("invalidations", "gathers", "gathered_numel"), 0)
    invalidate, gather = Coordinator._invalidate_trace, TorchBackend.all_gather_into_tensor

    def counted_invalidate(self):
        counts["invalidations"] += 1
        return invalidate(self)

    def counted_gather(self, output_tensor, *arguments, **named):
        counts["gathers"] += 1
        counts["gathered_numel"] += output_tensor.numel()
        return gather(self, output_tensor, *arguments, **named)

    Coordinator._invalidate_trace, TorchBackend.all_gather_into_tensor = counted_invalidate, counted_gather
    train.plot_metrics = lambda *paths: None
    results = []
    for command in json.loads(Path(commands_file).read_text()):
        counts.update(dict.fromkeys(counts, 0))
        results.append({"exit_code": cli.run(command), **counts})
    if os.environ["RANK"] == "0":
        Path(results_file).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
