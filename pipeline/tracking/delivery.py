"""How the records of a journal are delivered: in order, in groups, each until it has arrived or is refused."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Protocol

from filelock import FileLock, Timeout

from pipeline.errors import TrackingError
from pipeline.tracking.journal import Journal, Record

logger = logging.getLogger(__name__)

GROUP = 500  # most metrics that are sent at once
# What requests and urllib3 say in four hundred characters.
SHORT = {
    "Connection refused": "connection refused",
    "Read timed out": "no answer in time",
    "ConnectTimeoutError": "no connection in time",
    "RemoteDisconnected": "the connection was lost",
    "Connection reset by peer": "the connection was lost",
    "Name or service not known": "there is no such host",
}
TRIES = 3  # of one record, where the server answers all else


class RefusedError(Exception):
    """The server will not have this record, now or later; `said` where the user knows why."""

    def __init__(self, message: str, said: bool = False) -> None:
        super().__init__(message)
        self.said = said


class Sink(Protocol):
    """Where records go."""

    def apply(self, records: Sequence[Record]) -> None:
        """Applies one record, or several of metrics of one run. Doing it twice must be as doing it once.

        Raises:
            RefusedError: it is of no use to try again.
            Exception: anything else may be a server that does not answer.
        """
        ...

    def answers(self) -> bool:
        """Whether the server answers at all: then it is the record that fails."""
        ...


def groups(journal: Journal, offset: int) -> Iterator[tuple[list[Record], int]]:
    """The records from `offset` on, metrics of one run that follow one another together, each with the offset behind.

    Ends at what is the end of the file at the moment.
    """
    group: list[Record] = []
    behind = offset
    for record, after in journal.read(offset):
        joins = group and record["op"] == group[0]["op"] == "metrics" and record.get("run") == group[0].get("run")
        if group and (not joins or sum(len(one.get("values", ())) for one in (*group, record)) > GROUP):
            yield group, behind
            group = []
        group.append(record)
        behind = after
    if group:
        yield group, behind


def send(sink: Sink, records: Sequence[Record], said: set[str]) -> int:
    """Applies records; those that cannot be sent are said, each reason once, and counted as refused."""
    try:
        sink.apply(records)
        return 0
    except RefusedError as error:
        reason = "" if error.said else f"MLflow refused {line_of(error)}"
    except Exception as error:
        if not is_bug(error):
            raise
        logger.debug("%s cannot be sent", records[0]["op"], exc_info=True)
        reason = f"{records[0]['op']} is not sent, by a mistake in the program: {line_of(error)}"
    parts = split(records)
    if len(parts) > 1:  # one of them spoils all
        return sum(send(sink, part, said) for part in parts)
    if reason:
        say(reason, said)
    return 1


def insist(sink: Sink, records: Sequence[Record], said: set[str], failed: int = 0, at_once: bool = True) -> int:
    """As `send`; records that fail again and again, where the server answers all else, count as refused.

    Args:
        sink: where they go.
        records: one, or several of metrics of one run.
        said: reasons that the user knows.
        failed: how often these records have failed before.
        at_once: tries again at once; else that is left to the caller, who may wait and connect anew.

    Raises:
        Exception: the server does not answer, or the caller is to try again.
    """
    for tried in range(min(failed + 1, TRIES), TRIES + 1):
        try:
            return send(sink, records, said)
        except Exception as error:
            last = tried == TRIES
            if not (last or at_once) or not sink.answers():
                raise
            if last:
                say(f"MLflow refused {records[0]['op']}: it failed {TRIES} times ({line_of(error)})", said)
    return len(records)


def is_bug(error: BaseException) -> bool:
    """Whether an error is a mistake in a program, such as a KeyError, and not a server or database that fails.

    Those raise errors of libraries' own, or of the system.
    """
    return type(error).__module__ == "builtins" and not isinstance(error, (OSError, MemoryError))


def split(records: Sequence[Record]) -> list[list[Record]]:
    """Several records one by one; one of several metrics or parameters, value by value."""
    if len(records) > 1:
        return [[record] for record in records]
    values = records[0].get("values") or {}
    return [[{**records[0], "values": {name: value}}] for name, value in values.items()]


def say(reason: str, said: set[str]) -> None:
    """Warns of what cannot be sent, once."""
    if reason not in said:
        logger.warning("%s", reason)
    said.add(reason)


@contextlib.contextmanager
def holding(journal: Journal) -> Iterator[None]:
    """Only one process sends a journal. Raises Timeout where another does."""
    with FileLock(journal.path.with_suffix(".lock"), timeout=0):
        yield


def replay(journal: Journal, sink: Sink, elsewhere: bool = False) -> tuple[int, int]:
    """Sends what has not been sent; the number of records that arrived now, and that were refused.

    With `elsewhere`, the sink is not the one that the journal is for, and has nothing of it: all of it is sent.

    Raises:
        TrackingError: the server does not answer; what has arrived is noted. Or another process is sending it.
    """
    arrived = refused = 0
    said: set[str] = set()
    try:
        with holding(journal):
            for records, offset in groups(journal, 0 if elsewhere else journal.sent):
                failed = insist(sink, records, said)
                if not elsewhere:
                    journal.note_sent(offset, failed)
                real = len(records) if "run" in records[0] else 0  # but for the head and torn lines
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
    """What an error says, on one line of bearable length; of a mistake in the program, its type too."""
    text = " ".join(str(error).split())
    if is_bug(error):
        return f"{type(error).__name__}: {text[:300]}"
    known = next((short for sign, short in SHORT.items() if sign in text), text[:300])
    return known or type(error).__name__
