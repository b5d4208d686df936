"""The store, and the tables of embeddings in it: where they are, under which key, and how they survive a kill.

An embedding table holds the embeddings of one encoder with one pooling and dtype. It is a folder of shards and a
manifest:

    <store>/embeddings/<key>/manifest.json        the list of shards, and how they were made; written last
    <store>/embeddings/<key>/shard-00000.parquet  see `shards.py`
    <store>/embeddings/<key>/part-1/              the same, of a worker beside the first, until that takes it over

A shard is written under a temporary name, synced, renamed, and listed in the manifest with its checksums. A file that
is not listed is ignored, and a damaged shard is dropped from the list, never read as data.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout

from pipeline.errors import CacheError
from pipeline.store import shards
from pipeline.store.shards import KEY_BYTES, Entry, Shard, is_damage
from pipeline.store.temporary import remove_abandoned, temporary_folder
from pipeline.store.writing import ShardWriter, disk_errors, next_number, shard_name

if TYPE_CHECKING:
    from pipeline.config.schema import Config

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
        lasting: the folder of what depends on the data alone, where `root` goes after a measurement; else None.
        shared: whether `root` is the same folder for all workers, where there are several.
    """

    root: Path
    dtype: str = "float32"
    memory_bytes: int = 10**9
    max_batch_tokens: int | None = None
    lasting: Path | None = None
    shared: bool = True

    @classmethod
    def from_config(cls, config: Config, root: Path | None = None) -> Store:
        """The store that a configuration describes, in another folder if `root` is given."""
        lasting, limit = Path(config.store), config.max_batch_tokens
        return cls(root or lasting, config.embedding_dtype, config.memory_bytes, limit, lasting)

    def table(self, encoder_digest: str, pooling: str, hidden_size: int, keep: bool = True) -> EmbeddingTable:
        """The table of an encoder's embeddings; `pooling` is `mean` (a row per sequence) or `none` (a row per token).

        Where `keep` is false, because the digest will not be found again, the files are removed with the last object
        that reads them, or, after a kill, by the next program.
        """
        settings = {
            "format": FORMAT,
            "encoder": encoder_digest,
            "pooling": pooling,
            "dtype": self.dtype,
            "hidden_size": hidden_size,
        }
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
        root, cleanup = self.root.expanduser(), ExitStack()
        folder = root if keep else cleanup.enter_context(temporary_folder(root / "live"))
        table = EmbeddingTable(folder / "embeddings" / key, settings)
        weakref.finalize(table, cleanup.close)
        return table

    def clear(self) -> None:
        """Removes unfinished files of killed processes, but not from tables that are being written to.

        Once per program is enough.
        """
        root = self.root.expanduser()
        for name in ("live", "heads", "baselines"):
            remove_abandoned(root / name)
        for folder in {path.parent for path in root.glob("embeddings/*/*.tmp")}:
            with suppress(OSError, Timeout), FileLock(folder / "lock", timeout=0):
                _remove_unlisted(folder)


def sequence_key(sequence: str) -> bytes:
    """The digest that a sequence's rows are stored under."""
    return hashlib.sha256(sequence.encode()).digest()[:KEY_BYTES]


class EmbeddingTable:
    """The stored embeddings of one encoder, pooling and dtype."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Does not touch the disk; the table's key is a digest of `settings`."""
        self.folder = folder
        self.settings: dict[str, Any] = dict(settings)
        self.dtype: np.dtype[Any] = np.dtype(settings["dtype"]).newbyteorder("<")
        self.hidden_size: int = int(settings["hidden_size"])
        self.row_bytes: int = self.hidden_size * self.dtype.itemsize

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes from writing; released by the system when a process dies."""
        lock = FileLock(self.folder / "lock")
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def shards(self) -> list[Shard]:
        """The shards that the manifest lists and whose files have the size that it gives."""
        return _listed(self.folder)

    def index(self) -> dict[bytes, Entry]:
        """Where each stored sequence is; for a sequence that is stored twice, the first place.

        Shards whose own index is damaged are dropped. Hold the lock.
        """
        entries: dict[bytes, Entry] = {}
        for shard in self.shards():
            try:
                found = dict(shards.entries(self.path(shard), shard))
            except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: no hexadecimal digits
                if not is_damage(error):
                    raise CacheError(f"store: '{self.path(shard)}' cannot be read ({error})") from error
                self.drop([shard])
                continue
            for key, entry in found.items():
                entries.setdefault(key, entry)
        return entries

    def keys(self) -> set[bytes]:
        """The keys of the stored sequences, damaged shards left out. Changes nothing, and does not need the lock."""
        found = set[bytes]()
        for shard in self.shards():
            with suppress(pa.ArrowException, OSError, ValueError):  # as in `index`
                found |= dict(shards.entries(self.path(shard), shard)).keys()
        return found

    def drop(self, dropped: Iterable[Shard]) -> None:
        """Takes shards off the manifest's list; the next writer removes their files. Hold the lock."""
        files = {shard.file for shard in dropped}
        self.write_manifest([shard for shard in self.shards() if shard.file not in files])

    def writer(self, made_with: Mapping[str, Any], in_thread: bool = False) -> ShardWriter:
        """A writer of new shards; removes unfinished files first. Hold the lock while it is open.

        Args:
            made_with: how they were made, for the manifest.
            in_thread: whether a thread writes while the caller works.
        """
        with disk_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
        _remove_unlisted(self.folder)
        return ShardWriter(self, made_with, in_thread)

    def part(self, number: int) -> EmbeddingTable:
        """A table within this one, for a worker that writes beside the holder of the lock; see `take_parts`."""
        return EmbeddingTable(self.folder / f"part-{number}", self.settings)

    def take_parts(self) -> None:
        """Takes over the shards of all parts, also of those that killed workers left. Hold the lock."""
        with disk_errors(self.folder):
            for folder in sorted(self.folder.glob("part-*")):
                listed = self.shards()
                for number, shard in enumerate(_listed(folder), next_number(listed)):
                    listed.append(replace(shard, file=shard_name(number)))
                    (folder / shard.file).replace(self.path(listed[-1]))
                self.write_manifest(listed)
                shutil.rmtree(folder)

    def path(self, shard: Shard) -> Path:
        """The shard's file."""
        return self.folder / shard.file

    def write_manifest(self, shards: Sequence[Shard]) -> None:
        """Replaces the list of shards, all at once. Hold the lock."""
        content = json.dumps({**self.settings, "shards": [asdict(shard) for shard in shards]}, indent=1)
        temporary = self.folder / f"manifest.json.{os.getpid()}.tmp"
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(self.folder / "manifest.json")


def _listed(folder: Path) -> list[Shard]:
    """See `EmbeddingTable.shards`."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        listed = [Shard(**shard) for shard in manifest["shards"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # no manifest, or an unreadable one: nothing is stored
    paths = [folder / shard.file for shard in listed]
    return [s for s, path in zip(listed, paths, strict=True) if path.is_file() and path.stat().st_size == s.bytes]


def _remove_unlisted(folder: Path) -> None:
    """Removes the unfinished files of a killed writer from a table's folder. Hold the lock."""
    listed = {shard.file for shard in _listed(folder)}
    for path in (*folder.glob("shard-*"), *folder.glob("manifest.json.*.tmp")):
        if path.name not in listed:
            path.unlink()
