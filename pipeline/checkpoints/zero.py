"""Weights of which ZeRO gives each rank a part: where the parts are, and the whole of one weight.

A rank's part is a list of vectors, one for each group of the optimizer, which count as one long vector in ZeRO 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shapes = Mapping[str, Sequence[int]]
Vectors = Sequence[Tensor]


@dataclass(frozen=True)
class InParts:
    """A weight that is in several places.

    Attributes:
        shape: of the whole.
        spans: vectors that count as one, the first value in that, and how many; the last span may end in padding.
    """

    shape: tuple[int, ...]
    spans: tuple[tuple[Vectors, int, int], ...]

    def whole(self) -> Tensor:
        """The whole weight, of this shape."""
        values = torch.cat([piece for span in self.spans for piece in _pieces(*span)])
        return values[: math.prod(self.shape)].view(self.shape)


def in_groups(ranks: Sequence[Vectors], groups: Sequence[Shapes]) -> dict[str, InParts]:
    """The weights in ZeRO 1 and 2: those of a group are one behind the other, and each rank has a stretch of that.

    Args:
        ranks: the vectors of each rank, one for each group.
        groups: names and shapes of the weights in each group.

    Raises:
        ValueError: the vectors are too short or too long for these shapes.
    """
    found = {}
    for index, shapes in enumerate(groups):
        vectors, begin = [vectors[index] for vectors in ranks], 0
        for name, shape in shapes.items():
            found[name] = InParts(tuple(shape), ((vectors, begin, math.prod(shape)),))
            begin += math.prod(shape)
        _check(begin, sum(map(len, vectors)), 2 * len(ranks))
    return found


def of_each(ranks: Sequence[Vectors], groups: Sequence[Shapes]) -> dict[str, InParts]:
    """The weights in ZeRO 3: each rank has an equal part of each, the last one padded. See `in_groups`."""
    found, begin = {}, 0
    for name, shape in (item for shapes in groups for item in shapes.items()):
        count = -(-math.prod(shape) // len(ranks))
        found[name] = InParts(tuple(shape), tuple((vectors, begin, count) for vectors in ranks))
        begin += count
    for vectors in ranks:
        _check(begin, sum(map(len, vectors)), 1)
    return found


def _check(needed: int, held: int, padding: int) -> None:
    """Raises ValueError unless both are the same, once they are rounded up to a multiple of `padding`."""
    if held < needed or -(-held // padding) != -(-needed // padding):
        raise ValueError(f"expected {needed:,} values of the weights in param_shapes, found {held:,}")


def _pieces(vectors: Vectors, begin: int, count: int) -> Iterator[Tensor]:
    """The stretches of vectors that count as one."""
    for vector in vectors:
        yield vector[max(begin, 0) : max(begin + count, 0)]
        begin -= len(vector)
