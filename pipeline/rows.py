"""Reading a shelf: the rows of a part's sequences, in memory or from disk as they are used: the same bits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from pipeline import shards
from pipeline.load import unit_index
from pipeline.shards import DamagedShardError, Entry, Shard
from pipeline.store import Shelf

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 8_192  # rows that a thread reads at a time


def damaged(shelf: Shelf, some: Iterable[Shard]) -> list[DamagedShardError]:
    """Reads shards in full: those that are not what was written, and why."""
    found = []
    for shard in some:
        try:
            shards.verify(shelf.path(shard), shard)
        except DamagedShardError as damage:
            found.append(damage)
    return found


class Rows:
    """The embedding rows of some sequences, each of its own number of rows.

    Attributes:
        in_memory: whether all rows are held in memory, as float32.
        memory: those, each sequence once, shape (rows, hidden_size); empty if not.
    """

    def __init__(self, shelf: Shelf, entries: Sequence[Entry], memory_bytes: int) -> None:
        """Takes shards that were verified."""
        self._shelf = shelf
        distinct = {(entry.shard.file, entry.start): entry for entry in entries}
        order = sorted(distinct)
        position = {key: index for index, key in enumerate(order)}
        self._which = np.array([position[entry.shard.file, entry.start] for entry in entries], dtype=np.int64)
        self._entries = [distinct[key] for key in order]
        self._counts = np.array([entry.count for entry in self._entries], dtype=np.int64)
        self._single = bool((self._counts == 1).all())
        total, width = int(self._counts.sum()), shelf.hidden_size
        self.in_memory = total * width * 4 <= memory_bytes
        files = {entry.shard.file: entry.shard for entry in self._entries}
        stored_width = width * shelf.dtype.itemsize
        self._runs = {file: shards.runs(shelf.path(shard), stored_width) for file, shard in files.items()}
        # numpy's memory, since it is of large pages: a quarter of the time to fill
        self.memory = torch.from_numpy(np.empty((total if self.in_memory else 0, width), np.float32))
        self._moved: Tensor | None = None
        if self.in_memory:
            with ThreadPoolExecutor(shards.THREADS) as pool:
                list(pool.map(self._copy, *zip(*self._pieces(), strict=True)))

    def on(self, device: torch.device) -> Tensor:
        """`memory` on a device, moved there once."""
        if self._moved is None or self._moved.device != device:
            self._moved = self.memory.to(device)
        return self._moved

    def index(self, sequences: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where the rows of some sequences stand in `memory`, one sequence after another."""
        which = self._which[sequences]
        return which if self._single else unit_index(self._counts, which)

    def gather(self, sequences: npt.NDArray[np.int64]) -> Tensor:
        """The rows of some sequences one after another, float32, shape (sum of their counts, hidden_size)."""
        if self.in_memory:
            return self.memory.index_select(0, torch.from_numpy(self.index(sequences)))
        parts = [self._read(self._entries[entry]) for entry in self._which[sequences]]
        return torch.from_numpy(np.concatenate(parts).astype(np.float32, copy=False))

    def _stretches(self) -> Iterator[tuple[Shard, int, int, int]]:
        """Rows that lie together in a shard, and will in memory: shard, first row there, number, first row here."""
        here = 0
        for shard, some in groupby(self._entries, key=lambda entry: entry.shard):
            start, count = -1, 0
            for entry in some:
                if entry.start != start + count:
                    if count:
                        yield shard, start, count, here
                    here, start, count = here + count, entry.start, 0
                count += entry.count
            yield shard, start, count, here
            here += count

    def _pieces(self) -> Iterator[tuple[Shard, int, int, int]]:
        """The same in pieces, so that threads share the work evenly."""
        for shard, start, count, here in self._stretches():
            for done in range(0, count, PIECE):
                yield shard, start + done, min(PIECE, count - done), here + done

    def _copy(self, shard: Shard, start: int, count: int, here: int) -> None:
        out = self.memory.numpy()[here : here + count]
        direct = self._shelf.dtype == out.dtype
        stored = out if direct else np.empty(out.shape, self._shelf.dtype)
        with self._shelf.path(shard).open("rb", buffering=0) as file:
            shards.read_rows(file, self._runs[shard.file], start, stored)
        if not direct:
            out[:] = stored

    def _read(self, entry: Entry) -> npt.NDArray[np.floating]:
        """The rows of a sequence, from the file; no descriptor stays open, however many shards there are."""
        rows = np.empty((entry.count, self._shelf.hidden_size), self._shelf.dtype)
        with self._shelf.path(entry.shard).open("rb", buffering=0) as file:
            shards.read_rows(file, self._runs[entry.shard.file], entry.start, rows)
        return rows
