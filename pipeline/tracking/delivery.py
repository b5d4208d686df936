"""How the records of a journal are delivered: in order, in groups, each until it has arrived or is refused."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Protocol

from filelock import FileLock, Timeout

from pipeline.errors import TrackingError
from pipeline.tracking.journal import Journal, Record

logger = logging.getLogger(__name__)

GROUP = 500  # most metrics that are sent at once
# Short words for long messages of requests, urllib3 and filelock.
SHORT = {
    "Connection refused": "connection refused",
    "Read timed out": "no answer in time",
    "ConnectTimeoutError": "no connection in time",
    "RemoteDisconnected": "the connection was lost",
    "Connection reset by peer": "the connection was lost",
    "Name or service not known": "there is no such host",
    "could not be acquired": "another process is sending the journal",
}
TRIES = 3  # of a record, while the server answers other requests


class RefusedError(Exception):
    """The server refuses this record, now and later; `known` where the user has been warned of the reason."""

    def __init__(self, message: str, known: bool = False) -> None:
        super().__init__(message)
        self.known = known


class Sink(Protocol):
    """Where records go."""

    def apply(self, records: Sequence[Record]) -> None:
        """Applies a record, or several records of metrics of the same run. Applying a record again changes nothing.

        Raises:
            RefusedError: trying again is of no use.
            Exception: anything else may be a server that does not answer.
        """

    def answers(self) -> bool:
        """Whether the server answers at all: then the fault is the record's."""
        ...


def groups(journal: Journal, offset: int) -> Iterator[tuple[list[Record], int]]:
    """Groups of the records from `offset` on, each with the offset behind it, up to the present end of the file.

    Consecutive records of metrics of the same run form a group; any other record is a group by itself.
    """
    group: list[Record] = []
    behind = offset
    for record, after in journal.read(offset):
        joins = group and record["op"] == group[0]["op"] == "metrics" and record.get("run") == group[0].get("run")
        if group and (not joins or sum(len(member.get("values", ())) for member in (*group, record)) > GROUP):
            yield group, behind
            group = []
        group.append(record)
        behind = after
    if group:
        yield group, behind


def send(sink: Sink, records: Sequence[Record], known: set[str]) -> int:
    """Applies records and returns how many are refused. Each reason is warned of once, unless it is `known`."""
    try:
        sink.apply(records)
        return 0
    except RefusedError as error:
        reason = "" if error.known else f"MLflow refused {line_of(error)}"
    except Exception as error:
        if not is_bug(error):
            raise
        logger.debug("%s cannot be sent", records[0]["op"], exc_info=True)
        reason = f"{records[0]['op']} is not sent, by a mistake in the program: {line_of(error)}"
    parts = split(records)
    if len(parts) > 1:  # perhaps only some of them are refused
        return sum(send(sink, part, known) for part in parts)
    if reason:
        _warn_once(reason, known)
    return 1


def send_with_retries(
    sink: Sink, records: Sequence[Record], known: set[str], failed: int = 0, at_once: bool = True
) -> int:
    """As `send`; records that fail several times, while the server answers other requests, count as refused.

    Args:
        sink: where they go.
        records: a group, see `groups`.
        known: reasons that the user has been warned of.
        failed: how often these records have failed before.
        at_once: tries again at once; else that is left to the caller, who may wait and connect again.

    Raises:
        Exception: the server does not answer, or the caller is to try again.
    """
    for tried in range(min(failed + 1, TRIES), TRIES + 1):
        try:
            return send(sink, records, known)
        except Exception as error:
            last = tried == TRIES
            if not (last or at_once) or not sink.answers():
                raise
            if last:
                _warn_once(f"MLflow refused {records[0]['op']}: it failed {TRIES} times ({line_of(error)})", known)
    return len(records)


def is_bug(error: BaseException) -> bool:
    """Whether an error is a mistake in a program, such as a KeyError, and not a server or database that fails.

    Those raise errors of libraries' own, or of the system.
    """
    return type(error).__module__ == "builtins" and not isinstance(error, (OSError, MemoryError))


def split(records: Sequence[Record]) -> list[list[Record]]:
    """Several records as single records; a record of several metrics or parameters as records of single values."""
    if len(records) > 1:
        return [[record] for record in records]
    values = records[0].get("values") or {}
    return [[{**records[0], "values": {name: value}}] for name, value in values.items()]


def _warn_once(reason: str, known: set[str]) -> None:
    if reason not in known:
        logger.warning("%s", reason)
    known.add(reason)


def lock_for_sending(journal: Journal) -> FileLock:
    """The lock of the process that sends the journal. Raises Timeout where another process holds it."""
    return FileLock(journal.path.with_suffix(".lock"), timeout=0)


def replay(journal: Journal, sink: Sink, elsewhere: bool = False) -> tuple[int, int]:
    """Sends what has not been sent. Returns how many records arrived now, and how many were refused.

    With `elsewhere`, the sink is not the one that the journal is for: the whole journal is sent.

    Raises:
        TrackingError: the server does not answer; what has arrived is noted. Or another process is sending it.
    """
    arrived = refused = 0
    known: set[str] = set()
    try:
        with lock_for_sending(journal):
            for records, offset in groups(journal, 0 if elsewhere else journal.sent):
                failed = send_with_retries(sink, records, known)
                if not elsewhere:
                    journal.note_sent(offset, failed)
                real = len(records) if "run" in records[0] else 0  # not the head, nor torn lines
                arrived, refused = arrived + max(0, real - failed), refused + failed
    except Timeout as error:
        raise TrackingError(f"journal: '{journal.path}' is being sent by another process; wait for its end") from error
    except Exception as error:
        logger.debug("replay of '%s'", journal.path, exc_info=True)
        if is_bug(error):
            raise TrackingError(
                f"journal: '{journal.path}' cannot be sent by a mistake in the program: {line_of(error)}; report it"
            ) from error
        remedy = "start it, and replay again"
        raise TrackingError(f"MLflow does not answer after {arrived} records ({line_of(error)}); {remedy}") from error
    return arrived, refused


def line_of(error: Exception) -> str:
    """An error's message as one short line; for a mistake in the program, with its type."""
    text = " ".join(str(error).split())
    if is_bug(error):
        return f"{type(error).__name__}: {text[:300]}"
    known = next((short for part, short in SHORT.items() if part in text), text[:300])
    return known or type(error).__name__
