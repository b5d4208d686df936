"""The Parquet store of embeddings: what is kept, under which key, and how it survives a kill.

A *shelf* holds the embeddings of one encoder with one pooling and dtype. It is a folder of shards and a manifest:

    <store>/embeddings/<key>/manifest.json        which shards count, and how they were made; written last
    <store>/embeddings/<key>/shard-00000.parquet  one row per token (or per sequence, pooled)

A shard has the columns `key` (digest of the row's sequence), `unknown` (its unknown tokens) and `hidden` (the vector's
bytes, little-endian). It is written under a temporary name, synced, renamed, and counted in the manifest; what the
manifest does not count does not exist. Pages carry checksums, and a damaged shard is dropped, never read as data.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from pipeline.errors import CacheError

KEY_BYTES = 16
FORMAT = 1  # part of every key: raise it when the same key would no longer give the same embeddings
# A row group is one data page (pyarrow breaks pages at 20,000 rows), so that its rows lie in one run of bytes.
ROW_GROUP = 16_384
SHARD_BYTES = 64 * 2**20
SHARD_TOKENS = 2**17  # tokens embedded, so that a kill loses a bounded amount of work with pooled rows too


@dataclass(frozen=True)
class Shard:
    """A finished shard, as the manifest counts it."""

    file: str
    bytes: int
    rows: int
    sequences: int
    made_with: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """Where a sequence's rows are: shard, first row, number of rows; and how many of its tokens are unknown."""

    shard: Shard
    start: int
    count: int
    unknown: int


class DamagedShardError(CacheError):
    """A shard is not what the manifest says. It is dropped, and its sequences are embedded again."""

    def __init__(self, shard: Shard, reason: str) -> None:
        """Names the shard."""
        super().__init__(f"store: shard {shard.file} is damaged ({reason}); delete the store to start afresh")
        self.shard = shard


@dataclass(frozen=True)
class Store:
    """Where embeddings and heads are kept, and how.

    Attributes:
        root: the folder.
        dtype: `float32` or `float16`, of stored embeddings.
        memory_bytes: embeddings of a part beyond this are read from disk as they are used.
        max_batch_tokens: token budget of an embedding batch; None for the default of the kind of device.
    """

    root: Path
    dtype: str = "float32"
    memory_bytes: int = 10**9
    max_batch_tokens: int | None = None

    def shelf(self, encoder_digest: str, pooling: str, hidden_size: int) -> Shelf:
        """The shelf of an encoder; `pooling` is `mean` or `none`."""
        what = {
            "format": FORMAT,
            "encoder": encoder_digest,
            "pooling": pooling,
            "dtype": self.dtype,
            "hidden_size": hidden_size,
        }
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]
        return Shelf(self.root.expanduser() / "embeddings" / key, what)


def sequence_key(sequence: str) -> bytes:
    """The digest that a sequence's rows are stored under."""
    return hashlib.sha256(sequence.encode()).digest()[:KEY_BYTES]


def is_damage(error: Exception) -> bool:
    """Whether an error in reading means that the file is not what was written; too many open files, say, do not.

    pyarrow reports a wrong checksum as an OSError without a number.
    """
    return not isinstance(error, OSError) or error.errno in (None, errno.ENOENT, errno.EIO)


class Shelf:
    """The embeddings of one encoder, pooling and dtype."""

    def __init__(self, folder: Path, what: Mapping[str, Any]) -> None:
        """Does not touch the disk."""
        self.folder = folder
        self.what = dict(what)
        self.dtype = np.dtype(what["dtype"]).newbyteorder("<")
        self.hidden_size = int(what["hidden_size"])

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes from writing; released by the system when a process dies."""
        lock = FileLock(self.folder / "lock")
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def shards(self) -> list[Shard]:
        """The shards that count: listed in the manifest, and there with the size it gives."""
        try:
            manifest = json.loads((self.folder / "manifest.json").read_bytes())
            listed = [Shard(**shard) for shard in manifest["shards"]]
        except (OSError, ValueError, KeyError, TypeError):
            return []  # no manifest, or one that is no longer readable: nothing is stored
        return [shard for shard in listed if self._size(shard) == shard.bytes]

    def index(self) -> dict[bytes, Entry]:
        """Where each stored sequence is. A sequence stored twice is read where it was stored first."""
        entries: dict[bytes, Entry] = {}
        for shard in self.shards():
            try:
                found = dict(self._entries(shard))
            except (pa.ArrowException, OSError) as error:
                if not is_damage(error):
                    raise CacheError(f"store: '{self.path(shard)}' cannot be read ({error})") from error
                self.drop(shard)
                continue
            for key, entry in found.items():
                entries.setdefault(key, entry)
        return entries

    def drop(self, shard: Shard) -> None:
        """Takes a shard out of the manifest; its file goes with the next writer."""
        self._write_manifest([kept for kept in self.shards() if kept != shard])

    def writer(self, made_with: Mapping[str, Any]) -> ShardWriter:
        """A writer of new shards. Hold the lock while it is open; clears away what a killed writer left."""
        kept = {shard.file for shard in self.shards()}
        for path in self.folder.glob("shard-*"):
            if path.name not in kept:
                path.unlink()
        return ShardWriter(self, made_with)

    def path(self, shard: Shard) -> Path:
        """The shard's file."""
        return self.folder / shard.file

    def _size(self, shard: Shard) -> int:
        try:
            return self.path(shard).stat().st_size
        except OSError:
            return -1

    def _entries(self, shard: Shard) -> Iterator[tuple[bytes, Entry]]:
        table = pq.read_table(self.path(shard), columns=["key", "unknown"], page_checksum_verification=True)
        keys = np.frombuffer(table["key"].combine_chunks().buffers()[1], dtype=f"V{KEY_BYTES}")
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        counts = np.diff(np.append(starts, len(keys)))
        unknown = table["unknown"].to_numpy()
        for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
            yield keys[start].tobytes(), Entry(shard, start, count, int(unknown[start]))

    def _write_manifest(self, shards: Sequence[Shard]) -> None:
        content = json.dumps({**self.what, "shards": [asdict(shard) for shard in shards]}, indent=1)
        temporary = self.folder / f"manifest.json.{os.getpid()}.tmp"
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(content)
            _sync(stream.fileno())
        temporary.replace(self.folder / "manifest.json")


