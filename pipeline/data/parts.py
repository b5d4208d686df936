"""The labelled sequences of a part, and the targets that are predicted of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

UNKNOWN = -1  # the class of a masked label: no label is -1 where the mask is True


@dataclass(frozen=True)
class Target:
    """What a head predicts.

    Attributes:
        name: the column.
        classes: the labels in order; None for regression.
        outputs: the head's width: 1, or the number of classes.
        weights: of the outputs in the training loss; None for equal weights.
    """

    name: str
    classes: tuple[str, ...] | None
    outputs: int
    weights: tuple[float, ...] | None = None

    @property
    def labels(self) -> list[str]:
        """A name for each output: the labels, then `class N` where more classes were declared; none for regression."""
        classes = self.classes or ()
        return [*classes, *(f"class {index}" for index in range(len(classes), self.outputs if classes else 0))]


@dataclass(frozen=True)
class Part:
    """The examples of one part (train, test or val) that are short enough: n sequences with u units.

    Attributes:
        sequences: the n sequences.
        rows: for each, `FILE:ROW`, the first data row of a file being 0.
        counts: units of each sequence, shape (n,): 1, or its length.
        values: per target, class indices (int32) or numbers (float64), shape (u,).
        masks: per target, which units have a label, shape (u,), bool.
        left_out: sequences longer than the limit.
        lengths: characters of every sequence of the files, used or not, shape (all,).
    """

    sequences: list[str]
    rows: list[str]
    counts: npt.NDArray[np.int64]
    values: list[npt.NDArray[np.int32] | npt.NDArray[np.float64]]
    masks: list[npt.NDArray[np.bool_]]
    left_out: int
    lengths: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.sequences)

    def shortest(self) -> Part:
        """The shortest sequence alone."""
        return self.of([min(range(len(self)), key=lambda row: len(self.sequences[row]))])

    def of(self, places: Sequence[int]) -> Part:
        """Some of its sequences."""
        some = np.array(places, np.int64)
        units = unit_index(self.counts, some)
        values, masks = [array[units] for array in self.values], [array[units] for array in self.masks]
        sequences, rows = ([texts[place] for place in places] for texts in (self.sequences, self.rows))
        return Part(sequences, rows, self.counts[some], values, masks, 0, np.array([*map(len, sequences)]))

    @cached_property
    def digest(self) -> str:
        """A digest of the content: sequences, labels and masks, in order."""
        digest = hashlib.sha256(json.dumps(self.sequences).encode())
        for values, mask in zip(self.values, self.masks, strict=True):
            digest.update(np.where(mask, values, 0).tobytes())
            digest.update(mask.tobytes())
        return digest.hexdigest()


def unit_index(counts: npt.NDArray[np.int64], sequences: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where the units of some sequences stand in flat arrays, one sequence after another.

    >>> unit_index(np.array([2, 1, 3]), np.array([2, 0]))
    array([3, 4, 5, 0, 1])
    """
    starts, some = (np.cumsum(counts) - counts)[sequences], counts[sequences]
    index: npt.NDArray[np.int64] = np.arange(int(some.sum())) + np.repeat(starts - (np.cumsum(some) - some), some)
    return index
