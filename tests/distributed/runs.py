"""What the distributed tests share: a numeric model and tokenizer, configs, launches."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from ruamel.yaml import YAML
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent.parent
GOLDEN = ROOT / "tests" / "golden"
# Small enough that ZeRO-3 partitions, gathers and prefetches the parameters of a tiny model too.
TINY_ZERO3 = {
    "stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 20_000, "stage3_max_live_parameters": 100_000, "stage3_prefetch_bucket_size": 20_000,
}  # fmt: skip
LAUNCH_SECONDS = 540


def word(token_id: int) -> str:
    """The word that number_tokenizer turns into this id; 2 is the end of a sequence."""
    return "<eos>" if token_id == 2 else f"t{token_id}"


def number_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer in which text is a list of token ids, so that tests can say exactly which ids a row has."""
    tokenizer = Tokenizer(models.WordLevel({word(token_id): token_id for token_id in range(vocab_size)}, unk_token=word(0)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=word(2), pad_token=word(0))
    fast.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return fast


def conversation(prompt_ids: list[int], completion_ids: list[int], label: bool) -> dict:
    """A row whose tokens are exactly these: chat templates add nothing here, and only plain text gets an end of sequence."""
    content = [" ".join(map(word, ids)) for ids in (prompt_ids, completion_ids)]
    return {"prompt": [{"role": "user", "content": content[0]}], "completion": [{"role": "assistant", "content": content[1]}], "label": label}


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_config(path: Path, **sections) -> Path:
    YAML(typ="safe").dump({name: value if isinstance(value, (str, int)) else dict(value) for name, value in sections.items()}, path)
    return path


def write_zero(folder: Path, stage: int) -> str:
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps({"zero_optimization": TINY_ZERO3 if stage == 3 else {"stage": stage}}))
    return str(path)


def environment() -> dict[str, str]:
    """The environment of a new process: without the process group that a test in this one may have joined."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    return {**own, "PATH": programs, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def launcher(num_ranks: int) -> list[str]:
    """The command that starts `num_ranks` local ranks; what follows it is a script, or --module and a module."""
    return [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(num_ranks), "--master_port", free_port()]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(command: list[str], **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, env={**environment(), **variables}, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LAUNCH_SECONDS)


def read_metrics(run: Path, split: str = "train") -> list[dict]:
    return [record for line in (run / "metrics.jsonl").read_text().splitlines() if (record := json.loads(line))["split"] == split]
