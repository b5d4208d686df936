"""Reading a shelf: the rows of a part's sequences, in memory or from disk as they are used.

Both ways give the same bits. On disk, a row group of fixed-width values without nulls or compression is one run of
bytes behind a page header; where it begins follows from Parquet's own metadata. `verify` checks that against what
pyarrow reads, along with the shard's checksums, before a shard is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline.errors import CacheError
from pipeline.load import unit_index
from pipeline.store import DamagedShardError, Entry, Shard, Shelf, is_damage


@dataclass(frozen=True)
class _Run:
    """The bytes of consecutive rows of a shard: rows `first` to `last`, from byte `offset` of the file."""

    first: int
    last: int
    offset: int


def verify(shelf: Shelf, shard: Shard) -> None:
    """Reads a shard in full. Raises DamagedShardError if it is not what was written."""
    path = shelf.path(shard)
    try:
        with pq.ParquetFile(path, memory_map=True, page_checksum_verification=True) as file, path.open("rb") as raw:
            for group, run in enumerate(_runs(file, shelf)):
                rows = _group(file, group, shelf)
                raw.seek(run.offset)
                if raw.read(rows.nbytes) != rows.tobytes():
                    raise pa.ArrowInvalid("rows are not where the metadata says")
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise CacheError(f"store: '{path}' cannot be read ({error})") from error
        raise DamagedShardError(shard, str(error)) from error


def _runs(file: pq.ParquetFile, shelf: Shelf) -> list[_Run]:
    """Where the bytes of each row group lie in the file."""
    runs, first, width = [], 0, shelf.hidden_size * shelf.dtype.itemsize
    for group in range(file.metadata.num_row_groups):
        metadata = file.metadata.row_group(group)
        column = metadata.column(metadata.num_columns - 1)
        end = column.data_page_offset + column.total_compressed_size
        runs.append(_Run(first, first + metadata.num_rows, end - metadata.num_rows * width))
        first += metadata.num_rows
    return runs


def _group(file: pq.ParquetFile, group: int, shelf: Shelf) -> npt.NDArray[np.floating]:
    """The rows of a row group, shape (rows, hidden_size)."""
    column = file.read_row_group(group, columns=["hidden"], use_threads=False)["hidden"].combine_chunks()
    width = shelf.hidden_size * shelf.dtype.itemsize
    if column.offset or column.null_count or column.type.byte_width != width:
        raise pa.ArrowInvalid(f"expected rows of {width} bytes, found {column.type}")
    values = np.frombuffer(column.buffers()[1], dtype=shelf.dtype, count=len(column) * shelf.hidden_size)
    return values.reshape(len(column), shelf.hidden_size)


class Rows:
    """The embedding rows of some sequences, each of its own number of rows.

    Attributes:
        in_memory: whether all rows are held in memory, as float32.
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
        self._starts = np.cumsum([0, *self._counts])
        self.in_memory = bool(self._starts[-1] * shelf.hidden_size * 4 <= memory_bytes)
        self._memory = torch.empty((self._starts[-1] if self.in_memory else 0, shelf.hidden_size))
        self._runs: dict[str, list[_Run]] = {}
        for shard, wanted in groupby(enumerate(self._entries), key=lambda pair: pair[1].shard):
            with pq.ParquetFile(shelf.path(shard), memory_map=True, page_checksum_verification=True) as file:
                self._runs[shard.file] = _runs(file, shelf)
                if self.in_memory:
                    self._copy(file, self._runs[shard.file], list(wanted))

    def gather(self, sequences: npt.NDArray[np.int64]) -> Tensor:
        """The rows of some sequences one after another, float32, shape (sum of their counts, hidden_size)."""
        which = self._which[sequences]
        if not self.in_memory:
            parts = [self._read(self._entries[entry]) for entry in which]
            return torch.from_numpy(np.concatenate(parts).astype(np.float32, copy=False))
        return self._memory.index_select(0, torch.from_numpy(unit_index(self._counts, which)))

    def _copy(self, file: pq.ParquetFile, runs: list[_Run], wanted: list[tuple[int, Entry]]) -> None:
        """Copies the wanted rows of a shard, one row group at a time."""
        memory = self._memory.numpy()
        for group, run in enumerate(runs):
            rows = _group(file, group, self._shelf)
            for index, entry in wanted:
                begin, end = max(entry.start, run.first), min(entry.start + entry.count, run.last)
                if begin < end:
                    to = self._starts[index] + begin - entry.start
                    memory[to : to + end - begin] = rows[begin - run.first : end - run.first]

    def _read(self, entry: Entry) -> npt.NDArray[np.floating]:
        """The rows of a sequence, from the file; no descriptor stays open, however many shards there are."""
        width = self._shelf.hidden_size * self._shelf.dtype.itemsize
        pieces = []
        with self._shelf.path(entry.shard).open("rb", buffering=0) as file:
            for run in self._runs[entry.shard.file]:
                first, last = max(entry.start, run.first), min(entry.start + entry.count, run.last)
                if first < last:
                    file.seek(run.offset + (first - run.first) * width)
                    pieces.append(file.read((last - first) * width))
        rows = np.frombuffer(b"".join(pieces), dtype=self._shelf.dtype)
        return rows.reshape(entry.count, self._shelf.hidden_size)
