"""The configuration that a call in Python means: a file, its content, DataFrames, and keywords for single keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.schema import Config
from pipeline.config.shipped import CONFIG, shipped_path
from pipeline.config.task import Task
from pipeline.config.yaml_file import RENAMED, config_from, read_config, to_mapping
from pipeline.data.kinds import doubt, kind_of
from pipeline.errors import ConfigError, DataError, nearest
from pipeline.load import load

if TYPE_CHECKING:
    import pandas as pd

PARTS = {"train", "test", "val"}
STEPS = 1_280  # of an optimizer, after which the heads of the sample's tasks have learnt
MANY = 4_096  # sequences


def frames_of(config: Any) -> dict[str, pd.DataFrame]:
    """The DataFrames, where the configuration is such."""
    if not isinstance(config, Mapping) or not config:
        return {}
    frames = {str(part): value for part, value in config.items() if hasattr(value, "columns")}
    if frames and (len(frames) < len(config) or not {"train", "test"} <= set(frames) <= PARTS):
        expected = "expected DataFrames of train, test and, for early stopping, val"
        raise ConfigError(f"config: {expected}; found {', '.join(map(str, config))}")
    return frames


def config_of(config: Any, overrides: str, settings: Mapping[str, Any]) -> Config:
    """The configuration of a file, its content or a `Config`, with the settings in it."""
    if isinstance(config, Config):
        if overrides:
            raise ConfigError("overrides: a Config takes none; give keywords, or change it")
        found = config
    else:
        source = shipped_path(CONFIG) if config is None else config
        found = read_config(source if isinstance(source, Mapping) else Path(source), overrides)
    if settings:
        section, of_tasks = _sorted(settings)
        plain = {**to_mapping(found), **section}
        tasks = plain["dataset"] if found.is_list else [plain["dataset"]]
        changed = [{**task, **of_tasks} for task in tasks]
        found, notes = config_from({**plain, "dataset": changed if found.is_list else changed[0]}), found.notes
        found.notes[:0] = notes
    found.check()
    return found


def config_of_frames(frames: Mapping[str, pd.DataFrame], settings: Mapping[str, Any], notes: list[str]) -> Config:
    """The configuration of a task on DataFrames; `notes` gets what was inferred.

    Raises:
        ConfigError: see `Config.check`.
        DataError: it is not clear what the labels are; with whatever else is wrong with the frames.
    """
    section, task = _sorted(settings)
    frame, sequence = frames["train"].rename(columns=str), task.get("sequence_column", "sequence")
    others = [column for column in frame.columns if column != sequence]
    if "target_column" not in task and len(others) == 1:
        task["target_column"] = others[0]
    targets = task.get("target_column", [])
    target = str(targets if isinstance(targets, str) else next(iter(targets), ""))
    unclear: dict[str, list[DataError]] = {}
    if not {"class", "task_type"} <= set(task):
        if [list(frame.columns).count(column) for column in (sequence, target)] == [1, 1]:
            unclear = _infer(frame, sequence, target, task, notes)
        else:  # an error to come names the columns
            unclear = {part: [] for part in frames}
    task.setdefault("task_name", target or "downstream")
    chosen = {key: value for key, value in _training_of(len(frame), task).items() if key not in task}
    if chosen:
        notes.append(f"for {len(frame)} sequences: {', '.join(f'{key}={value!r}' for key, value in chosen.items())}")
    config = config_from({**section, "dataset": {**task, **chosen}})
    config.check(with_files=False)
    if unclear:
        load(config.dataset[0], frames=frames, unclear=unclear)
    return config


def _infer(
    frame: pd.DataFrame, sequence: str, target: str, task: dict[str, Any], notes: list[str]
) -> dict[str, list[DataError]]:
    """Adds level and kind of the labels to `task`. Gives what is not clear about those of train, see `load`."""
    judged = frame.reset_index(drop=True)
    judged = judged[(judged[sequence].notna() & (judged[sequence] != "")).to_numpy(dtype=bool)]
    level, kind, why = kind_of(judged, sequence, target)
    unclear = doubt(judged, sequence, target, "frames['train']", task) if why == "texts" else None
    if unclear is not None:
        level, kind, error = unclear
    for key, value in {"class": level, "task_type": kind}.items():
        if key not in task:
            task[key] = value
            notes.append(f"{key} is read as {value}: '{target}' holds {why}")
    return {} if unclear is None else {"train": [error]}


def _training_of(rows: int, task: Mapping[str, Any]) -> dict[str, Any]:
    """How a head is trained on so many sequences: `STEPS` steps or more, where that takes no more than 100 epochs.

    The reference's defaults, which files keep, leave a head on few sequences at a constant guess.
    """
    batch_size = task.get("batch_size", 32 if rows < MANY else 128)
    epochs = -(-STEPS // -(-rows // batch_size)) if rows and isinstance(batch_size, int) and batch_size > 0 else 10
    optim = {"name": "adam", "lr": 0.001}
    return {"batch_size": batch_size, "num_epochs": min(max(epochs, 10), 100), "optim": optim}


def _sorted(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of the section, and of tasks. Raises ConfigError for one that is neither."""
    section = {field.name for field in dataclasses.fields(Config) if not field.metadata.get("hidden")} - {"dataset"}
    task = {field.metadata.get("key", field.name) for field in dataclasses.fields(Task)} | set(RENAMED)
    task -= {"dataset", "dataset_path", "head"}
    found: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    for name, value in settings.items():
        key = RENAMED.get(name, name)
        key = "class" if key == "level" else key  # a word of Python
        if key not in section | task:
            raise ConfigError(f"measure: unknown setting '{name}'{nearest(name, section | task)}")
        values = found[key in task]
        if values.setdefault(key, value) != value:
            raise ConfigError(f"measure: '{name}' and '{key}' are one key with different values; keep one")
    return found
