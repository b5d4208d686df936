"""Reading embeddings: the rows of some sequences, in memory or from disk as they are used, with the same bits."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from itertools import groupby

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.data.parts import unit_index
from pipeline.errors import CacheError
from pipeline.store import shards
from pipeline.store.embedding_table import EmbeddingTable
from pipeline.store.shards import DamagedShardsError, Entry, RowGroup, Shard, is_damage

THREADS = min(4, os.cpu_count() or 1)
Indices = npt.NDArray[np.int64]


class Rows:
    """The embedding rows of examples in their order, each example with its own number of rows.

    Attributes:
        table: where they are stored.
        in_memory: whether the rows of all distinct sequences are kept in memory, as float32.
        memory: these rows in the order of the shards, shape (rows, hidden_size); empty if they are not kept.
    """

    def __init__(self, table: EmbeddingTable, entries: Collection[Entry], memory_bytes: int) -> None:
        """Reads them and compares their checksums; beyond `memory_bytes` they are read again as they are used.

        Raises:
            DamagedShardsError: some are not what was written.
            CacheError: a shard cannot be read.
        """
        self.table = table
        distinct = {(entry.shard.file, entry.start): entry for entry in entries}
        order = sorted(distinct)
        self._position = {key: index for index, key in enumerate(order)}
        self._entries = [distinct[key] for key in order]
        self._counts = np.array([entry.count for entry in self._entries], dtype=np.int64)
        self._on_device: dict[torch.device, Tensor] = {}
        total = int(self._counts.sum())
        self.in_memory = total * table.hidden_size * 4 <= memory_bytes
        # numpy allocates large pages: they are filled in a quarter of the time
        self.memory = torch.from_numpy(np.empty((total if self.in_memory else 0, table.hidden_size), np.float32))
        self._groups: dict[str, list[RowGroup]] = {}
        self._damaged: dict[str, tuple[Shard, str]] = {}
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda task: self._read_group(*task), self._groups_to_read()))
        if self._damaged:
            raise DamagedShardsError(list(self._damaged.values()))
        self._positions = self._positions_of(entries)

    def of(self, entries: Collection[Entry]) -> Rows:
        """The rows of other examples with the same sequences, in the same memory; nothing is read again."""
        rows = copy(self)
        rows._positions = self._positions_of(entries)
        return rows

    def on(self, device: torch.device) -> Tensor:
        """`memory` on a device; moved there once."""
        if device not in self._on_device:
            self._on_device[device] = self.memory.to(device)
        return self._on_device[device]

    def index(self, examples: Indices) -> Indices:
        """Where the rows of some examples are in `memory`, one example after another."""
        return unit_index(self._counts, self._positions[examples])

    def gather(self, examples: Indices) -> Tensor:
        """The rows of some examples one after another, float32, shape (sum of their counts, hidden_size)."""
        if self.in_memory:
            return self.memory.index_select(0, torch.from_numpy(self.index(examples)))
        return torch.from_numpy(self._read(self._positions[examples]).astype(np.float32, copy=False))

    def _positions_of(self, entries: Collection[Entry]) -> Indices:
        """The positions of sequences in the order of the shards."""
        return np.array([self._position[entry.shard.file, entry.start] for entry in entries], dtype=np.int64)

    def _read(self, positions: Indices) -> npt.NDArray[np.floating]:
        """The rows of the sequences at some positions one after another, from the files, in the stored dtype.

        No file stays open, however many shards there are.
        """
        entries = [self._entries[position] for position in positions]
        rows = np.empty((sum(entry.count for entry in entries), self.table.hidden_size), self.table.dtype)
        begin = 0
        for entry in entries:
            with self.table.path(entry.shard).open("rb", buffering=0) as file:
                shards.read_rows(file, self._groups[entry.shard.file], entry.start, rows[begin : begin + entry.count])
            begin += entry.count
        return rows

    def _groups_to_read(self) -> Iterator[tuple[Shard, RowGroup, Indices, int]]:
        """The row groups to read, each with the rows to keep, counted from its first, and their place in memory."""
        position = 0
        for _, of_shard in groupby(self._entries, key=lambda entry: entry.shard.file):
            entries = list(of_shard)
            shard = entries[0].shard
            starts, counts = np.array([(entry.start, entry.count) for entry in entries]).T
            rows = np.arange(counts.sum()) + np.repeat(starts - (np.cumsum(counts) - counts), counts)
            with self._recording_damage(shard):
                self._groups[shard.file] = shards.row_groups(self.table.path(shard), shard, self.table.row_bytes)
            for group in self._groups.get(shard.file, []):
                begin, end = np.searchsorted(rows, (group.first, group.last)).tolist()
                if begin < end:
                    wanted = rows[begin : end if self.in_memory else begin] - group.first
                    yield shard, group, wanted, position + begin
            position += len(rows)

    def _read_group(self, shard: Shard, group: RowGroup, wanted: Indices, position: int) -> None:
        """Reads a row group, as a whole because of its checksum, and keeps the wanted rows in memory."""
        count = group.last - group.first
        whole, kept = len(wanted) == count, self.memory.numpy()[position : position + len(wanted)]
        in_place = whole and self.table.dtype == np.float32
        out = kept if in_place else np.empty((count, self.table.hidden_size), self.table.dtype)
        with self._recording_damage(shard):
            with self.table.path(shard).open("rb", buffering=0) as file:
                intact = shards.read_group(file, group, out)
            if not intact:
                self._damaged[shard.file] = shard, "another checksum"
        if not in_place:
            kept[:] = out if whole else out[wanted]

    @contextmanager
    def _recording_damage(self, shard: Shard) -> Iterator[None]:
        """Records a damaged shard. Raises CacheError where it cannot be read for another reason."""
        try:
            yield
        except (pa.ArrowException, OSError, ValueError) as error:
            if not is_damage(error):
                raise CacheError(f"store: '{self.table.path(shard)}' cannot be read ({error})") from error
            self._damaged[shard.file] = shard, str(error)
