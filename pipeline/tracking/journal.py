"""The journal: what MLflow is to be told, written to a local file first, so that nothing waits for a server.

A record is a line of JSON. `tracking.sender` sends the records on, in order, and notes how far it has come in a second
file; a run has a key of the journal's, since its id is the server's to give, later.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from pipeline.tracking import Data
from pipeline.tracking.process import remove_journal, writer_lock, writer_tags

Record = dict[str, Any]
logger = logging.getLogger(__name__)

NOTE = "mlflow.note.content"


class Journal:
    """A file of JSON lines that is only ever appended to, and a folder beside it with the files that runs keep.

    Whoever writes it holds a lock until `close()`. What cannot be written, on a full disk say, is warned of once.
    """

    def __init__(self, path: Path, uri: str = "", remove: bool = False, write: bool = True) -> None:
        """Opens the journal at `path`, or makes one whose records are for the server or database at `uri`.

        Args:
            path: the file.
            uri: where the records are for.
            remove: for whoever replays it: it was to go when everything had arrived.
            write: false where it is only read, and nothing is appended.

        Raises:
            OSError: it can be neither read nor made, or another program writes it.
        """
        self.path = path
        self.files = path.with_suffix(".files")
        self.listener: Callable[[], None] = lambda: None  # called after each record
        self.runs: dict[str, Record] = {}  # the last beginning of each run
        self.lost = 0  # records that could not be written
        self._lock = threading.Lock()
        if write:
            self._begin(uri, remove)
        self.runs = {record["run"]: record for record, _ in self.read() if record["op"] == "run"}

    def _begin(self, uri: str, remove: bool) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        held = writer_lock(self.path)
        try:
            held.acquire()
        except Timeout as error:
            raise OSError(errno.EBUSY, "another program writes this journal") from error
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)  # a URI may hold a password
        except OSError:
            held.release()
            raise
        self._stream = os.fdopen(descriptor, "ab")
        self.close = weakref.finalize(self, _close, self._stream, held)
        self.close.atexit = False  # what is left is sent at exit, and until then the program lives
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
        """The length of the file in bytes; 0 where it is gone, since all of it had arrived."""
        try:
            return self.path.stat().st_size
        except OSError:
            return 0

    @property
    def sent(self) -> int:
        """How many bytes of it have arrived, or were refused."""
        return self._noted[0]

    @property
    def refused(self) -> int:
        """How many records were refused: it stays for their sake."""
        return self._noted[1]

    @property
    def _noted(self) -> tuple[int, int]:
        try:
            sent, _, refused = self.path.with_suffix(".sent").read_text().partition(" ")
            return int(sent), int(refused or 0)
        except (OSError, ValueError):
            return 0, 0

    def note_sent(self, offset: int, refused: int) -> None:
        """Notes how many bytes have arrived, and how many records more were refused."""
        refused += self.refused
        with contextlib.suppress(OSError):  # on a full disk some records are sent once more, which does no harm
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
        with self._lock, self._said():
            self._stream.write(line)
            self._stream.flush()
        self.listener()

    def keep(self, source: Path | str, name: str) -> str | None:
        """Keeps a copy of a file, or a text, and gives the name of the copy within `files`; None if it cannot."""
        kept = f"{os.urandom(8).hex()}/{name}"
        with self._said():
            path = self.files / kept
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, Path):
                shutil.copyfile(source, path)
            else:
                path.write_text(source, encoding="utf-8")
            return kept
        return None

    def read(self, offset: int = 0) -> Iterator[tuple[Record, int]]:
        """The whole records from `offset` on, each with the offset behind it; what is no record has the op `torn`."""
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
            if record["op"] == "artifact":
                shutil.rmtree((self.files / record["file"]).parent, ignore_errors=True)

    def remove(self) -> None:
        """Removes the journal and what belongs to it."""
        remove_journal(self.path)

    @contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            if not self.lost:
                logger.warning("the journal '%s' cannot be written, results are not logged: %s", self.path, error)
            self.lost += 1


class JournalRun:
    """A run as far as the journal knows it. A `Tracker`; its steps are nested runs. No call waits for a server.

    Attributes:
        key: the run's, in the journal; on the server it is the tag `pipeline.journal`.
    """

    def __init__(self, journal: Journal, key: str, context: Mapping[str, str]) -> None:
        """The run must be in the journal already; see `begin`."""
        self.journal = journal
        self.key = key
        self.context = context
        self.model: str | None = None
        self.ended: str | None = None
        self._notes: list[str] = []

    @classmethod
    def begin(
        cls,
        journal: Journal,
        key: str | None = None,
        context: Mapping[str, str] | None = None,
        mine: bool = True,
        **what: Any,
    ) -> JournalRun:
        """Begins a run, or goes on with the one that has this key.

        Args:
            journal: where it is written.
            key: of a run that is to be continued.
            context: tags of the run and of those nested in it, such as who began it.
            mine: it ends with this process.
            what: `name`; `parent`, the key of another run; `run_id` of a run that is on the server already;
                `experiment`, the name or the id of its experiment.
        """
        run = cls(journal, key or uuid.uuid4().hex, context or {})
        tags = {**run.context, **writer_tags(journal.path)} if mine else {}
        run._write("run", tags=tags, time=now(), **what)
        return run

    @contextmanager
    def step(self, name: str) -> Iterator[JournalRun]:
        """See `Tracker.step`. The nested run ends as FINISHED, FAILED or KILLED; its metrics are linked to no model."""
        child = JournalRun.begin(self.journal, context=self.context, name=name, parent=self.key)
        with child.ending():
            yield child

    def metrics(self, values: Mapping[str, float], step: int = 0, data: Data | None = None) -> None:
        """See `Tracker.metrics`. On a run with a checkpoint, the metrics are linked to it too."""
        numbers = {key: float(value) for key, value in values.items()}
        on = [dataset_name(data), data.digest[:16]] if data else None
        self._write("metrics", values=numbers, step=step, time=now(), model=self.model, data=on)

    def artifact(self, path: Path, folder: str = "", step: int = 0) -> None:  # noqa: ARG002
        """See `Tracker.artifact`."""
        self._file(path, path.name, folder)

    def text(self, content: str, name: str) -> None:
        """A text artifact; `name` may have folders in it."""
        folder, _, file = name.rpartition("/")
        self._file(content, file, folder)

    def rename(self, name: str) -> None:
        """Gives the run another name."""
        self._write("name", name=name)

    def note(self, text: str) -> None:
        """See `Tracker.note`. Notes are the run's description."""
        self._notes.append(text)
        self.describe("\n".join(f"- {note}" for note in self._notes))

    def data(self, data: Data) -> None:
        """See `Tracker.data`."""
        self._write("data", data={**asdict(data), "name": dataset_name(data)})

    def parameters(self, values: Mapping[str, Any], prefix: str = "cfg.") -> None:
        """Nested settings as `cfg.<key>`: MLproject's own parameters are logged by `mlflow run`, under their names."""
        flat = {clean(f"{prefix}{key}"): str(value)[:6000] for key, value in _flatten(values)}
        self._write("parameters", values=flat)

    def tags(self, values: Mapping[str, str]) -> None:
        """Tags of the run."""
        self._write("tags", values={key: value[:8000] for key, value in values.items()})

    def describe(self, markdown: str) -> None:
        """The description on the run's page."""
        self.tags({NOTE: markdown})

    def checkpoint(self, name: str, digest: str, source: str, step: int | None = None) -> None:
        """Links the run's metrics from here on to the LoggedModel of what is measured, made if it is not there yet."""
        self.model = digest
        self._write("model", name=name, digest=digest, source=source, step=step)

    def end(self, status: str) -> None:
        """Ends the run: FINISHED, FAILED or KILLED."""
        if status != self.ended:
            self._write("end", status=status, time=now())
        self.ended = status

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Ends the run with the status that the exception, if there is one, calls for."""
        try:
            yield
        except Exception as error:
            self.describe(f"**Failed:** {error}")
            self.end("FAILED")
            raise
        except BaseException:
            self.end("KILLED")
            raise
        self.end(self.ended or "FINISHED")

    def _file(self, source: Path | str, name: str, folder: str) -> None:
        kept = self.journal.keep(source, name)
        if kept is not None:
            self._write("artifact", file=kept, folder=folder)

    def _write(self, op: str, **what: Any) -> None:
        self.journal.append({"op": op, "run": self.key, **what})


def _close(stream: BinaryIO, held: FileLock) -> None:
    stream.close()
    held.release()


def dataset_name(data: Data) -> str:
    """What MLflow calls a part of a task's data."""
    return f"{data.name} {data.part}"


def clean(name: str) -> str:
    """A name that MLflow takes: with `_` for every character that it refuses, and no longer than it takes.

    >>> clean("/a//b@c/")
    'a/b_c'
    """
    return re.sub(r"/+", "/", re.sub(r"[^\w./ :-]", "_", name)).strip("/")[:250] or "_"


def now() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)


def _flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, (Mapping, list)) and values:
        items = values.items() if isinstance(values, Mapping) else enumerate(values)
        for key, value in items:
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values
