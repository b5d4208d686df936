"""How a key of the configuration is declared, and how its value is checked."""

from __future__ import annotations

import math
from dataclasses import field, fields
from typing import Any

from pipeline.errors import ConfigError, nearest


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
