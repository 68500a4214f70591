"""What lies in the .wandb file of an offline run: records in a log as LevelDB writes it (blocks of 32 KiB, records cut at their ends)."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

BLOCK = 32 * 1024
FILE_HEADER, HEADER = 7, struct.Struct("<IHB")  # of a piece: checksum, length, kind
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records_of(path: Path) -> Iterator[bytes]:
    content, at, whole = path.read_bytes(), FILE_HEADER, b""
    while at + HEADER.size <= len(content):
        if BLOCK - at % BLOCK < HEADER.size:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = HEADER.unpack_from(content, at)
        whole += content[at + HEADER.size : at + HEADER.size + length]
        at += HEADER.size + length
        if kind in (FULL, LAST):
            yield whole
            whole = b""
        else:
            assert kind in (FIRST, MIDDLE), kind


def entries_of(path: Path, kind: str) -> list:
    """Return what the run has noted of one kind, such as history, metric, alert or artifact, as protobuf messages."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for content in records_of(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == kind:
            found.append({"history": record.history, "metric": record.metric, "alert": record.alert, "artifact": record.artifact, "exit": record.exit}[kind])
    return found


def history_of(path: Path) -> list[dict]:
    """Return the rows of the run's history, without the names that wandb adds."""
    rows = [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in entry.item} for entry in entries_of(path, "history")]
    return [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows]
