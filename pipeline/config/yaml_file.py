"""Makes a `Config` of a YAML file and overrides: finds the section, translates the reference's keys, checks types.

Only the section is resolved. Its interpolations may point anywhere in the file; resolvers elsewhere are never run.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.config.background import Background
from pipeline.config.class_paths import import_class
from pipeline.config.engine import Ray
from pipeline.config.line_numbers import SECTION, Lines
from pipeline.config.schema import Config
from pipeline.config.shipped import anchor
from pipeline.config.task import LEVELS, Files, MaxRows, Task
from pipeline.config.trackers import Logging
from pipeline.errors import ConfigError, nearest

RENAMED = {"sequence_col": "sequence_column", "mask_col": "mask_column", "class": "level"}
RENAMED |= {"labels_col": "target_column", "labels_size": "target_sizes"}
UNUSED = {"num_workers", "loss_func", "drop_last", "pin_memory", "persistent_workers", "micro_batch_size"}
ELEMENTS: dict[str, tuple[type, ...]] = {
    "target_column": (str,),
    "target_sizes": (int,),
    "mask_column": (str, type(None)),
    "tags": (str,),
}
NESTED: dict[str, type] = {"logging": Logging, "background": Background, "ray": Ray}
CLASSES = {
    "SingleValuePredictionCallback": "sequence",
    "PerTokenPredictionCallback": "token",
}
ENCODERS = {"ESM1nvInference": "esm", "ESM2nvInference": "esm", "ProtT5nvInference": "prott5"}
ENCODERS["MegaMolBARTInference"] = "megamolbart"


def read_config(source: str | Path | Mapping[Any, Any], overrides: str = "") -> Config:
    """The checked configuration in a YAML file, or in a mapping that Hydra or OmegaConf made of such a file.

    Args:
        source: a YAML file with the section `model.dwnstr_task_validation`, or its content: a `DictConfig` or a plain
            mapping.
        overrides: dot-list such as `dataset.num_epochs=3 device=cpu`, quoted as in a shell. Keys are relative to the
            section, or full. Where `dataset` is a list, `dataset.KEY` sets it in every task, `dataset.0.KEY` in one.

    Raises:
        ConfigError: the file or an override cannot be read, a key is not known, or a value has the wrong type.
    """
    path = "cfg" if isinstance(source, Mapping) else str(source)
    root, texts = _read(source, path)
    section = _section(root, path)
    OmegaConf.set_readonly(section, False)
    OmegaConf.set_struct(section, False)
    anchor(section, source)
    overridden = _apply(section, overrides)
    try:
        plain = OmegaConf.to_container(section, resolve=True)
    except OmegaConfBaseException as error:
        remedy = "register the resolver, set the key in the file, or override the value"
        raise ConfigError(f"{path}: {SECTION} cannot be resolved: {error}; {remedy}") from error
    assert isinstance(plain, dict)
    config = config_from(plain, Lines(path, texts, overridden))
    if "exp_manager" in root:
        config.notes.append("exp_manager is not read")
    config.check()
    return config


def config_from(section: dict[Any, Any], lines: Lines | None = None) -> Config:
    """The typed configuration of a plain mapping: the content of the section, already resolved.

    Raises:
        ConfigError: a key is not known, or a value has the wrong type.
    """
    lines = lines or Lines(SECTION)
    raw = dict(section)
    _refuse_missing(raw, ())
    tasks = raw.pop("dataset", None)
    if not isinstance(tasks, (dict, list)):
        raise ConfigError(
            f"{lines.at(('dataset',))}: {SECTION}.dataset: expected a task or a list of tasks, found {tasks!r}"
        )
    _check_keys(raw, Config, (), lines)
    for name, schema in NESTED.items():
        if isinstance(raw.get(name), dict):
            _check_keys(raw[name], schema, (name,), lines)
            raw[name] = _typed(schema, _with_lists(raw[name], "tags"), (name,), lines)
    if isinstance(tasks, list):
        typed = [_task(entry, ("dataset", index), lines) for index, entry in enumerate(tasks)]
    else:
        typed = [_task(tasks, ("dataset",), lines)]
    merged = {**_typed(Config, raw, (), lines), "dataset": typed}
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), merged))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{lines.at()}: {error}") from error
    assert isinstance(config, Config)
    config.is_list = isinstance(tasks, list)
    config.notes = list(dict.fromkeys(lines.notes))
    return config


def _refuse_missing(node: Any, path: tuple[str, ...]) -> None:
    """Raises ConfigError for `???`, which in OmegaConf stands for a missing value."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        _refuse_missing(value, (*path, str(key)))
    if node == "???":
        raise ConfigError(
            f"{SECTION}.{'.'.join(path)}: expected a value, found '???'; give one in the file or an override"
        )


