"""The Parquet store of embeddings: what is kept, under which key, and how it survives a kill.

A *shelf* holds the embeddings of one encoder with one pooling and dtype. It is a folder of shards and a manifest:

    <store>/embeddings/<key>/manifest.json        which shards count, and how they were made; written last
    <store>/embeddings/<key>/shard-00000.parquet  see `shards.py`

A shard is written under a temporary name, synced, renamed, and counted in the manifest with its checksum; what the
manifest does not count does not exist, and a damaged shard is dropped, never read as data.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from filelock import FileLock

from pipeline import shards
from pipeline.errors import CacheError
from pipeline.shards import KEY_BYTES, Array, Collected, Entry, Shard, is_damage

FORMAT = 1  # part of every key: raise it when the same key would no longer give the same embeddings
SHARD_BYTES = 16 * 2**20  # a shard is held three times while it is written; memory used again is faster than new
SHARD_TOKENS = 2**17  # tokens embedded, so that a kill loses a bounded amount of work with pooled rows too


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
                found = dict(shards.entries(self.path(shard), shard))
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

    def _write_manifest(self, shards: Sequence[Shard]) -> None:
        content = json.dumps({**self.what, "shards": [asdict(shard) for shard in shards]}, indent=1)
        temporary = self.folder / f"manifest.json.{os.getpid()}.tmp"
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(self.folder / "manifest.json")


class ShardWriter:
    """Collects rows and writes a shard whenever enough are there, in a thread, beside the encoder's work.

    At most one shard waits to be written while the next is collected, so that memory does not grow. Leaving the
    context without an error writes what is left.
    """

    def __init__(self, shelf: Shelf, made_with: Mapping[str, Any]) -> None:
        """See `Shelf.writer`."""
        self.shelf = shelf
        self.made_with = made_with
        self._collected = Collected()
        self._thread = ThreadPoolExecutor(1, "shards")
        self._written: Future[None] | None = None

    def __enter__(self) -> Self:
        """Begins."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits for what is being written. Raises CacheError if that failed, unless another error is on its way."""
        try:
            if kind is None:
                self.flush()
                self._wait()
        finally:
            self._thread.shutdown()

    def add(self, keys: Sequence[bytes], unknown: Sequence[int], counts: Sequence[int], rows: Array) -> None:
        """Takes the rows of some sequences one after another, shape (sum of counts, hidden_size).

        Raises:
            CacheError: a value is not a finite number, or is none in the shelf's dtype.
        """
        with np.errstate(over="ignore"):
            stored = rows.astype(self.shelf.dtype, copy=False)
        if not np.isfinite(stored).all():
            found = "no finite numbers" if not np.isfinite(rows).all() else f"numbers beyond {self.shelf.dtype.name}"
            remedy = "use precision: fp32 and embedding_dtype: float32, or another checkpoint"
            raise CacheError(f"embed: the encoder's hidden states hold {found}; {remedy}")
        collected = self._collected
        collected.keys += keys
        collected.unknown += unknown
        collected.counts += counts
        collected.rows.append(stored)
        collected.bytes += stored.nbytes

    def count(self, tokens: int) -> None:
        """Counts tokens that the rows were embedded from."""
        self._collected.tokens += tokens

    @property
    def is_full(self) -> bool:
        """Whether there is enough for a shard. Flush between batches, so that a resumed run has the same batches."""
        return self._collected.bytes >= SHARD_BYTES or self._collected.tokens >= SHARD_TOKENS

    def flush(self) -> None:
        """Has what was collected written as a shard, and counted in the manifest. Raises what the last one met."""
        self._wait()
        if self._collected.keys:
            self._written = self._thread.submit(self._write, self._collected)
            self._collected = Collected()

    def _wait(self) -> None:
        if self._written is not None:
            self._written.result()

    def _write(self, collected: Collected) -> None:
        sequences, table = len(collected.keys), collected.table()
        with writing(self.shelf.folder):
            known = self.shelf.shards()
            number = 1 + max((int(shard.file[6:11]) for shard in known), default=-1)
            final = self.shelf.folder / f"shard-{number:05d}.parquet"
            temporary = final.with_suffix(".tmp")
            checksum = shards.write(table, temporary)
            size = temporary.stat().st_size
            temporary.replace(final)
            shard = Shard(final.name, size, checksum, table.num_rows, sequences, dict(self.made_with))
            self.shelf._write_manifest([*known, shard])


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns what the disk has to say into a CacheError."""
    try:
        yield
    except OSError as error:
        raise CacheError(f"store: '{folder}' cannot be written ({error}); set store to another folder") from error
