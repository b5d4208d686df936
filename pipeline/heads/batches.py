"""The embeddings and labels of a part on the device, and batches of them by index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.data.parts import Part, unit_index

if TYPE_CHECKING:
    from pipeline.store.reading import Rows

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Some sequences with u units.

    Attributes:
        rows: shape (u, hidden_size). The next batch overwrites them.
        counts: units of each sequence, shape (sequences,).
        values: int32 or float32 labels per target, shape (u,).
        masks: per target, shape (u,); None where no label of the part is masked.
    """

    rows: Tensor
    counts: Tensor
    values: list[Tensor]
    masks: list[Tensor | None]


class Data:
    """A part on a device; the embeddings move there once if they are in memory, else batch by batch."""

    def __init__(self, rows: Rows, part: Part, device: torch.device) -> None:
        """`rows` are the part's embeddings."""
        self.rows, self.part, self.device = rows, part, device
        self._memory = rows.on(device) if rows.in_memory else None
        self._values = [value.to(device) for value in _tensors(part)]
        self._masks = [None if mask.all() else torch.from_numpy(mask).to(device) for mask in part.masks]
        self._single = bool((part.counts == 1).all())
        self._buffer = torch.empty(0, device=device)

    def standardise(self, scale: Sequence[tuple[float, float]]) -> None:
        """From now on batches give labels less a mean, divided by a deviation: one pair per target."""
        for index, (mean, deviation) in enumerate(scale):
            if (mean, deviation) != (0, 1):
                values = (self.part.values[index] - mean) / deviation
                self._values[index] = torch.from_numpy(values).float().to(self.device)

    def batch(self, sequences: Indices) -> Batch:
        """The embeddings and labels of some sequences."""
        counts = torch.from_numpy(self.part.counts[sequences]).to(self.device)
        units = self._index(sequences if self._single else unit_index(self.part.counts, sequences))
        values = [value.index_select(0, units) for value in self._values]
        masks = [None if mask is None else mask.index_select(0, units) for mask in self._masks]
        if self._memory is None:
            return Batch(self.rows.gather(sequences).to(self.device), counts, values, masks)
        return Batch(self._take(self._index(self.rows.index(sequences))), counts, values, masks)

    def batches(self, sequences: Indices, batch_size: int) -> Iterator[Batch]:
        """Sequences in this order, some at a time."""
        if not self._single or self._memory is None:
            for begin in range(0, len(sequences), batch_size):
                yield self.batch(sequences[begin : begin + batch_size])
            return
        # One unit each: indices and labels need little memory, so they are gathered once for all batches.
        units = self._index(sequences)
        values = [value.index_select(0, units).split(batch_size) for value in self._values]
        masks = [None if mask is None else mask.index_select(0, units).split(batch_size) for mask in self._masks]
        places = self._index(self.rows.index(sequences)).split(batch_size)
        for number, some in enumerate(places):
            inside = [None if mask is None else mask[number] for mask in masks]
            yield Batch(self._take(some), torch.ones_like(some), [value[number] for value in values], inside)

    def labels(self, sequences: Indices, exact: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """Values, in float64 where `exact`, and masks of some sequences, on the CPU."""
        units = unit_index(self.part.counts, sequences)
        values = [torch.from_numpy(value) for value in self.part.values] if exact else _tensors(self.part)
        return [value[units] for value in values], [torch.from_numpy(mask[units]) for mask in self.part.masks]

    def _take(self, index: Tensor) -> Tensor:
        """Rows by index, of embeddings in memory."""
        assert self._memory is not None
        if len(self._buffer) < len(index):  # used again: fresh memory costs the time to clear it
            self._buffer = self._memory.new_empty(len(index), self._memory.shape[1])
        return torch.index_select(self._memory, 0, index, out=self._buffer[: len(index)])

    def _index(self, places: Indices) -> Tensor:
        return torch.from_numpy(places).to(self.device)


def _tensors(part: Part) -> list[Tensor]:
    values = [torch.from_numpy(value) for value in part.values]
    return [value.float() if value.is_floating_point() else value for value in values]
