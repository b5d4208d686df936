"""Writing embeddings: rows are gathered, and written as shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from pipeline.errors import CacheError
from pipeline.store import shards
from pipeline.store.shards import Array, Shard, ShardFile

if TYPE_CHECKING:
    from pipeline.store.embedding_table import EmbeddingTable

SHARD_BYTES = 2**26
SHARD_TOKENS = 2**17  # tokens embedded: a kill loses a bounded amount of work, with pooled rows too

Added = tuple[Sequence[bytes], Sequence[int], Sequence[int], Array]  # what `ShardWriter.add` takes


class ShardWriter:
    """Takes rows as they come, and writes shards of them. Leaving the context without an error writes the rest.

    A thread syncs finished files and lists them in the manifest while the encoder works. With the encoder on a GPU it
    writes all; on a CPU that would cost the encoder more time than the writing takes.
    """

    def __init__(self, table: EmbeddingTable, made_with: Mapping[str, Any], in_thread: bool) -> None:
        """See `EmbeddingTable.writer`."""
        self.table = table
        self.made_with = made_with
        self.in_thread = in_thread
        self._next = next_number(table.shards())
        self._file: ShardFile | None = None
        self._buffer: list[Added] = []  # too few yet for a row group
        self._buffer_bytes = self._bytes = self._tokens = 0  # the latter two of the whole shard
        self._thread = ThreadPoolExecutor(1, "shards")
        self._tasks: list[Future[None]] = []

    def __enter__(self) -> Self:
        """Begins."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits for the writing. Raises CacheError if that failed, unless another error is on its way."""
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
            CacheError: a value is not a finite number, or is none in the table's dtype; or the disk is full.
        """
        with np.errstate(over="ignore"):
            stored = rows.astype(self.table.dtype, copy=False)
        if not np.isfinite(stored).all():
            found = "no finite numbers" if not np.isfinite(rows).all() else f"numbers beyond {self.table.dtype.name}"
            remedy = "use precision: fp32 and embedding_dtype: float32, or another checkpoint"
            raise CacheError(f"embed: the encoder's hidden states hold {found}; {remedy}")
        self._buffer.append((keys, unknown, counts, stored))
        self._buffer_bytes += stored.nbytes
        self._bytes += stored.nbytes
        if self._buffer_bytes >= shards.GROUP_BYTES:
            self._write_buffer()

    def count(self, tokens: int) -> None:
        """Counts tokens that the rows were embedded from."""
        self._tokens += tokens

    @property
    def is_full(self) -> bool:
        """Whether there is enough for a shard. Flush between batches, so that a resumed run has the same batches."""
        return self._bytes >= SHARD_BYTES or self._tokens >= SHARD_TOKENS

    def flush(self) -> None:
        """Ends the shard, syncs it and lists it in the manifest. Raises CacheError where the last one failed."""
        if self._buffer:
            self._write_buffer()
        if self._file is not None:
            file, self._file = self._file, None
            self._run(partial(self._finish, file), in_thread=True)
        self._bytes = self._tokens = 0

    def _write_buffer(self) -> None:
        """Writes the buffered rows as a row group."""
        buffer, self._buffer, self._buffer_bytes = self._buffer, [], 0
        with disk_errors(self.table.folder):
            if self._file is None:
                path = self.table.folder / shard_name(self._next)
                self._file = ShardFile(path, self.table.hidden_size, self.table.dtype, self.made_with)
                self._next += 1
        self._run(partial(_write, self._file, buffer), self.in_thread)

    def _run(self, work: Callable[[], None], in_thread: bool) -> None:
        if not in_thread:
            with disk_errors(self.table.folder):
                work()
            return
        self._wait(1)  # so that memory does not grow
        self._tasks.append(self._thread.submit(work))

    def _wait(self, most: int) -> None:
        """Waits until at most that many tasks are left. Raises CacheError where a task failed."""
        while len(self._tasks) > most:
            with disk_errors(self.table.folder):
                self._tasks.pop(0).result()

    def _finish(self, file: ShardFile) -> None:
        try:
            self.table.write_manifest([*self.table.shards(), file.finish()])
        except BaseException:
            file.discard()
            raise


def shard_name(number: int) -> str:
    """The name of a shard's file."""
    return f"shard-{number:05d}.parquet"


def next_number(listed: Sequence[Shard]) -> int:
    """The number of the next shard."""
    return 1 + max((int(shard.file[6:11]) for shard in listed), default=-1)


def _write(file: ShardFile, buffer: Sequence[Added]) -> None:
    keys, unknown, counts, rows = zip(*buffer, strict=True)
    whole = rows[0] if len(rows) == 1 else np.concatenate(rows)
    file.add(list(chain(*keys)), list(chain(*unknown)), list(chain(*counts)), whole)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns an error of the disk into a CacheError."""
    try:
        yield
    except OSError as error:
        raise CacheError(f"store: '{folder}' cannot be written ({error}); set store to another folder") from error
