"""The journal: what is logged to MLflow is written to a local file first, so that nothing waits for a server.

A record is a line of JSON. `tracking.sender` sends the records in order, and notes in a second file how many bytes have
been sent. The journal names a run by a key of its own, since the server gives the id later.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import Timeout

from pipeline.store.temporary import link_folder
from pipeline.tracking.journal_owner import writer_lock, writer_tags

Record = dict[str, Any]
logger = logging.getLogger(__name__)


class Journal:
    """A file of JSON lines that is only ever appended to, and a folder beside it with the runs' artifacts.

    The program that writes it holds a lock until `close()`. The first record that cannot be written, such as on a full
    disk, causes a warning.
    """

    def __init__(self, path: Path, uri: str = "", remove: bool = False, write: bool = True) -> None:
        """Opens the journal at `path`, or makes a new journal for the server or database at `uri`.

        Args:
            path: the file.
            uri: where the records are for.
            remove: whether it is removed when everything has arrived; noted for the program that replays it.
            write: false where it is only read, and nothing is appended.

        Raises:
            OSError: it can be neither read nor made, or another program writes it.
        """
        self.path = path
        self.files: Path = path.with_suffix(".files")
        self.listener: Callable[[], None] = lambda: None  # called after each record
        self.runs: dict[str, Record] = {}  # the last beginning of each run
        self.lost: int = 0  # records that could not be written
        self._lock = threading.Lock()
        if write:
            self._begin(uri, remove)
        self.runs = {record["run"]: record for record, _ in self.read() if record["op"] == "run"}

    def _begin(self, uri: str, remove: bool) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(writer_lock(self.path))
            except Timeout as error:
                raise OSError(errno.EBUSY, "another program writes this journal") from error
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)  # a URI may hold a password
            self._stream = stack.enter_context(os.fdopen(descriptor, "ab"))
            self.close: weakref.finalize[[], Journal] = weakref.finalize(self, stack.pop_all().close)
        self.close.atexit = False  # the rest is sent at exit, and the lock is held until then
        if not self.end:
            self.append({"op": "journal", "uri": uri, "remove": remove, "tags": writer_tags(self.path)})
            return
        with self.path.open("rb") as stream:
            stream.seek(self.end - 1)
            if stream.read() != b"\n":  # torn by a kill
                self._stream.write(b"\n")
                self._stream.flush()

    @property
    def end(self) -> int:
        """The length of the file in bytes; 0 where it has been removed, since all of it had arrived."""
        try:
            return self.path.stat().st_size
        except OSError:
            return 0

    @property
    def sent(self) -> int:
        """How many bytes have arrived, or were refused."""
        return self._progress()[0]

    @property
    def refused(self) -> int:
        """How many records were refused: then the journal is not removed."""
        return self._progress()[1]

    def _progress(self) -> tuple[int, int]:
        try:
            sent, _, refused = self.path.with_suffix(".sent").read_text().partition(" ")
            return int(sent), int(refused or 0)
        except (OSError, ValueError):
            return 0, 0

    def note_sent(self, offset: int, refused: int) -> None:
        """Notes how many bytes have arrived, and how many records more were refused."""
        refused += self.refused
        with suppress(OSError):  # on a full disk some records are sent once more, which does no harm
            temporary = self.path.with_suffix(".sent.tmp")
            temporary.write_text(f"{offset} {refused}" if refused else str(offset))
            temporary.replace(self.path.with_suffix(".sent"))

    @property
    def head(self) -> Record:
        """The first record: where the journal is for, and which process made it."""
        return next((record for record, _ in self.read() if record["op"] == "journal"), {})

    def append(self, record: Record) -> None:
        """Adds a record."""
        line = json.dumps(record, separators=(",", ":"), default=str).encode() + b"\n"
        if record["op"] == "run":
            self.runs[record["run"]] = record
        with self._lock, self._warns():
            self._stream.write(line)
            self._stream.flush()
        self.listener()

    def keep(self, source: Path | str, name: str) -> str | None:
        """Copies a file or a folder, or writes a text. Returns the copy's name within `files`; None if that failed."""
        kept = f"{os.urandom(8).hex()}/{name}"
        with self._warns():
            path = self.files / kept
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, Path) and source.is_dir():
                link_folder(source, path)
            elif isinstance(source, Path):
                shutil.copyfile(source, path)
            else:
                path.write_text(source, encoding="utf-8")
            return kept
        return None

    def read(self, offset: int = 0) -> Iterator[tuple[Record, int]]:
        """The complete records from `offset` on, each with the offset behind it; a line that is none has op `torn`."""
        if not self.path.exists():
            return
        with self.path.open("rb") as stream:
            stream.seek(offset)
            for line in stream:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                try:
                    record = json.loads(line)
                except ValueError:
                    record = None
                yield (record if isinstance(record, dict) and "op" in record else {"op": "torn"}), offset

    def drop(self, records: Sequence[Record]) -> None:
        """Removes the copies of files that have arrived."""
        for record in records:
            if record["op"] in ("artifact", "served"):
                shutil.rmtree((self.files / record["file"]).parent, ignore_errors=True)

    @contextmanager
    def _warns(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            if not self.lost:
                logger.warning("the journal '%s' cannot be written, results are not logged: %s", self.path, error)
            self.lost += 1
