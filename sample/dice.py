# SPDX-License-Identifier: Apache-2.0
"""Chance that falls the same way on every machine and every Python.

Only ``random.Random(int).random()`` is used: it is the one primitive that Python promises to keep stable
across versions.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


class Dice:
    """Chance, built on nothing but ``random.Random(seed).random()``."""

    def __init__(self, seed: int) -> None:
        """Start a stream of its own, so that one task's data do not hang on another's."""
        self._next = random.Random(seed).random

    def chance(self, probability: float) -> bool:
        """Return true with this probability."""
        return self._next() < probability

    def between(self, low: int, high: int) -> int:
        """Return a whole number from low to high, both included."""
        return low + int(self._next() * (high - low + 1))

    def pick(self, items: Sequence[T]) -> T:
        """Return one of the items, each as likely as the next."""
        return items[int(self._next() * len(items))]

    def weighted(self, items: Sequence[T], weights: Sequence[int]) -> T:
        """Return one of the items; whole weights keep the sums exact."""
        left = int(self._next() * sum(weights))
        for item, weight in zip(items, weights, strict=True):
            left -= weight
            if left < 0:
                return item
        return items[-1]

    def shuffled(self, items: Iterable[T]) -> list[T]:
        """Return the items in a random order."""
        rest = list(items)
        return [rest.pop(int(self._next() * len(rest))) for _ in range(len(rest))]

    def normal(self) -> float:
        """Return a nearly normal number: twelve uniform ones, added up, with no logarithm or root."""
        return math.fsum(self._next() for _ in range(12)) - 6.0
