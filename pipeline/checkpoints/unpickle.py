"""Reads what `torch.save` wrote without running code that the file names.

Tensors and containers become what they were. An object of any other class becomes a stand-in, which knows the name of
its class and does nothing, so that weights can be read beside hyper-parameters and states of anybody's own classes.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import torch

from pipeline.errors import CheckpointError

# What the file may name, by module: constructors of tensors and of plain containers.
ALLOWED = {
    "builtins": {"bool", "bytearray", "complex", "dict", "float", "frozenset", "int", "list", "set", "str", "tuple"},
    "collections": {"OrderedDict", "defaultdict"},
    "torch": {"Size", "device", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch._utils": {
        "_rebuild_parameter",
        "_rebuild_parameter_with_state",
        "_rebuild_tensor",
        "_rebuild_tensor_v2",
    },
    "torch.serialization": {"_get_layout"},
    "torch.storage": {"TypedStorage", "UntypedStorage"},
}


class StandIn:
    """An object of a class that is not read. It takes whatever a pickle does with it, and keeps none of it."""

    def __new__(cls, *_: Any, **__: Any) -> StandIn:
        """Takes any arguments."""
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        """Keeps none of them."""

    def __call__(self, *_: Any, **__: Any) -> StandIn:
        """Calls nothing."""
        return self

    def _ignore(self, *_: Any) -> None:
        """Keeps no state and no item."""

    __setstate__ = __setitem__ = append = extend = add = _ignore


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins"}.get(module, module)  # as protocol 2 has it
        if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):
            return _without_attributes
        if name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        return type(name, (StandIn,), {"__module__": module, "__qualname__": name})


def _without_attributes(make: Any, _kind: Any, arguments: Any, _attributes: Any) -> Any:
    """A tensor that has attributes of its own, or is of a class of its own, as a plain one."""
    return make(*arguments)


def _load(file: Any, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


def read_tensors(path: str | Path | BinaryIO, trust: bool = False, mapped: bool = False) -> Any:
    """What a file of `torch.save` holds, on the CPU.

    Args:
        path: the file.
        trust: unpickle it as it is, with whatever code it names.
        mapped: tensors stay in the file, mapped into memory, until they are read.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what the file seems to be; the error below names it
            return _load_file(path, trust, mapped and zipfile.is_zipfile(path))
    except Exception as error:  # damaged bytes may raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"ckpt: '{path}' is damaged, or no file of torch.save ({reason})") from error


def _load_file(path: str | Path | BinaryIO, trust: bool, mapped: bool) -> Any:
    if trust:
        return torch.load(path, map_location="cpu", weights_only=False, mmap=mapped)
    try:
        return torch.load(
            path, map_location="cpu", weights_only=True, mmap=mapped
        )  # raises RuntimeError for a TorchScript archive
    except pickle.UnpicklingError:
        inert: Any = ModuleType("inert")
        inert.Unpickler, inert.load = _Unpickler, _load
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=inert, mmap=mapped)