def to_mapping(config: Config) -> dict[str, Any]:
    """The section with all keys, as plain values."""
    own = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if not f.metadata.get("hidden")}
    tasks = []
    for values in map(dataclasses.asdict, config.dataset):
        level, head = values.pop("level"), values.pop("head")
        tasks.append({"class": head or level, **values})
    own |= {name: dataclasses.asdict(getattr(config, name)) for name in NESTED}
    return {**own, "dataset": tasks if config.is_list else tasks[0]}


def to_yaml(config: Config) -> str:
    """The resolved configuration as a file that `read_config` reads back to the same."""
    root = OmegaConf.create()
    OmegaConf.update(root, SECTION, to_mapping(config))
    return str(OmegaConf.to_yaml(root))


def _read(source: str | Path | Mapping[Any, Any], path: str) -> tuple[Any, list[tuple[str, str, str]]]:
    """The root node, composed where a file inherits; and name, package and text of each file in it."""
    try:
        if isinstance(source, DictConfig):
            return copy.deepcopy(source), []
        if isinstance(source, Mapping):
            return OmegaConf.create(dict(source)), []
        text = Path(source).read_text(encoding="utf-8")
        root: Any = OmegaConf.create(text)  # its own YAML loader reads `1e-4` as a number and refuses a repeated key
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"config: expected a YAML file, found '{path}' ({reason})") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not OmegaConf.is_list(_child(root, "defaults")):
        return root, [(path, "", text)]
    try:
        from pipeline.config.hydra_file import compose
    except ImportError as error:
        raise ConfigError(
            f"{path}: expected hydra-core, which composes files with a defaults list, found: {error}; "
            "pip install 'hydra-core>=1.3,<1.4'"
        ) from error
    return compose(Path(source), root)


def _child(node: Any, key: str) -> Any:
    """The value of a key, without running a resolver: None where there is no value, or an interpolation."""
    if not isinstance(node, DictConfig) or key not in list(node) or OmegaConf.is_interpolation(node, key):
        return None
    return node.get(key)


def _section(root: Any, path: str) -> DictConfig:
    """The node of the section, with its interpolations not resolved; its neighbours are not touched."""
    node, near = root, list[str]()
    for key in SECTION.split("."):
        names = [str(name) for name in node] if isinstance(node, DictConfig) else []
        near = near or ([] if key in names else difflib.get_close_matches(key, names, n=1))
        node = _child(node, key)
    if not isinstance(node, DictConfig):
        remedy = f"rename '{near[0]}'" if near else "see configs/ for examples"
        raise ConfigError(f"{path}: expected a mapping {SECTION}, found none; {remedy}")
    return node


def _apply(section: DictConfig, overrides: str) -> list[tuple[str, ...]]:
    """Sets each `key=value` of the dot-list in the section. Returns the keys, each as its parts."""
    try:
        items = shlex.split(overrides)
    except ValueError as error:
        raise ConfigError(f"overrides: {error} in {overrides!r}; quote values as in a shell") from error
    overridden = []
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"overrides: expected key=value, found '{item}'")
        try:
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
            for target in _targets(section, key.removeprefix(SECTION + ".")):
                OmegaConf.update(section, target, value["value"], merge=True)  # type: ignore[call-overload,index]
                overridden.append(tuple(re.findall(r"[^.\[\]]+", target)))
        except (OmegaConfBaseException, yaml.YAMLError, ValueError, IndexError, AssertionError, TypeError) as error:
            raise ConfigError(f"overrides: '{item}' cannot be set: {error}") from error
    return overridden


def _targets(section: DictConfig, key: str) -> list[str]:
    """`dataset.KEY` stands for that key of every task where `dataset` is a list."""
    head, _, rest = key.partition(".")
    tasks = _child(section, "dataset")
    if head != "dataset" or not rest or not isinstance(tasks, ListConfig) or rest.split(".")[0].isdigit():
        return [key]
    return [f"dataset.{index}.{rest}" for index in range(len(tasks))]


