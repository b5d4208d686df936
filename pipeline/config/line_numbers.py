"""Finds the line of a file that sets a key of the configuration, for error messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

SECTION = "model.dwnstr_task_validation"


class Lines:
    """Finds where the keys of the section were set, and collects notes on renamed and ignored keys.

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
        self.files = [
            (file, package.split(".") if package else [], yaml.compose(text, yaml.SafeLoader))
            for file, package, text in texts
        ]

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


def _reach(node: Any, keys: Sequence[Any]) -> tuple[int, int]:
    """Follows nested keys into a YAML mapping: the line of the last key that is there, and how many are there."""
    line = 0
    for reached, key in enumerate(keys):
        if isinstance(node, yaml.SequenceNode):
            found = [(value, value) for value in node.value[key : key + 1]] if isinstance(key, int) else []
        else:
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            found = [(name, value) for name, value in pairs if name.value == str(key)]
        if not found:
            return line, reached
        line, node = found[0][0].start_mark.line + 1, found[0][1]
    return line, len(keys)
