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
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout

from pipeline.errors import CacheError
from pipeline.store import shards
from pipeline.store.shards import KEY_BYTES, Entry, Shard, is_damage
from pipeline.store.temporary import remove_abandoned
from pipeline.store.writing import ShardWriter, writing

# Part of every key: raise it when the same key would no longer give the same embeddings or heads, to the last bit.
FORMAT = 3


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
