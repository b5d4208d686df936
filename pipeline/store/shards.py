"""A shard: one Parquet file with the embeddings of some sequences.

It has the columns `key` (digest of the row's sequence), `unknown` (its unknown tokens) and `hidden` (the vector's
bytes, little-endian); one row per token, or per sequence where pooled. Values of fixed width, without nulls and
compression, lie in a row group one after another, and where they begin follows from Parquet's own metadata: rows are
read as plainly as with `numpy.fromfile`. Each row group has a checksum, computed from memory when it is written and
compared when it is read.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from xxhash import xxh3_64_intdigest

from pipeline.errors import CacheError

KEY_BYTES = 16
# A row group is one data page (pyarrow breaks pages at 20,000 rows), so that its vectors lie one after another. It is
# small enough to stay in the processor's caches while it is written, or read and verified.
ROW_GROUP, GROUP_BYTES = 16_384, 2**22
REMEDY = "install the version of pyarrow that constraints.txt names"
INDEX = b"sequences"  # key of the index in the file's own metadata; see `entries`

Array = npt.NDArray[np.floating]
INDEX_ROW = np.dtype([("key", f"V{KEY_BYTES}"), ("count", "<i8"), ("unknown", "<i8")])


@dataclass(frozen=True)
class Shard:
    """A finished shard, as the manifest lists it.

    Attributes:
        file: its name.
        bytes: its size.
        of_index: XXH3 checksum of the index.
        of_groups: XXH3 checksum of the vectors of each row group.
        rows: number of vectors.
        sequences: number of sequences.
        made_with: how they were embedded.
    """

    file: str
    bytes: int
    of_index: int
    of_groups: Sequence[int]
    rows: int
    sequences: int
    made_with: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a sequence's rows are: shard, first row, number of rows; and how many of its tokens are unknown."""

    shard: Shard
    start: int
    count: int
    unknown: int


@dataclass(frozen=True)
class RowGroup:
    """Consecutive rows of a shard, `first` up to `last`, whose vectors begin at byte `offset` of the file."""

    first: int
    last: int
    offset: int
    checksum: int


class DamagedShardsError(CacheError):
    """Shards do not have the content that was written. They are dropped, and their sequences are embedded again."""

    def __init__(self, damaged: Sequence[tuple[Shard, str]]) -> None:
        """Takes the shards, with what is wrong with each."""
        names = ", ".join(f"{shard.file} ({reason})" for shard, reason in damaged)
        super().__init__(f"store: damaged shards: {names}; run again, and their sequences are embedded afresh")
        self.damaged = damaged