class ShardWriter:
    """Collects rows and writes a shard whenever enough are there, so that memory does not grow."""

    def __init__(self, shelf: Shelf, made_with: Mapping[str, Any]) -> None:
        """See `Shelf.writer`."""
        self.shelf = shelf
        self.made_with = made_with
        self._clear()

    def add(self, key: bytes, unknown: int, rows: npt.NDArray[np.float32], tokens: int) -> None:
        """Takes the rows of a sequence, shape (count, hidden_size), embedded from `tokens` tokens.

        Raises:
            CacheError: a value is not a finite number, or is none in the shelf's dtype.
        """
        with np.errstate(over="ignore"):
            stored = rows.astype(self.shelf.dtype, copy=False)
        if not np.isfinite(stored).all():
            found = "no finite numbers" if not np.isfinite(rows).all() else f"numbers beyond {self.shelf.dtype.name}"
            remedy = "use precision: fp32 and embedding_dtype: float32, or another checkpoint"
            raise CacheError(f"embed: the encoder's hidden states hold {found}; {remedy}")
        self._keys.append(key)
        self._unknown.append(unknown)
        self._rows.append(stored)
        self._bytes += self._rows[-1].nbytes
        self._tokens += tokens

    @property
    def is_full(self) -> bool:
        """Whether there is enough for a shard. Flush between batches, so that a resumed run has the same batches."""
        return self._bytes >= SHARD_BYTES or self._tokens >= SHARD_TOKENS

    def flush(self) -> None:
        """Writes what was collected as a shard and counts it in the manifest."""
        if not self._keys:
            return
        with writing(self.shelf.folder):
            self._write_shard(self._table())
        self._clear()

    def _write_shard(self, table: pa.Table) -> None:
        shards = self.shelf.shards()
        number = 1 + max((int(shard.file[6:11]) for shard in shards), default=-1)
        final = self.shelf.folder / f"shard-{number:05d}.parquet"
        temporary = final.with_suffix(".tmp")
        pq.write_table(
            table,
            temporary,
            row_group_size=ROW_GROUP,
            compression="NONE",
            use_dictionary=["key", "unknown"],
            write_statistics=False,
            data_page_size=2**30,
            write_page_checksum=True,
        )
        with temporary.open("rb+") as stream:
            _sync(stream.fileno())
        temporary.replace(final)
        shard = Shard(final.name, final.stat().st_size, table.num_rows, len(self._keys), dict(self.made_with))
        self.shelf._write_manifest([*shards, shard])

    def _clear(self) -> None:
        self._keys: list[bytes] = []
        self._unknown: list[int] = []
        self._rows: list[npt.NDArray[Any]] = []
        self._bytes = self._tokens = 0

    def _table(self) -> pa.Table:
        counts = [len(rows) for rows in self._rows]
        keys = np.repeat(np.frombuffer(b"".join(self._keys), dtype=f"V{KEY_BYTES}"), counts)
        hidden = np.concatenate(self._rows)
        self._rows.clear()
        width = hidden.shape[1] * hidden.itemsize
        columns = {
            "key": _fixed_width(keys, KEY_BYTES),
            "unknown": pa.array(np.repeat(np.array(self._unknown, dtype=np.int32), counts)),
            "hidden": _fixed_width(hidden, width),
        }
        fields = [pa.field(name, column.type, nullable=False) for name, column in columns.items()]
        layout = {"dtype": self.shelf.dtype.str, "hidden_size": str(hidden.shape[1])}
        return pa.Table.from_arrays(list(columns.values()), schema=pa.schema(fields, metadata=layout))


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns what the disk has to say into a CacheError."""
    try:
        yield
    except OSError as error:
        raise CacheError(f"store: '{folder}' cannot be written ({error}); set store to another folder") from error


def _fixed_width(array: npt.NDArray[Any], width: int) -> pa.FixedSizeBinaryArray:
    """The rows of `array` as a fixed-size binary column, without a copy."""
    buffer = pa.py_buffer(np.ascontiguousarray(array).view(np.uint8).reshape(-1))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(array), [None, buffer])


def _sync(descriptor: int) -> None:
    """Has the system write a file to disk, so that a rename never outruns its content."""
    os.fsync(descriptor)
