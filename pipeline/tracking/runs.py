"""Opens runs: the journal, and the thread that sends it to MLflow."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.tracking.context.registry import resolve_tags

from pipeline.config.schema import Config
from pipeline.errors import TrackingError
from pipeline.store.temporary import host_mark, nearest
from pipeline.tracking.client import connect, shown
from pipeline.tracking.earlier_runs import catch_up
from pipeline.tracking.journal import Journal
from pipeline.tracking.journal_run import JournalRun
from pipeline.tracking.mlflow import MlflowSink
from pipeline.tracking.sender import LIMIT, Sender

LIMIT_INTERRUPTED = 5.0  # seconds
_senders: WeakValueDictionary[Path, Sender] = WeakValueDictionary()


class OpenRun:
    """A run, and the thread that sends it.

    Attributes:
        run: the tracker to log to.
        uri: of the server or database.
        sender: sends the run's journal.
    """

    def __init__(self, path: Path, uri: str = "", remove: bool = False, key: str | None = None, **what: Any) -> None:
        """Begins a run, or continues the run of a journal that exists already.

        Args:
            path: the journal.
            uri: by default, the tracking server or database in force.
            remove: removes the journal when everything has arrived.
            key: of a run that is to be continued.
            what: see `JournalRun.begin`.

        Raises:
            OSError: the journal cannot be written.
        """
        self.uri = uri or mlflow.get_tracking_uri()
        self.sender = _sender(path, self.uri, remove)
        journal = self.sender.journal
        key = key or next(iter(journal.runs), None)
        mine = what.pop("mine", not what.get("run_id"))
        chosen = os.environ.get("MLFLOW_EXPERIMENT_ID")  # `mlflow.set_experiment` sets it too
        experiment = {"name": None if chosen else os.environ.get("MLFLOW_EXPERIMENT_NAME"), "id": chosen}
        self.run = JournalRun.begin(journal, key, resolve_tags(), mine, **{"experiment": experiment, **what})

    @property
    def ids(self) -> tuple[str, str] | None:
        """Ids of the experiment and of the run on the server; None as long as the server does not have it."""
        sink = self.sender.sink
        if not isinstance(sink, MlflowSink) or self.run.key not in sink.ids:
            return None
        return sink.experiments[self.run.key], sink.ids[self.run.key]


def _sender(path: Path, uri: str, remove: bool) -> Sender:
    """The sender of a journal; a process has one for each journal."""
    place = path.absolute()
    known = _senders.get(place)
    if known is None or known.ended:
        journal = Journal(path, uri, remove)
        first = partial(catch_up, place.parent, uri) if remove else tuple
        known = _senders[place] = Sender(journal, partial(MlflowSink, uri, journal), remove, first)
    return known


def reach(config: Config, tracking_uri: str = "") -> str:
    """Has this process, and those that it starts, use a server or database from here on; "" for the one in force.

    Returns:
        Its address.

    Raises:
        TrackingError: the database cannot be used, or the journal's folder. Whether a server answers is not asked.
    """
    there, can_be_written = nearest(journal_path(config, "").parent)
    with _writable(config):
        if not can_be_written:
            raise PermissionError(f"'{there}' is no folder that can be written")
    if tracking_uri:
        mlflow.set_tracking_uri(tracking_uri)
    uri = mlflow.get_tracking_uri()
    try:
        connect()
    except (MlflowException, ImportError) as error:
        raise TrackingError(f"MLflow at '{shown(uri)}' cannot be used: {error}") from error
    return uri


@contextmanager
def open_run(name: str, config: Config, tracking_uri: str = "") -> Iterator[OpenRun]:
    """The run of a measurement: the run that `mlflow run` made, else a new one. At the end, waits until it has arrived.

    Raises:
        TrackingError: the tracking database cannot be used, or the journal. A server that does not answer only warns.
    """
    uri, given, remove = reach(config, tracking_uri), os.environ.get("MLFLOW_RUN_ID"), config.logging.journal is None
    with _writable(config):
        opened = OpenRun(journal_path(config, name), uri, remove, name=name, run_id=given, mine=True)
    try:
        with opened.run.ending():
            yield opened
    finally:
        interrupted = opened.run.ended == "KILLED"  # then the user does not want to wait
        opened.sender.close(LIMIT_INTERRUPTED if interrupted else LIMIT)


@contextmanager
def _writable(config: Config) -> Iterator[None]:
    """Raises TrackingError in place of OSError where the journal cannot be written."""
    try:
        yield
    except OSError as error:
        key, folder = ("logging.journal", config.logging.journal) if config.logging.journal else ("store", config.store)
        raise TrackingError(f"{key}: '{folder}' cannot be written ({error}); set {key} to another folder") from error


def journal_path(config: Config, name: str) -> Path:
    """A new journal's path, in the folder that the configuration names; the file's name holds the host's."""
    folder = Path(config.logging.journal or f"{config.store}/journal").expanduser()
    label = re.sub(r"[^\w=.-]", "_", name)[:60]
    return folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{label}-{os.urandom(3).hex()}{host_mark()}.jsonl"
