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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout

from pipeline.errors import CacheError
from pipeline.store import shards
from pipeline.store.shards import KEY_BYTES, Array, Entry, Shard, is_damage
from pipeline.store.temporary import remove_abandoned

# Part of every key: raise it when the same key would no longer give the same embeddings or heads, to the last bit.
FORMAT = 2
SHARD_BYTES = 2**26
SHARD_TOKENS = 2**17  # tokens embedded, so that a kill loses a bounded amount of work with pooled rows too


@dataclass(frozen=True)
class Store:
    """Where embeddings and heads are kept, and how.

    Attributes:
        root: the folder.
        dtype: `float32` or `float16`, of stored embeddings.
        memory_bytes: embeddings beyond this are read from disk as they are used.
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

    def clear(self) -> None:
        """Removes what killed processes left unfinished, here and on shelves that nobody writes to now."""
        root = self.root.expanduser()
        for name in ("live", "heads"):
            remove_abandoned(root / name)
        for folder in {path.parent for path in root.glob("embeddings/*/*.tmp")}:
            with suppress(OSError, Timeout), FileLock(folder / "lock", timeout=0):
                _remove_uncounted(folder)


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
        self.row_bytes = self.hidden_size * self.dtype.itemsize

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
        return _counted(self.folder)

    def index(self) -> dict[bytes, Entry]:
        """Where each stored sequence is. A sequence stored twice is read where it was stored first."""
        entries: dict[bytes, Entry] = {}
        for shard in self.shards():
            try:
                found = dict(shards.entries(self.path(shard), shard))
            except (pa.ArrowException, OSError, ValueError) as error:  # no hexadecimal digits, say
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

    def writer(self, made_with: Mapping[str, Any], beside: bool = False) -> ShardWriter:
        """A writer of new shards. Hold the lock while it is open; clears away what a killed writer left.

        Args:
            made_with: what the manifest says of how they were made.
            beside: whether to write in a thread, beside the encoder's work.
        """
        _remove_uncounted(self.folder)
        return ShardWriter(self, made_with, beside)

    def path(self, shard: Shard) -> Path:
        """The shard's file."""
        return self.folder / shard.file

    def _write_manifest(self, shards: Sequence[Shard]) -> None:
        content = json.dumps({**self.what, "shards": [asdict(shard) for shard in shards]}, indent=1)
        temporary = self.folder / f"manifest.json.{os.getpid()}.tmp"
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(self.folder / "manifest.json")