def _task(entry: Any, path: tuple[Any, ...], lines: Lines) -> dict[str, Any]:
    """The names and values of `Task`, with their types, in an entry of `dataset`."""
    if not isinstance(entry, dict):
        raise ConfigError(f"{lines.at(path)}: expected a task (a mapping), found {entry!r}")
    _check_keys(entry, Task, path, lines)
    task = _renamed(entry, path, lines)
    task["level"] = _alias("class", task.get("level", "sequence"), CLASSES, lines)
    if "." in task["level"]:
        task["head"] = task["level"]
        task["level"] = str(getattr(import_class(task["head"], "class", LEVELS), "level", None))
    task["infer_target"] = _alias("infer_target", task.get("infer_target", "auto"), ENCODERS, lines)
    task_type = str(task.get("task_type", "regression"))
    if task_type.startswith("token-level-") and task["level"] == "sequence":
        raise ConfigError(f"{lines.at((*path, 'task_type'))}: task_type '{task_type}' needs class: token")
    task["task_type"] = task_type.removeprefix("token-level-")
    for key, schema in (("dataset", Files), ("max_rows", MaxRows)):
        if isinstance(task.get(key), dict):
            _check_keys(task[key], schema, (*path, key), lines)
    return _typed(Task, task, path, lines)


def _renamed(entry: dict[Any, Any], path: tuple[Any, ...], lines: Lines) -> dict[str, Any]:
    """The entry under the names of `Task`, without unused keys."""
    task: dict[str, Any] = {}
    for key, value in entry.items():
        name = str(RENAMED.get(key, key))
        if name in task and task[name] != value:
            raise ConfigError(
                f"{lines.at((*path, key))}: '{key}' and '{name}' are one key with different values; keep one"
            )
        if key not in UNUSED:
            task[name] = value
        if name not in (key, "level"):
            lines.notes.append(f"{key} is read as {name}")
    return _with_lists(task, "target_column", "target_sizes", "mask_column")


def _with_lists(values: dict[Any, Any], *names: str) -> dict[Any, Any]:
    """The values, where a text or number under these names becomes a list."""
    single = {name: [values[name]] for name in names if isinstance(values.get(name), (str, int))}
    return {**values, **single}


def _alias(key: str, value: Any, aliases: dict[str, str], lines: Lines) -> str:
    """The short name of a class of the reference, with or without its package; any other value as it is."""
    text = str(value)
    package, _, name = text.rpartition(".")
    short = aliases.get(name) if not package or package.startswith("bionemo.") else None
    if short:
        lines.notes.append(f"{key}: {text} is read as {short}")
    return short or text


def _check_keys(mapping: dict[Any, Any], schema: type, path: tuple[Any, ...], lines: Lines) -> None:
    known = [f.metadata.get("key", f.name) for f in dataclasses.fields(schema) if not f.metadata.get("hidden")]
    accepted = {*known, *(RENAMED if schema is Task else ()), *UNUSED}
    for key in mapping:
        if key not in accepted:
            raise ConfigError(f"{lines.at((*path, key))}: unknown key '{key}'{nearest(str(key), known)}")
        if key in UNUSED:
            lines.notes.append(f"{key} is accepted and not used")


def _typed(schema: type, values: dict[str, Any], path: tuple[Any, ...], lines: Lines) -> dict[str, Any]:
    """The values with the types of `schema`. Errors name the key, and its line or the override."""
    base = OmegaConf.structured(schema)
    for key, value in values.items():
        if key in UNUSED:
            continue
        try:
            base = OmegaConf.merge(base, {key: value})
        except (OmegaConfBaseException, TypeError, ValueError, AttributeError) as error:
            inner = str(getattr(error, "full_key", None) or key)  # such as `max_rows.train`
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{lines.at((*path, *inner.split('.')))}: {inner}: {reason}") from error
    container = OmegaConf.to_container(base)
    assert isinstance(container, dict)
    for key, kinds in ELEMENTS.items():
        for element in container.get(key) or []:
            if not isinstance(element, kinds):  # OmegaConf accepts a list within a list
                raise ConfigError(
                    f"{lines.at((*path, key))}: {key}: expected a list of {kinds[0].__name__}, found {element}"
                )
    return {str(key): value for key, value in container.items()}
