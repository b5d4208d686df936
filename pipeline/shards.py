"""A shard: one Parquet file with the embeddings of some sequences.

It has the columns `key` (digest of the row's sequence), `unknown` (its unknown tokens) and `hidden` (the vector's
bytes, little-endian); one row per token, or per sequence where pooled. A row group of fixed-width values without nulls
or compression is one run of bytes, and where that begins follows from Parquet's own metadata: rows are read as plainly
as with `numpy.fromfile`. `write` checks that they lie there, and takes the checksum that `verify` holds the file to.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import CacheError

KEY_BYTES = 16
# A row group is one data page (pyarrow breaks pages at 20,000 rows), so that its rows lie in one run of bytes.
ROW_GROUP = 16_384
BLOCK = 2**23  # bytes that have a checksum of their own, so that several are taken side by side
CHUNK = 2**18  # bytes read at a time: they stay in the processor's cache
THREADS = min(4, os.cpu_count() or 1)
INDEX = b"sequences"  # where the file's own metadata hold what `entries` gives

Array = npt.NDArray[np.floating]
INDEX_ROW = np.dtype([("key", f"V{KEY_BYTES}"), ("count", "<i8"), ("unknown", "<i8")])


@dataclass(frozen=True)
class Shard:
    """A finished shard, as the manifest counts it."""

    file: str
    bytes: int
    crc32: Sequence[int]
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
class Run:
    """The bytes of consecutive rows of a shard: rows `first` to `last`, from byte `offset` of the file."""

    first: int
    last: int
    offset: int


class DamagedShardError(CacheError):
    """A shard is not what the manifest says. It is dropped, and its sequences are embedded again."""

    def __init__(self, shard: Shard, reason: str) -> None:
        """Names the shard."""
        super().__init__(f"store: shard {shard.file} is damaged ({reason}); delete the store to start afresh")
        self.shard = shard


@dataclass
class Collected:
    """What goes into a shard: sequences, and their rows one after another.

    Attributes:
        keys: of each sequence.
        unknown: unknown tokens of each.
        counts: rows of each.
        rows: pieces of shape (some, hidden_size).
    """

    keys: list[bytes] = field(default_factory=list)
    unknown: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    rows: list[Array] = field(default_factory=list)
    bytes: int = 0
    tokens: int = 0

    def table(self) -> pa.Table:
        """As a table; lets go of the pieces."""
        keys = np.repeat(np.frombuffer(b"".join(self.keys), dtype=f"V{KEY_BYTES}"), self.counts)
        hidden = np.concatenate(self.rows)
        self.rows.clear()
        columns = {
            "key": _fixed_width(keys, KEY_BYTES),
            "unknown": pa.array(np.repeat(np.array(self.unknown, dtype=np.int32), self.counts)),
            "hidden": _fixed_width(hidden, hidden.shape[1] * hidden.itemsize),
        }
        index = np.zeros(len(self.keys), INDEX_ROW)
        index["key"] = np.frombuffer(b"".join(self.keys), dtype=f"V{KEY_BYTES}")
        index["count"], index["unknown"] = self.counts, self.unknown
        fields = [pa.field(name, column.type, nullable=False) for name, column in columns.items()]
        layout = {"dtype": hidden.dtype.str, "hidden_size": str(hidden.shape[1]), INDEX: index.tobytes().hex()}
        return pa.Table.from_arrays(list(columns.values()), schema=pa.schema(fields, metadata=layout))


def write(table: pa.Table, path: Path) -> list[int]:
    """Writes a table of `Collected` to `path`, synced; the checksums of the file's blocks."""
    pq.write_table(
        table,
        path,
        row_group_size=ROW_GROUP,
        compression="NONE",
        use_dictionary=["key", "unknown"],
        write_statistics=False,
        data_page_size=2**30,
        write_page_checksum=True,
    )
    hidden = table["hidden"].combine_chunks()
    content = np.frombuffer(hidden.buffers()[1], dtype=np.uint8)
    width = hidden.type.byte_width
    with path.open("rb+", buffering=0) as file:
        for run in runs(path, width):
            there = np.empty((run.last - run.first) * width, np.uint8)
            read_into(file, run.offset, there)
            assert np.array_equal(there, content[run.first * width : run.last * width]), "pyarrow's layout has changed"
        os.fsync(file.fileno())
    return checksums(path)