class ShardFile:
    """A shard that is being written, row group by row group, under a name that ends in `.tmp`."""

    def __init__(self, path: Path, hidden_size: int, dtype: np.dtype[Any], made_with: Mapping[str, Any]) -> None:
        """Creates the file; it is renamed to `path` at the end."""
        self.path = path
        self.made_with = made_with
        self.rows = 0
        self._temporary = path.with_suffix(".tmp")
        self._row_bytes = hidden_size * dtype.itemsize
        self._index: list[npt.NDArray[np.void]] = []
        self._checksums: list[int] = []
        types = {"key": pa.binary(KEY_BYTES), "unknown": pa.int32(), "hidden": pa.binary(self._row_bytes)}
        fields = [pa.field(name, kind, nullable=False) for name, kind in types.items()]
        self._schema = pa.schema(fields, metadata={"dtype": dtype.str, "hidden_size": str(hidden_size)})
        layout: dict[str, Any] = {"compression": "NONE", "write_statistics": False, "data_page_size": 2**30}
        self._writer = pq.ParquetWriter(self._temporary, self._schema, use_dictionary=["key", "unknown"], **layout)

    def add(self, keys: Sequence[bytes], unknown: Sequence[int], counts: Sequence[int], rows: Array) -> None:
        """Writes the rows of some sequences one after another, shape (sum of counts, hidden_size)."""
        index = np.zeros(len(keys), INDEX_ROW)
        index["key"] = np.frombuffer(b"".join(keys), dtype=f"V{KEY_BYTES}")
        index["unknown"], index["count"] = unknown, counts
        self._index.append(index)
        each = np.repeat(index, index["count"])
        most = max(1, min(ROW_GROUP, GROUP_BYTES // self._row_bytes))
        groups = -(-len(rows) // most)
        for begin, end in pairwise(len(rows) * group // groups for group in range(groups + 1)):
            self._add_group(each[begin:end], rows[begin:end])
        self.rows += len(rows)

    def _add_group(self, each: npt.NDArray[np.void], rows: Array) -> None:
        content = np.ascontiguousarray(rows).view(np.uint8).reshape(-1)
        columns = [
            _fixed_width(np.ascontiguousarray(each["key"]).view(np.uint8), KEY_BYTES),
            pa.array(each["unknown"].astype(np.int32)),
            _fixed_width(content, self._row_bytes),
        ]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))
        self._checksums.append(xxh3_64_intdigest(content.data))

    def finish(self) -> Shard:
        """Ends and syncs the file, gives it its name, and returns its entry for the manifest."""
        index = np.concatenate(self._index)
        self._writer.add_key_value_metadata({INDEX: index.tobytes().hex()})
        self._writer.close()
        shard = Shard(
            self.path.name,
            self._temporary.stat().st_size,
            xxh3_64_intdigest(index.tobytes()),
            self._checksums,
            self.rows,
            len(index),
            self.made_with,
        )
        with self._temporary.open("rb+", buffering=0) as file:
            group = row_groups(self._temporary, shard, self._row_bytes)[-1]
            content = np.empty((group.last - group.first) * self._row_bytes, np.uint8)
            if not read_group(file, group, content):
                found = f"another layout from pyarrow {pa.__version__}"
                raise CacheError(
                    f"store: expected the rows of {self.path.name} in one run of bytes, found {found}; {REMEDY}"
                )
            os.fsync(file.fileno())
        self._temporary.replace(self.path)
        return shard

    def discard(self) -> None:
        """Removes the unfinished file."""
        with contextlib.suppress(OSError, pa.ArrowException):  # a full disk has no room for the end either
            self._writer.close()
        self._temporary.unlink(missing_ok=True)


def is_damage(error: Exception) -> bool:
    """Whether an error in reading means that the file is damaged; an error such as too many open files does not.

    pyarrow reports a broken file as an OSError without a number.
    """
    return not isinstance(error, OSError) or error.errno in (None, errno.ENOENT, errno.EIO)


def entries(path: Path, shard: Shard) -> Iterator[tuple[bytes, Entry]]:
    """Where each sequence of a shard is, by key. Raises pyarrow's errors, OSError or ValueError if it is damaged."""
    content = bytes.fromhex((pq.read_metadata(path).metadata or {}).get(INDEX, b"").decode())
    if xxh3_64_intdigest(content) != shard.of_index:
        raise pa.ArrowInvalid("its index is not the one that was written")
    index = np.frombuffer(content, INDEX_ROW)
    keys, counts = index["key"].tobytes(), index["count"]
    starts = (np.cumsum(counts) - counts).tolist()
    for number, values in enumerate(zip(starts, counts.tolist(), index["unknown"].tolist(), strict=True)):
        yield keys[number * KEY_BYTES : (number + 1) * KEY_BYTES], Entry(shard, *values)


def row_groups(path: Path, shard: Shard, row_bytes: int) -> list[RowGroup]:
    """Where the vectors of each row group are in the file. Raises pyarrow's errors if it is damaged."""
    metadata, found, first = pq.read_metadata(path), list[RowGroup](), 0
    for group, checksum in zip(range(metadata.num_row_groups), shard.of_groups, strict=True):
        rows = metadata.row_group(group).num_rows
        column = metadata.row_group(group).column(metadata.num_columns - 1)
        end = column.data_page_offset + column.total_compressed_size
        found.append(RowGroup(first, first + rows, end - rows * row_bytes, checksum))
        first += rows
    return found


def read_group(file: BinaryIO, group: RowGroup, out: npt.NDArray[Any]) -> bool:
    """Fills `out` with all vectors of a row group; returns whether they have the group's checksum."""
    read_into(file, group.offset, out)
    return xxh3_64_intdigest(out.reshape(-1).view(np.uint8).data) == group.checksum


def read_rows(file: BinaryIO, groups: Sequence[RowGroup], start: int, out: Array) -> None:
    """Fills `out`, of shape (rows, hidden_size) and the stored dtype, with the rows of a shard from `start` on."""
    row_bytes, end = out.shape[1] * out.itemsize, start + len(out)
    for group in groups:
        first, last = max(start, group.first), min(end, group.last)
        if first < last:
            read_into(file, group.offset + (first - group.first) * row_bytes, out[first - start : last - start])


def read_into(file: BinaryIO, offset: int, out: npt.NDArray[Any]) -> None:
    """Fills an array with the bytes of an unbuffered file from `offset` on."""
    rest = memoryview(out.reshape(-1).view(np.uint8).data)
    file.seek(offset)
    while len(rest):
        count = file.readinto(rest)  # type: ignore[attr-defined]  # at most 2 GiB at a time
        if not count:
            raise OSError(errno.EIO, f"{file.name} ends too early")
        rest = rest[count:]


def _fixed_width(content: npt.NDArray[np.uint8], width: int) -> pa.FixedSizeBinaryArray:
    """Bytes as a fixed-size binary column, without a copy."""
    buffer = pa.py_buffer(content.reshape(-1))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), buffer.size // width, [None, buffer])
