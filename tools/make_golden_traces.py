"""Copy the numbers of recorded TRL runs into tests/golden: `python tools/make_golden_traces.py FOLDER`.

FOLDER holds one JSON file a case (options, steps, examples as token ids, final parameter norms) and the model the runs started from. Only
numbers are kept: token ids, labels, log-probs, logged metrics and weights.
"""

import json
import shutil
import sys
from pathlib import Path

CASES = ("kto", "kto_weighted", "apo_zero_unpaired")
TARGET = Path(__file__).parent.parent / "tests" / "golden"


def main(source: Path) -> None:
    recorded = {case: json.loads((source / f"{case}.json").read_text()) for case in CASES}
    first = recorded[CASES[0]]
    assert all([row["prompt_ids"] for row in run["examples"]] == [row["prompt_ids"] for row in first["examples"]] for run in recorded.values())
    traces = {
        "trl": "1.16.0",
        "batch": first["batch"],
        "max_length": first["max_length"],
        "learning_rate": first["learning_rate"],
        "examples": first["examples"],
        "cases": {case: {key: run[key] for key in ("options", "steps", "final_parameter_norms")} for case, run in recorded.items()},
    }
    (TARGET / "trl_traces.json").write_text(json.dumps(traces, separators=(",", ":")))
    (TARGET / "model").mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(source / "model" / name, TARGET / "model" / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
