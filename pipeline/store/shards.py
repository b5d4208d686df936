"""A shard: one Parquet file with the embeddings of some sequences.

It has the columns `key` (digest of the row's sequence), `unknown` (its unknown tokens) and `hidden` (the vector's
bytes, little-endian); one row per token, or per sequence where pooled. A row group of fixed-width values without nulls
or compression is one run of bytes, and where that begins follows from Parquet's own metadata: rows are read as plainly
as with `numpy.fromfile`. Each run has a checksum, taken from memory as it is written, that it is held to when read.
"""

from __future__ import annotations

import contextlib
import errno
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import CacheError

KEY_BYTES = 16
# A row group is one data page (pyarrow breaks pages at 20,000 rows), so that its rows lie in one run of bytes. It is
# small enough to be written, or read and held to its checksum, while it is in the processor's caches.
ROW_GROUP, GROUP_BYTES = 16_384, 2**22
# By name. XXH3 keeps up with memory, and CRC-32 takes as long as the reading itself; it is for where xxhash is missing.
CHECKSUMS: dict[str, Callable[[bytes | memoryview], int]] = {"crc32": zlib.crc32}
with contextlib.suppress(ImportError):
    from xxhash import xxh3_64_intdigest

    CHECKSUMS["xxh3"] = xxh3_64_intdigest
REMEDY = "install the version of pyarrow that constraints.txt names"
INDEX = b"sequences"  # where the file's own metadata hold what `entries` gives

Array = npt.NDArray[np.floating]
INDEX_ROW = np.dtype([("key", f"V{KEY_BYTES}"), ("count", "<i8"), ("unknown", "<i8")])


@dataclass(frozen=True)
class Shard:
    """A finished shard, as the manifest counts it.

    Attributes:
        file: its name.
        bytes: its size.
        checksum: which of `CHECKSUMS` it has.
        of_index: checksum of the index.
        of_groups: of the vectors of each row group.
        rows: how many vectors.
        sequences: of how many sequences.
        made_with: how they were embedded.
    """

    file: str
    bytes: int
    checksum: str
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
class Run:
    """The bytes of consecutive rows of a shard: rows `first` to `last`, from byte `offset` of the file."""

    first: int
    last: int
    offset: int
    checksum: int


class DamagedShardsError(CacheError):
    """Shards are not what the manifest says. They are dropped, and their sequences are embedded again."""

    def __init__(self, damaged: Sequence[tuple[Shard, str]]) -> None:
        """Shards, and what is wrong with each."""
        names = ", ".join(f"{shard.file} ({reason})" for shard, reason in damaged)
        super().__init__(f"store: damaged shards: {names}; run again, and their sequences are embedded afresh")
        self.damaged = damaged


