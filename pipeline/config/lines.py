"""Where keys stand in YAML files, for error messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

SECTION = "model.dwnstr_task_validation"


class Lines:
    """Where keys of the section stand in the files, for error messages; and notes on what they were taken for.

    Args:
        name: of the configuration, for a key that stands nowhere.
        texts: name, package and text of each file, the one with the last word first.
        overrides: what is set beside them.
    """

    def __init__(self, name: str, texts: Sequence[tuple[str, str, str]] = (), overrides: str = "") -> None:
        self.name = name
        self.overrides = overrides
        self.notes: list[str] = []
        self.files = [(file, package.split(".") if package else [], _tree(text)) for file, package, text in texts]

    def at(self, path: tuple[Any, ...] = ()) -> str:
        """`FILE:LINE` of a key of the section, or of the nearest key around it."""
        keys = [*SECTION.split("."), *path]
        place, depth = self.name, 0
        for file, package, node in self.files:
            if keys[: len(package)] == package:
                line, reached = _reach(node, keys[len(package) :])
                if line and reached + len(package) > depth:
                    place, depth = f"{file}:{line}", reached + len(package)
        missing = len(keys) - depth
        return "overrides" if self.overrides and path and missing == 1 else place  # it came from there


def _tree(text: str) -> Any:
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return None


def _reach(node: Any, keys: Sequence[Any]) -> tuple[int, int]:
    """The line of the last of `keys`, one within the other, that a YAML mapping has; and how many it has."""
    line = 0
    for reached, key in enumerate(keys):
        found = _child(node, key)
        if found is None:
            return line, reached
        line, node = found
    return line, len(keys)


def _child(node: Any, key: Any) -> tuple[int, Any] | None:
    """The line of `key` and its value in a YAML mapping or sequence."""
    if isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
        return node.value[key].start_mark.line + 1, node.value[key]
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if name.value == str(key):
                return name.start_mark.line + 1, value
    return None
