"""The files beside the weights: their step, their sizes, and what is said where one of them is malformed."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from pipeline.errors import CheckpointError, PipelineError

# Those that are read with a model folder, each a JSON object.
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
MOST_STEPS = 2**63 - 1  # of the trackers
# Names of settings that count parts of a model, not such as `vision_feature_layer: -2`; and more than any model has.
COUNTS = re.compile(r"(layers|\bn_layer|blocks|heads|groups|experts|labels)$")
MOST_PARTS = 100_000
# A model has more weights than its file where some are shared, or left out, such as a decoder's.
SLACK = 2  # for each byte
FEW_WEIGHTS, FEW_VALUES = 10**6, 10**8  # beside that; values are tables that are worked out, such as of positions


def trainer_step(folder: Path) -> int | None:
    """The step in `trainer_state.json`, which Hugging Face's trainer writes last; None where there is no such file.

    Raises:
        CheckpointError: it holds no step: whoever wrote it was interrupted, and the weights may be of any step.
    """
    path = folder / "trainer_state.json"
    if not path.is_file():
        return None
    remedy = "take another checkpoint, or delete the file: then the step is that in the folder's name"
    try:
        return checked_step(_object(path).get("global_step"), f"'{path}': global_step")
    except ValueError as error:
        raise CheckpointError(f"ckpt: {error}; {remedy}") from error


def checked_step(step: Any, where: str) -> int:
    """The step that a checkpoint says. Raises ValueError if it is none."""
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= MOST_STEPS:
        raise ValueError(f"{where}: expected a whole number from 0 on, found {step!r:.60}")
    return step


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Has a panic in a library written in Rust, no `Exception` for Python, end like any other error of a library."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(str(error)) from error


@contextmanager
def at_fault(what: str, folder: Path) -> Iterator[None]:
    """Turns whatever a library raises into a CheckpointError of `what`; the malformed file in `folder` is named."""
    try:
        with panics_as_errors():
            yield
    except PipelineError:
        raise
    except Exception as error:
        found = malformed(folder) or f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{what} cannot be loaded: {found}") from error


def malformed(folder: Path) -> str:
    """What is wrong with the first malformed file of a model folder; empty where none is."""
    for path in (folder / name for name in JSON_FILES):
        try:
            _object(path)
        except ValueError as error:
            return str(error)
        except OSError:
            continue
    return ""


def check_folder(folder: Path) -> int | None:
    """Looks at the configuration in a model folder before a library does; see `check_counts`.

    Returns:
        The bytes of its weights; None where there are none, or it is no folder but a hub id.

    Raises:
        CheckpointError: the configuration is no JSON object, or counts more parts than there can be.
    """
    held = [path for kind in ("safetensors", "bin") for path in folder.glob(f"*.{kind}")]
    check_config(folder, _tensors(held))
    return sum(path.stat().st_size for path in held) if held else None


def check_config(folder: Path, tensors: int | None) -> None:
    """As `check_folder`, for weights that lie elsewhere: so many tensors."""
    path = folder / "config.json"
    if path.is_file():
        try:
            check_counts(_object(path), f"ckpt: '{path}'", tensors)
        except ValueError as error:
            raise CheckpointError(f"ckpt: {error}; take the file that was written with the model") from error


def check_counts(config: Any, where: str, tensors: int | None) -> None:
    """Holds the numbers of layers and the like in a configuration against the weights, before it is used.

    To read such a configuration, or to build its model, takes all time and memory: there is a list with an entry for
    each part. Each layer has a tensor of its own (but where layers share them, and those are few).

    Raises:
        CheckpointError: it counts more layers than there are tensors, or more of something than any model has.
    """
    for key, value in config.items() if isinstance(config, Mapping) else ():
        if str(key).endswith("_implementation"):
            check_implementation(value, f"{where}: {key}")
        counted = COUNTS.search(str(key))
        if counted and isinstance(value, (int, float)):
            stacked = "layer" in counted[1] or counted[1] == "blocks"
            most = max(tensors, 100) if stacked and tensors is not None else MOST_PARTS
            if not 0 <= value <= most:
                beside = f", and weights of {tensors} tensors" if most != MOST_PARTS else ""
                remedy = "take the file that was written with the model"
                raise CheckpointError(f"{where}: {key}: expected 0 to {most}, found {value}{beside}; {remedy}")
        check_counts(value, where, tensors)


def check_implementation(value: Any, where: str) -> None:
    """Raises CheckpointError where an implementation, of attention say, is code on a hub: no file has that loaded."""
    for one in value.values() if isinstance(value, Mapping) else [value]:
        if one is not None and not re.fullmatch(r"\w+", str(one)):
            remedy = "write eager or sdpa there"
            raise CheckpointError(f"{where}: expected an implementation of transformers' own, found '{one}'; {remedy}")


def check_size(build: Callable[[], object], held: int | None, where: str) -> None:
    """Raises CheckpointError where a configuration describes a model that its weights cannot be of.

    The model is built without memory for its weights, and not further than to twice as many as the file has bytes. How
    far names and shapes agree is found out when they are loaded.

    Args:
        build: makes the model.
        held: bytes of the weights; None where they are not known: nothing is checked.
        where: what to name in the message.
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
        pass  # the real one says it; some models cannot be built without memory
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
                f"ckpt: {self.where}: {described} ({last}), but the weights have {self.held:,} bytes; {remedy}"
            )


def _tensors(files: Sequence[Path]) -> int | None:
    """How many tensors lie in files of weights; None where that is not seen at once."""
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


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError if there is none in it."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}': expected a JSON object, found no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"'{path}': expected a JSON object, found {json.dumps(found)[:60]}")
    return found