def verify(path: Path, shard: Shard) -> None:
    """Reads a shard in full. Raises DamagedShardError if it is not what was written."""
    try:
        intact = checksums(path) == list(shard.crc32)
    except OSError as error:
        if not is_damage(error):
            raise CacheError(f"store: '{path}' cannot be read ({error})") from error
        raise DamagedShardError(shard, str(error)) from error
    if not intact:
        raise DamagedShardError(shard, "another checksum")


def is_damage(error: Exception) -> bool:
    """Whether an error in reading means that the file is not what was written; too many open files, say, do not.

    pyarrow reports a wrong checksum as an OSError without a number.
    """
    return not isinstance(error, OSError) or error.errno in (None, errno.ENOENT, errno.EIO)


def entries(path: Path, shard: Shard) -> Iterator[tuple[bytes, Entry]]:
    """Where each sequence of a shard is, by key. Raises what pyarrow does where it cannot be read."""
    content = (pq.read_metadata(path).metadata or {}).get(INDEX)
    if content is None:
        raise pa.ArrowInvalid("its metadata hold no index")
    start = 0
    for row in np.frombuffer(bytes.fromhex(content.decode()), INDEX_ROW):
        yield row["key"].tobytes(), Entry(shard, start, int(row["count"]), int(row["unknown"]))
        start += int(row["count"])


def runs(path: Path, width: int) -> list[Run]:
    """Where the bytes of each row group lie in the file; a row has `width` bytes."""
    metadata, found, first = pq.read_metadata(path), list[Run](), 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        column = metadata.row_group(group).column(metadata.num_columns - 1)
        end = column.data_page_offset + column.total_compressed_size
        found.append(Run(first, first + rows, end - rows * width))
        first += rows
    return found


def read_rows(file: BinaryIO, where: Sequence[Run], start: int, out: Array) -> None:
    """Fills `out`, of shape (some, hidden_size) and the stored dtype, with the rows of a shard from `start` on."""
    width, end = out.shape[1] * out.itemsize, start + len(out)
    for run in where:
        first, last = max(start, run.first), min(end, run.last)
        if first < last:
            read_into(file, run.offset + (first - run.first) * width, out[first - start : last - start])


def read_into(file: BinaryIO, offset: int, out: npt.NDArray[Any]) -> None:
    """Fills an array with the bytes of an unbuffered file from `offset` on."""
    place = memoryview(out.reshape(-1).view(np.uint8).data)
    file.seek(offset)
    while len(place):
        count = file.readinto(place)  # type: ignore[attr-defined]  # at most 2 GiB at a time
        if not count:
            raise OSError(errno.EIO, f"{file.name} ends too early")
        place = place[count:]


def checksums(path: Path) -> list[int]:
    """The CRC-32 of each block of a file."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda begin: _crc32(path, begin), range(0, path.stat().st_size, BLOCK)))


def _crc32(path: Path, begin: int) -> int:
    buffer, checksum = memoryview(bytearray(CHUNK)), 0
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        for _ in range(BLOCK // CHUNK):
            checksum = zlib.crc32(buffer[: file.readinto(buffer)], checksum)
    return checksum


def _fixed_width(array: npt.NDArray[Any], width: int) -> pa.FixedSizeBinaryArray:
    """The rows of `array` as a fixed-size binary column, without a copy."""
    buffer = pa.py_buffer(np.ascontiguousarray(array).view(np.uint8).reshape(-1))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(array), [None, buffer])
