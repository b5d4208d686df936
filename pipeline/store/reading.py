"""Reading a shelf: the rows of some sequences, in memory or from disk as they are used: the same bits."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.errors import CacheError
from pipeline.load import unit_index
from pipeline.store import shards
from pipeline.store.shards import DamagedShardsError, Entry, Run, Shard, is_damage
from pipeline.store.shelf import Shelf

THREADS = min(4, os.cpu_count() or 1)
Indices = npt.NDArray[np.int64]
Stretch = tuple[int, int, int]  # first row in the shard, last, first row in memory


class Vectors:
    """The rows of some sequences of a shelf, each sequence once, as the shards hold them.

    Attributes:
        shelf: where they are stored.
        in_memory: whether all rows are held in memory, as float32.
        memory: those, shape (rows, hidden_size); empty if not.
        counts: rows of each sequence.
    """

    def __init__(self, shelf: Shelf, entries: Iterable[Entry], memory_bytes: int) -> None:
        """Reads them, and holds them to their checksums; beyond `memory_bytes` they are read again as they are used.

        Raises:
            DamagedShardsError: some are not what was written.
            CacheError: a shard cannot be read.
        """
        self.shelf = shelf
        distinct = {(entry.shard.file, entry.start): entry for entry in entries}
        order = sorted(distinct)
        self._position = {key: index for index, key in enumerate(order)}
        self._entries = [distinct[key] for key in order]
        self.counts = np.array([entry.count for entry in self._entries], dtype=np.int64)
        self._moved: Tensor | None = None
        total = int(self.counts.sum())
        self.in_memory = total * shelf.hidden_size * 4 <= memory_bytes
        # numpy's memory, since it is of large pages: a quarter of the time to fill
        self.memory = torch.from_numpy(np.empty((total if self.in_memory else 0, shelf.hidden_size), np.float32))
        self._runs: dict[str, list[Run]] = {}
        self._damaged: dict[str, tuple[Shard, str]] = {}
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda piece: self._take(*piece), self._pieces()))
        if self._damaged:
            raise DamagedShardsError(list(self._damaged.values()))

    def on(self, device: torch.device) -> Tensor:
        """`memory` on a device, moved there once."""
        if self._moved is None or self._moved.device != device:
            self._moved = self.memory.to(device)
        return self._moved

    def positions(self, entries: Sequence[Entry]) -> Indices:
        """Which of the sequences these are."""
        return np.array([self._position[entry.shard.file, entry.start] for entry in entries], dtype=np.int64)

    def read(self, sequences: Indices) -> npt.NDArray[np.floating]:
        """The rows of some sequences one after another, from the files, in the stored dtype.

        No descriptor stays open, however many shards there are.
        """
        some = [self._entries[sequence] for sequence in sequences]
        rows = np.empty((sum(entry.count for entry in some), self.shelf.hidden_size), self.shelf.dtype)
        begin = 0
        for entry in some:
            with self.shelf.path(entry.shard).open("rb", buffering=0) as file:
                shards.read_rows(file, self._runs[entry.shard.file], entry.start, rows[begin : begin + entry.count])
            begin += entry.count
        return rows

    def _pieces(self) -> Iterator[tuple[Shard, Run, list[Stretch]]]:
        """What is to be read: whole row groups, since those have checksums; and which rows of each are wanted."""
        here = 0
        for _, some in groupby(self._entries, key=lambda entry: entry.shard.file):
            entries = list(some)
            shard = entries[0].shard
            with self._noticing(shard):
                runs = shards.runs(self.shelf.path(shard), shard, self.shelf.row_bytes)
                self._runs[shard.file] = runs
                yield from ((shard, run, stretches) for run, stretches in _within(runs, _stretches(entries, here)))
            here += sum(entry.count for entry in entries)

    def _take(self, shard: Shard, run: Run, stretches: list[Stretch]) -> None:
        """Reads a row group, and keeps what is wanted of it."""
        (first, last, here), count = stretches[0], run.last - run.first
        whole = self.in_memory and last - first == count and self.shelf.dtype == np.float32
        memory = self.memory.numpy()
        out = memory[here : here + count] if whole else np.empty((count, self.shelf.hidden_size), self.shelf.dtype)
        with self._noticing(shard):
            with self.shelf.path(shard).open("rb", buffering=0) as file:
                intact = shards.read_run(file, shard, run, out)
            if not intact:
                self._damaged[shard.file] = shard, "another checksum"
        for first, last, here in stretches if self.in_memory and not whole else ():
            memory[here : here + last - first] = out[first - run.first : last - run.first]

    @contextmanager
    def _noticing(self, shard: Shard) -> Iterator[None]:
        """Takes down that a shard is damaged. Raises CacheError where it cannot be read for another reason."""
        try:
            yield
        except (pa.ArrowException, OSError, ValueError) as error:
            if not is_damage(error):
                raise CacheError(f"store: '{self.shelf.path(shard)}' cannot be read ({error})") from error
            self._damaged[shard.file] = shard, str(error)


class Rows:
    """The embedding rows of examples in their order, each with its own number of rows."""

    def __init__(self, vectors: Vectors, entries: Sequence[Entry]) -> None:
        """`entries` are among those of `vectors`."""
        self._vectors = vectors
        self._which = vectors.positions(entries)
        self._single = bool((vectors.counts == 1).all())

    @property
    def in_memory(self) -> bool:
        """Whether they are held in memory."""
        return self._vectors.in_memory

    def on(self, device: torch.device) -> Tensor:
        """What `index` points into, on a device; moved there once. Shape (rows, hidden_size)."""
        return self._vectors.on(device)

    def index(self, sequences: Indices) -> Indices:
        """Where the rows of some examples stand in memory, one example after another."""
        which = self._which[sequences]
        return which if self._single else unit_index(self._vectors.counts, which)

    def gather(self, sequences: Indices) -> Tensor:
        """The rows of some examples one after another, float32, shape (sum of their counts, hidden_size)."""
        if self.in_memory:
            return self._vectors.memory.index_select(0, torch.from_numpy(self.index(sequences)))
        rows = self._vectors.read(self._which[sequences])
        return torch.from_numpy(rows.astype(np.float32, copy=False))


def _stretches(entries: Sequence[Entry], here: int) -> list[Stretch]:
    """Rows of a shard that lie together, in order."""
    found: list[Stretch] = []
    for entry in entries:
        end = entry.start + entry.count
        if found and found[-1][1] == entry.start:
            found[-1] = found[-1][0], end, found[-1][2]
        else:
            found.append((entry.start, end, here))
        here += entry.count
    return found


def _within(runs: Sequence[Run], stretches: Iterable[Stretch]) -> Iterator[tuple[Run, list[Stretch]]]:
    """The runs that stretches lie in, and what lies in each."""
    rest = deque(stretches)
    for run in runs:
        inside = []
        while rest and rest[0][0] < run.last:
            first, last, here = rest.popleft()
            end = min(last, run.last)
            inside.append((first, end, here))
            if end < last:
                rest.appendleft((end, last, here + end - first))
        if inside:
            yield run, inside
