"""Reading a shelf: the rows of a part's sequences, in memory or from disk as they are used.

Both ways give the same bits. On disk, a row group of fixed-width values without nulls or compression is one run of
bytes behind a page header; where it begins follows from Parquet's own metadata, and is checked against what pyarrow
reads, once, when the shard's checksums are.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline.load import unit_index
from pipeline.store import DamagedShardError, Entry, Shard, Shelf


@dataclass(frozen=True)
class _Run:
    """The bytes of consecutive rows of a shard: rows `first` to `last`, from byte `offset` of the file."""

    first: int
    last: int
    offset: int


class Rows:
    """The embedding rows of n sequences.

    Attributes:
        counts: rows of each sequence, shape (n,).
        hidden_size: width of a row.
        in_memory: whether all rows are held in memory.
    """

    def __init__(self, shelf: Shelf, entries: Sequence[Entry], memory_bytes: int) -> None:
        """Verifies each shard that holds one of the rows. Raises DamagedShardError if one is not what was written."""
        self.counts = np.array([entry.count for entry in entries], dtype=np.int64)
        self.hidden_size = shelf.hidden_size
        self._dtype = shelf.dtype
        self._width = shelf.hidden_size * shelf.dtype.itemsize
        distinct = {(entry.shard.file, entry.start): entry for entry in entries}
        order = sorted(distinct)
        position = {key: index for index, key in enumerate(order)}
        self._which = np.array([position[entry.shard.file, entry.start] for entry in entries], dtype=np.int64)
        self._entries = [distinct[key] for key in order]
        self._counts = np.array([entry.count for entry in self._entries], dtype=np.int64)
        self._starts = np.cumsum([0, *self._counts])
        self.in_memory = bool(self._starts[-1] * self._width <= memory_bytes)
        self._memory = torch.empty((self._starts[-1] if self.in_memory else 0, self.hidden_size))
        self._runs: dict[str, list[_Run]] = {}
        self._files: dict[str, int] = {}
        for shard in {entry.shard.file: entry.shard for entry in self._entries}.values():
            self._open(shelf, shard)

    def __len__(self) -> int:
        return len(self.counts)

    def gather(self, sequences: npt.NDArray[np.int64]) -> Tensor:
        """The rows of some sequences one after another, float32, shape (sum of their counts, hidden_size)."""
        which = self._which[sequences]
        if not self.in_memory:
            parts = [self._read(self._entries[entry]) for entry in which]
            return torch.from_numpy(np.concatenate(parts).astype(np.float32, copy=False))
        return self._memory.index_select(0, torch.from_numpy(unit_index(self._counts, which)))

    def close(self) -> None:
        """Gives the memory and the open files back."""
        self._memory = torch.empty((0, self.hidden_size))
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files = {}

    def _open(self, shelf: Shelf, shard: Shard) -> None:
        """Reads a shard through pyarrow, which checks its checksums; copies its rows, or finds them in the file."""
        wanted = [(index, entry) for index, entry in enumerate(self._entries) if entry.shard == shard]
        if not self.in_memory:
            self._files[shard.file] = os.open(shelf.path(shard), os.O_RDONLY)
        try:
            with pq.ParquetFile(shelf.path(shard), memory_map=True, page_checksum_verification=True) as file:
                first = 0
                for group in range(file.metadata.num_row_groups):
                    rows = self._group(file, group)
                    if self.in_memory:
                        self._copy(rows, first, wanted)
                    else:
                        self._locate(file, group, rows, first, shard)
                    first += len(rows)
        except (pa.ArrowException, OSError) as error:
            self.close()
            raise DamagedShardError(shard, str(error)) from error

    def _group(self, file: pq.ParquetFile, group: int) -> npt.NDArray[np.floating]:
        """The rows of a row group, shape (rows, hidden_size)."""
        column = file.read_row_group(group, columns=["hidden"], use_threads=False)["hidden"].combine_chunks()
        if column.offset or column.null_count or column.type.byte_width != self._width:
            raise pa.ArrowInvalid(f"expected rows of {self._width} bytes, found {column.type}")
        values = np.frombuffer(column.buffers()[1], dtype=self._dtype, count=len(column) * self.hidden_size)
        return values.reshape(len(column), self.hidden_size)

    def _copy(self, rows: npt.NDArray[np.floating], first: int, wanted: list[tuple[int, Entry]]) -> None:
        """Copies the wanted ones of the rows that begin at row `first` of the shard."""
        memory = self._memory.numpy()
        last = first + len(rows)
        for index, entry in wanted:
            begin, end = max(entry.start, first), min(entry.start + entry.count, last)
            if begin < end:
                to = self._starts[index] + begin - entry.start
                memory[to : to + end - begin] = rows[begin - first : end - first]

    def _locate(
        self, file: pq.ParquetFile, group: int, rows: npt.NDArray[np.floating], first: int, shard: Shard
    ) -> None:
        """Finds where the bytes of a row group lie in the file, and makes sure of it."""
        metadata = file.metadata.row_group(group)
        column = metadata.column(metadata.num_columns - 1)
        end = column.data_page_offset + column.total_compressed_size
        run = _Run(first, first + len(rows), end - rows.nbytes)
        self._runs.setdefault(shard.file, []).append(run)
        if os.pread(self._files[shard.file], rows.nbytes, run.offset) != rows.tobytes():
            raise pa.ArrowInvalid("rows are not where the metadata says")

    def _read(self, entry: Entry) -> npt.NDArray[np.floating]:
        """The rows of a sequence, from the file."""
        pieces = []
        begin, end = entry.start, entry.start + entry.count
        for run in self._runs[entry.shard.file]:
            first, last = max(begin, run.first), min(end, run.last)
            if first < last:
                where = run.offset + (first - run.first) * self._width
                pieces.append(os.pread(self._files[entry.shard.file], (last - first) * self._width, where))
        rows = np.frombuffer(b"".join(pieces), dtype=self._dtype)
        return rows.reshape(entry.count, self.hidden_size)
