"""Rows to shards, and what the disk has to say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from pipeline.errors import CacheError
from pipeline.store import shards
from pipeline.store.shards import Array

if TYPE_CHECKING:
    from pipeline.store.shelf import Shelf

SHARD_BYTES = 2**26
SHARD_TOKENS = 2**17  # tokens embedded, so that a kill loses a bounded amount of work with pooled rows too


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


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns what the disk has to say into a CacheError."""
    try:
        yield
    except OSError as error:
        raise CacheError(f"store: '{folder}' cannot be written ({error}); set store to another folder") from error
