"""What the worker of a training is told, and what it tells: the files around a snapshot's weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from pipeline.config.schema import Config
from pipeline.config.yaml_file import to_mapping, to_yaml
from pipeline.training.snapshots import synced, unwritable, write_json

SCORED = """
dataset precision layer pooling max_batch_tokens embedding_dtype architecture model_factory weights
""".split()  # the keys that a score depends on


def instruct(folder: Path, config: Config) -> None:
    """Writes what the worker needs to know of a training.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # what is in it is unpickled
        synced(folder / "config.yaml", lambda path: path.write_text(to_yaml(config), encoding="utf-8"))
        write_json(folder / "worker.json", _settings())
    except OSError as error:
        raise unwritable(folder, error) from error


def manifest_of(config: Config, training: str, step: int) -> dict[str, Any]:
    """What a snapshot is of: two with the same are one."""
    mapping = to_mapping(config)
    scored = json.dumps({key: mapping[key] for key in SCORED}, sort_keys=True, default=str)
    digest = hashlib.sha256(scored.encode()).hexdigest()[:32]
    tasks = [task.task_name for task in config.dataset]
    return {"step": step, "training": training, "tasks": tasks, "config": digest}


def read_result(folder: Path) -> dict[str, Any]:
    """What the worker says of a measurement. Raises OSError, ValueError."""
    found: dict[str, Any] = read_json(folder / "result.json")
    return found


def read_json(path: Path) -> Any:
    """The content of a file of JSON. Raises OSError, ValueError."""
    return json.loads(path.read_text(encoding="utf-8"))


def _settings() -> dict[str, Any]:
    """What scores depend on, to the last bit, and the configuration does not say."""
    precision = torch.get_float32_matmul_precision()
    return {"folder": str(Path.cwd()), "threads": torch.get_num_threads(), "matmul_precision": precision}
