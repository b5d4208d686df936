"""How a key of the configuration is declared, and how its value is checked."""

from __future__ import annotations

import math
import re
from dataclasses import field, fields
from typing import Any

from pipeline.errors import ConfigError, nearest

DEVICES = ("auto", "cpu", "cuda", "mps")
BYTE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def key(text: str, default: Any = None, **limits: Any) -> Any:
    """A field of a configuration class.

    Args:
        text: the explanation that `python -m pipeline config --schema` prints.
        default: the default value, or a function that makes it.
        limits: `choices` of a text, `least` and `most` of a number; and `key`, the name in YAML where it is another.
    """
    factory = default if callable(default) else lambda: default
    return field(default_factory=factory, metadata={"help": text, **limits})


def check_values(section: Any, where: str = "") -> None:
    """Raises ConfigError for a value that is not among the choices of its field, or out of its range."""
    for item in fields(section):
        value, limits = getattr(section, item.name), item.metadata
        if "choices" in limits:
            check_choice(where + limits.get("key", item.name), value, limits["choices"])
        least, most = limits.get("least", -math.inf), limits.get("most", math.inf)
        if value is not None and "least" in limits and not least <= value <= most:
            bounds = f"at least {least}" + (f" and at most {most}" if most < math.inf else "")
            raise ConfigError(f"{where}{item.name} is {value}, expected {bounds}")


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raises ConfigError for a value that is not known."""
    require(value in known, f"{name}: expected one of {', '.join(known)}, found '{value}'{nearest(value, known)}")


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def parse_bytes(text: str) -> int:
    """Bytes in `500MB`, `2GB`, `1.5GiB` or a plain number. Raises ConfigError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B?)\s*", text.upper())
    if not match or match[2] not in BYTE_UNITS:
        raise ConfigError(f"memory_budget: expected a size such as 500MB or 2GB, found '{text}'")
    return int(float(match[1]) * BYTE_UNITS[match[2]])
