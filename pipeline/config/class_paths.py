"""Classes of the user's own code that a configuration names."""

from __future__ import annotations

import importlib
from typing import Any

from pipeline.errors import ConfigError, nearest

# The short names of `infer_target`, and the model types of transformers that each stands for.
ARCHITECTURES = {"esm": ("esm",), "prott5": ("t5", "mt5"), "megamolbart": ("bart", "mbart")}
ENCODERS = ("auto", *ARCHITECTURES)


def import_class(path: str, key: str, known: tuple[str, ...]) -> Any:
    """The class at the dotted `path` that `key` names. Raises ConfigError if there is none."""
    refuse_reference(path, key, known)
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # the user's module may raise anything when it is imported
        close = f"; is its folder on PYTHONPATH?{nearest(path, known)}"
        raise ConfigError(
            f"{key}: '{path}' is neither a short name nor a class on the path ({error}){close}"
        ) from error


def encoder_class(infer_target: str) -> Any:
    """The user's own encoder class that `infer_target` names; None for a short name. Raises ConfigError as above."""
    return None if infer_target in ENCODERS else import_class(infer_target, "infer_target", ENCODERS)


def refuse_reference(path: str, key: str, known: tuple[str, ...]) -> None:
    """Raises ConfigError for a class of the reference, whether or not the reference is installed."""
    if path.startswith("bionemo."):
        rule = "neither a short name nor a class of the reference that is known here"
        raise ConfigError(f"{key}: '{path}' is {rule}; expected {', '.join(known)}, or the path of a class of your own")