class Writing:
    """A shard that is being written, row group by row group, under a name that ends in `.tmp`."""

    def __init__(self, path: Path, hidden_size: int, dtype: np.dtype[Any], made_with: Mapping[str, Any]) -> None:
        """Creates the file; it is renamed to `path` at the end."""
        self.path = path
        self.made_with = made_with
        self.rows = 0
        self._temporary = path.with_suffix(".tmp")
        self._width = hidden_size * dtype.itemsize
        self._index: list[npt.NDArray[np.void]] = []
        self._checksum = list(CHECKSUMS)[-1]
        self._checksums: list[int] = []
        types = {"key": pa.binary(KEY_BYTES), "unknown": pa.int32(), "hidden": pa.binary(self._width)}
        fields = [pa.field(name, kind, nullable=False) for name, kind in types.items()]
        self._schema = pa.schema(fields, metadata={"dtype": dtype.str, "hidden_size": str(hidden_size)})
        how: dict[str, Any] = {"compression": "NONE", "write_statistics": False, "data_page_size": 2**30}
        self._writer = pq.ParquetWriter(self._temporary, self._schema, use_dictionary=["key", "unknown"], **how)

    def add(self, keys: Sequence[bytes], unknown: Sequence[int], counts: Sequence[int], rows: Array) -> None:
        """Writes the rows of some sequences one after another, shape (sum of counts, hidden_size)."""
        index = np.zeros(len(keys), INDEX_ROW)
        index["key"] = np.frombuffer(b"".join(keys), dtype=f"V{KEY_BYTES}")
        index["unknown"], index["count"] = unknown, counts
        self._index.append(index)
        each = np.repeat(index, index["count"])
        most = max(1, min(ROW_GROUP, GROUP_BYTES // self._width))
        groups = -(-len(rows) // most)
        for begin, end in pairwise(len(rows) * group // groups for group in range(groups + 1)):
            self._add_group(each[begin:end], rows[begin:end])
        self.rows += len(rows)

    def _add_group(self, each: npt.NDArray[np.void], rows: Array) -> None:
        content = np.ascontiguousarray(rows).view(np.uint8).reshape(-1)
        columns = [
            _fixed_width(np.ascontiguousarray(each["key"]).view(np.uint8), KEY_BYTES),
            pa.array(each["unknown"].astype(np.int32)),
            _fixed_width(content, self._width),
        ]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))
        self._checksums.append(CHECKSUMS[self._checksum](content.data))

    def finish(self) -> Shard:
        """Ends and syncs the file, gives it its name, and says what the manifest is to count."""
        index = np.concatenate(self._index)
        self._writer.add_key_value_metadata({INDEX: index.tobytes().hex()})
        self._writer.close()
        shard = Shard(
            self.path.name,
            self._temporary.stat().st_size,
            self._checksum,
            CHECKSUMS[self._checksum](index.tobytes()),
            self._checksums,
            self.rows,
            len(index),
            self.made_with,
        )
        with self._temporary.open("rb+", buffering=0) as file:
            run = runs(self._temporary, shard, self._width)[-1]
            there = np.empty((run.last - run.first) * self._width, np.uint8)
            if not read_run(file, shard, run, there):
                found = f"another layout from pyarrow {pa.__version__}"
                raise CacheError(
                    f"store: expected the rows of {self.path.name} in one run of bytes, found {found}; {REMEDY}"
                )
            os.fsync(file.fileno())
        self._temporary.replace(self.path)
        return shard

    def discard(self) -> None:
        """Removes what was written so far."""
        with contextlib.suppress(OSError, pa.ArrowException):  # on a full disk it cannot be ended either
            self._writer.close()
        self._temporary.unlink(missing_ok=True)


def is_damage(error: Exception) -> bool:
    """Whether an error in reading means that the file is not what was written; too many open files, say, do not.

    pyarrow reports a broken file as an OSError without a number.
    """
    return not isinstance(error, OSError) or error.errno in (None, errno.ENOENT, errno.EIO)


def checksum_of(shard: Shard) -> Callable[[bytes | memoryview], int]:
    """What a shard's checksums are made with. Raises CacheError if it is not there."""
    try:
        return CHECKSUMS[shard.checksum]
    except KeyError:
        raise CacheError(f"store: shard {shard.file} has checksums of xxhash; install it: pip install xxhash") from None


def entries(path: Path, shard: Shard) -> Iterator[tuple[bytes, Entry]]:
    """Where each sequence of a shard is, by key. Raises what pyarrow does where it cannot be read."""
    content = bytes.fromhex((pq.read_metadata(path).metadata or {}).get(INDEX, b"").decode())
    if checksum_of(shard)(content) != shard.of_index:
        raise pa.ArrowInvalid("its index is not the one that was written")
    index = np.frombuffer(content, INDEX_ROW)
    keys, counts = index["key"].tobytes(), index["count"]
    starts = (np.cumsum(counts) - counts).tolist()
    for place, where in enumerate(zip(starts, counts.tolist(), index["unknown"].tolist(), strict=True)):
        yield keys[place * KEY_BYTES : (place + 1) * KEY_BYTES], Entry(shard, *where)


def runs(path: Path, shard: Shard, width: int) -> list[Run]:
    """Where the bytes of each row group lie in the file; a row has `width` bytes. Raises what pyarrow does."""
    metadata, found, first = pq.read_metadata(path), list[Run](), 0
    for group, checksum in zip(range(metadata.num_row_groups), shard.of_groups, strict=True):
        rows = metadata.row_group(group).num_rows
        column = metadata.row_group(group).column(metadata.num_columns - 1)
        end = column.data_page_offset + column.total_compressed_size
        found.append(Run(first, first + rows, end - rows * width, checksum))
        first += rows
    return found


def read_run(file: BinaryIO, shard: Shard, run: Run, out: npt.NDArray[Any]) -> bool:
    """Fills `out` with all rows of a run; whether they are what was written."""
    read_into(file, run.offset, out)
    return checksum_of(shard)(out.reshape(-1).view(np.uint8).data) == run.checksum


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


def _fixed_width(content: npt.NDArray[np.uint8], width: int) -> pa.FixedSizeBinaryArray:
    """Bytes as a fixed-size binary column, without a copy."""
    buffer = pa.py_buffer(content.reshape(-1))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), buffer.size // width, [None, buffer])
