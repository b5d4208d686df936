"""Checks of a model's files before a library reads them: a malformed or hostile file is refused by name."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from pipeline.errors import CheckpointError

TAKE_ITS_OWN = "take the file that was written with the model"
# The files of a model folder that are a JSON object each.
JSON_FILES = (
    "config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
    "vocab.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
# Names of settings that count parts of a model, not such as `vision_feature_layer: -2`; and more than any model has.
COUNTS = re.compile(r"(layers|\bn_layer|blocks|heads|groups|experts|labels)$")
MOST_PARTS = 100_000
# A model has more weights than its file where weights are shared, or left out, such as a decoder's.
SLACK = 2  # for each byte
FEW_WEIGHTS, FEW_VALUES = 10**6, 10**8  # beside that; values are those of computed tables, such as of positions


def malformed(folder: Path) -> str:
    """What is wrong with the first malformed file of a model folder; empty where none is."""
    for path in (folder / name for name in JSON_FILES):
        try:
            json_object(path)
        except ValueError as error:
            return str(error)
        except OSError:
            continue
    return ""


def read_configuration(source: str, tensors: int | None = None) -> dict[str, Any]:
    """The `config.json` of a model folder or hub id, checked before a library makes an object of it.

    Raises:
        CheckpointError: it is no JSON object, or see `check_configuration`, which takes `tensors`.
    """
    from transformers.utils.hub import cached_file

    path = Path(str(cached_file(source, "config.json")))
    try:
        config = json_object(path)
    except ValueError as error:
        raise CheckpointError(f"ckpt: {error}; {TAKE_ITS_OWN}") from error
    check_configuration(config, f"ckpt: '{path}'", tensors)
    return config


def check_configuration(config: Any, where: str, tensors: int | None) -> None:
    """Checks the numbers of layers and the like in a configuration, and what code it names, before it is used.

    To read a configuration with too many layers, or to build its model, takes all time and memory: there is a list with
    an entry for each part. Each layer has a tensor of its own, unless layers share weights, and such models have few.

    Args:
        config: the configuration, or a value in it.
        where: begins the message.
        tensors: how many tensors the weights are; None where that is not known.

    Raises:
        CheckpointError: it counts more layers than there are tensors, or more of something than any model has, or names
            an implementation, such as of attention, that is code on a hub, which is never loaded.
    """
    for key, value in config.items() if isinstance(config, Mapping) else ():
        if str(key).endswith("_implementation"):
            _check_implementation(value, f"{where}: {key}")
        counted = COUNTS.search(str(key))
        if counted and isinstance(value, (int, float)):
            stacked = "layer" in counted[1] or counted[1] == "blocks"
            most = max(tensors, 100) if stacked and tensors is not None else MOST_PARTS
            if not 0 <= value <= most:
                beside = f", and weights of {tensors} tensors" if most != MOST_PARTS else ""
                raise CheckpointError(f"{where}: {key}: expected 0 to {most}, found {value}{beside}; {TAKE_ITS_OWN}")
        check_configuration(value, where, tensors)


def _check_implementation(value: Any, where: str) -> None:
    for name in value.values() if isinstance(value, Mapping) else [value]:
        if name is not None and not re.fullmatch(r"\w+", str(name)):
            expected = "expected an implementation of transformers' own"
            raise CheckpointError(f"{where}: {expected}, found '{name}'; write eager or sdpa there")


def check_size(build: Callable[[], object], held: int | None, where: str) -> None:
    """Raises CheckpointError where a configuration describes a model that its weights cannot be of.

    The model is built without memory for its weights, and not further than to twice as many as the file has bytes. How
    far names and shapes agree is found out when they are loaded.

    Args:
        build: makes the model.
        held: bytes of the weights; None where they are not known: nothing is checked.
        where: names the checkpoint in the message.
    """
    if held is None:
        return
    hooks = [
        register_module_parameter_registration_hook(_Count(SLACK * held + FEW_WEIGHTS, held, where)),
        register_module_buffer_registration_hook(_Count(SLACK * held + FEW_VALUES, held, where)),
    ]
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            build()
    except CheckpointError:
        raise
    except Exception:  # noqa: S110
        pass  # building the real model raises it; some models cannot be built without memory
    finally:
        for hook in hooks:
            hook.remove()


class _Count:
    """Adds up the values of tensors as they are put into modules. Raises CheckpointError beyond `most`."""

    def __init__(self, most: int, held: int, where: str) -> None:
        self.most, self.held, self.where = most, held, where
        self.found = 0

    def __call__(self, _module: nn.Module, name: str, value: torch.Tensor | None) -> None:
        self.found += value.numel() if value is not None else 0
        if value is not None and self.found > self.most:
            described = f"the configuration describes a model of more than {self.most:,} values"
            last = f"the last is '{name}' of shape {tuple(value.shape)}"
            remedy = "take the configuration that was written with the model"
            raise CheckpointError(
                f"ckpt: '{self.where}': {described} ({last}), but the weights have {self.held:,} bytes; {remedy}"
            )


def count_tensors(files: Sequence[Path]) -> int | None:
    """How many tensors are in files of weights; None where that cannot be seen without reading them."""
    found = 0
    for path in files:
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    found += len(file.keys())
            else:
                with zipfile.ZipFile(path) as archive:
                    found += sum("/data/" in name for name in archive.namelist())
        except (OSError, SafetensorError, zipfile.BadZipFile):
            return None
    return found or None


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError if there is none in it."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}': expected a JSON object, found no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"'{path}': expected a JSON object, found {json.dumps(found)[:60]}")
    return found
