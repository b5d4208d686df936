"""On which line of which file a key of the configuration is, for error messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

SECTION = "model.dwnstr_task_validation"


class Lines:
    """Finds where the keys of the section were set; and collects notes on those that were renamed or ignored.

    Args:
        name: of the configuration, for a key that is in no file.
        texts: name, package and text of each file; the first overrides the others.
        overridden: the keys that overrides set, each as its parts.
    """

    def __init__(
        self, name: str, texts: Sequence[tuple[str, str, str]] = (), overridden: Sequence[tuple[str, ...]] = ()
    ) -> None:
        self.name = name
        self.overridden = overridden
        self.notes: list[str] = []
        self.files = [(file, package.split(".") if package else [], _tree(text)) for file, package, text in texts]

    def at(self, path: tuple[Any, ...] = ()) -> str:
        """`overrides` for a key that they set; else `FILE:LINE` of the key, or of the nearest key around it."""
        keys = [*SECTION.split("."), *path]
        place, depth = self.name, 0
        for file, package, node in self.files:
            if keys[: len(package)] == package:
                line, reached = _reach(node, keys[len(package) :])
                if line and reached + len(package) > depth:
                    place, depth = f"{file}:{line}", reached + len(package)
        parts, in_files = tuple(map(str, path)), depth == len(keys)
        for key in self.overridden:
            around = not in_files and key[: len(parts)] == parts  # the override made the mapping around its key
            if parts and (parts[: len(key)] == key or around):
                return "overrides"
        return place


def _tree(text: str) -> Any:
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return None


def _reach(node: Any, keys: Sequence[Any]) -> tuple[int, int]:
    """Follows nested keys into a YAML mapping: the line of the last that is there, and how many are there."""
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
