"""Reads back what W&B and TensorBoard wrote to disk."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

BLOCK = 32_768
HEADER = 7  # of the file, and of each chunk: checksum (4), length (2), type (1)
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def in_tensorboard(folder: Path, tag: str) -> list[tuple[int, float]]:
    """Step and value of each point of a curve."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def pictures_in_tensorboard(folder: Path, tag: str) -> list[tuple[int, bytes]]:
    """Step and PNG file of each picture."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.encoded_image_string) for event in events.Images(tag)]


def in_wandb(file: Path, name: str, step: str = "trainer/global_step") -> list[tuple[int, Any]]:
    """The same in a run that W&B kept offline, over the metric `step`; `NAME/path` is a picture's file."""
    found = []
    for record in _wandb_records(file):
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if name in row:
            found.append((row[step], row[name]))
    return found


def assert_in_wandb(file: Path, name: str, expected: list[tuple[int, Any]], step: str = "trainer/global_step") -> None:
    """`in_wandb` gives this, once W&B's own process has written it all: on a busy machine that takes a while."""
    for _ in range(300):
        with suppress(Exception):  # a record that is written by half
            if in_wandb(file, name, step) == expected:
                return
        time.sleep(0.1)
    assert in_wandb(file, name, step) == expected


def run_in_wandb(file: Path) -> tuple[Any, list[int]]:
    """What describes such a run, and the exit codes that it ended with: one, or none while it is open."""
    records = list(_wandb_records(file))
    (run,) = (record.run for record in records if record.HasField("run"))
    return run, [record.exit.exit_code for record in records if record.HasField("exit")]


def _wandb_records(file: Path) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

    for data in _records(file.read_bytes()):
        record: Any = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(data)
        yield record


def _records(content: bytes) -> Iterator[bytes]:
    """The records of a `.wandb` file, a log in LevelDB's format (wandb 0.31 ships no reader in Python)."""
    assert content[:4] == b":W&B"
    place, pending = HEADER, b""
    while place + HEADER <= len(content):
        if BLOCK - place % BLOCK < HEADER:  # no chunk begins in the last bytes of a block
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        pending = (b"" if kind in (FULL, FIRST) else pending) + content[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (FULL, LAST):
            yield pending