class ShardWriter:
    """Takes rows as they come, and writes shards of them. Leaving the context without an error writes what is left.

    Files are synced and counted in a thread, beside the encoder's work. So is all writing where a GPU does that work;
    a CPU would be taken from it, which costs more than the writing does.
    """

    def __init__(self, shelf: Shelf, made_with: Mapping[str, Any], beside: bool) -> None:
        """See `Shelf.writer`."""
        self.shelf = shelf
        self.made_with = made_with
        self.beside = beside
        self._next = 1 + max((int(shard.file[6:11]) for shard in shelf.shards()), default=-1)
        self._file: shards.Writing | None = None
        self._waiting = _Waiting()
        self._bytes = self._tokens = 0  # of the shard so far
        self._thread = ThreadPoolExecutor(1, "shards")
        self._tasks: list[Future[None]] = []

    def __enter__(self) -> Self:
        """Begins."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits for what is being written. Raises CacheError if that failed, unless another error is on its way."""
        try:
            if kind is None:
                self.flush()
                self._wait(0)
        finally:
            self._thread.shutdown()
            if self._file is not None:
                self._file.discard()

    def add(self, keys: Sequence[bytes], unknown: Sequence[int], counts: Sequence[int], rows: Array) -> None:
        """Takes the rows of some sequences one after another, shape (sum of counts, hidden_size).

        Raises:
            CacheError: a value is not a finite number, or is none in the shelf's dtype; or the disk is full.
        """
        with np.errstate(over="ignore"):
            stored = rows.astype(self.shelf.dtype, copy=False)
        if not np.isfinite(stored).all():
            found = "no finite numbers" if not np.isfinite(rows).all() else f"numbers beyond {self.shelf.dtype.name}"
            remedy = "use precision: fp32 and embedding_dtype: float32, or another checkpoint"
            raise CacheError(f"embed: the encoder's hidden states hold {found}; {remedy}")
        self._waiting.add(keys, unknown, counts, stored)
        self._bytes += stored.nbytes
        if self._waiting.bytes >= shards.GROUP_BYTES:
            self._write()

    def count(self, tokens: int) -> None:
        """Counts tokens that the rows were embedded from."""
        self._tokens += tokens

    @property
    def is_full(self) -> bool:
        """Whether there is enough for a shard. Flush between batches, so that a resumed run has the same batches."""
        return self._bytes >= SHARD_BYTES or self._tokens >= SHARD_TOKENS

    def flush(self) -> None:
        """Ends the shard: it is synced, and counted in the manifest. Raises what the last one met."""
        if self._waiting.keys:
            self._write()
        if self._file is not None:
            file, self._file = self._file, None
            self._do(partial(self._finish, file), beside=True)
        self._bytes = self._tokens = 0

    def _write(self) -> None:
        """Has a row group of what waits."""
        some, self._waiting = self._waiting, _Waiting()
        with writing(self.shelf.folder):
            if self._file is None:
                path = self.shelf.folder / f"shard-{self._next:05d}.parquet"
                self._file = shards.Writing(path, self.shelf.hidden_size, self.shelf.dtype, self.made_with)
                self._next += 1
        self._do(partial(some.write, self._file), self.beside)

    def _do(self, work: Callable[[], None], beside: bool) -> None:
        if not beside:
            with writing(self.shelf.folder):
                work()
            return
        self._wait(1)  # so that memory does not grow
        self._tasks.append(self._thread.submit(work))

    def _wait(self, most: int) -> None:
        """Until no more tasks than that are left. Raises CacheError where one failed."""
        while len(self._tasks) > most:
            with writing(self.shelf.folder):
                self._tasks.pop(0).result()

    def _finish(self, file: shards.Writing) -> None:
        try:
            self.shelf._write_manifest([*self.shelf.shards(), file.finish()])
        except BaseException:
            file.discard()
            raise


class _Waiting:
    """Sequences whose rows are not yet written: too few for a row group."""

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self.unknown: list[int] = []
        self.counts: list[int] = []
        self.rows: list[Array] = []
        self.bytes = 0

    def add(self, keys: Sequence[bytes], unknown: Sequence[int], counts: Sequence[int], rows: Array) -> None:
        self.keys += keys
        self.unknown += unknown
        self.counts += counts
        self.rows.append(rows)
        self.bytes += rows.nbytes

    def write(self, file: shards.Writing) -> None:
        rows = self.rows[0] if len(self.rows) == 1 else np.concatenate(self.rows)
        file.add(self.keys, self.unknown, self.counts, rows)


def _counted(folder: Path) -> list[Shard]:
    """The shards of a shelf that count: listed in the manifest, and there with the size it gives."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        listed = [Shard(**shard) for shard in manifest["shards"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # no manifest, or one that is no longer readable: nothing is stored
    return [shard for shard in listed if _size(folder / shard.file) == shard.bytes]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _remove_uncounted(folder: Path) -> None:
    """Removes what a killed writer left on a shelf. Hold the lock."""
    kept = {shard.file for shard in _counted(folder)}
    for path in (*folder.glob("shard-*"), *folder.glob("manifest.json.*.tmp")):
        if path.name not in kept:
            path.unlink()


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns what the disk has to say into a CacheError."""
    try:
        yield
    except OSError as error:
        raise CacheError(f"store: '{folder}' cannot be written ({error}); set store to another folder") from error
