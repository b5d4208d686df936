"""Sends a journal on: one thread that never holds up whoever writes the journal, and may be left behind at any time."""

from __future__ import annotations

import atexit
import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from filelock import FileLock, Timeout

from pipeline.errors import TrackingError
from pipeline.tracking.journal import Journal, Record

logger = logging.getLogger(__name__)

BATCH = 500  # most records that are read from the journal at a time
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between tries of a server that fails
PATIENCE = 10.0  # seconds for the next record to arrive, at the end of a program
LIMIT = 300.0  # seconds in all


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
            Exception: anything else is taken for a server that does not answer.
        """
        ...


class Sender:
    """Sends the records of a journal in order, each until it has arrived or is refused.

    A failure opens the circuit: nothing is tried for a second, then for two, up to a minute.

    Attributes:
        failure: why the circuit is open; None while records arrive.
        refused: how many records the server would not have.
        sink: where records go; None before the first, and after a failure.
    """

    def __init__(self, journal: Journal, open_sink: Callable[[], Sink], remove: bool = False) -> None:
        """Starts the thread.

        Args:
            journal: what is sent.
            open_sink: connects; called in the thread, again after a failure.
            remove: removes the journal when all of it has arrived and nothing will be added.
        """
        self.journal = journal
        self.failure: str | None = None
        self.refused = 0
        self._open_sink = open_sink
        self._remove = remove
        self.sink: Sink | None = None
        self._arrived = threading.Condition()
        self._wake = threading.Event()
        self._finishing = self._closed = self._hurried = self._said = False
        self._tries = 0
        self._offset = journal.sent
        journal.listener = self._wake.set
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()
        _senders.add(self)

    @property
    def done(self) -> bool:
        """Whether everything that was written has arrived."""
        return self._offset >= self.journal.end

    def settle(self, limit: float, patience: float | None = None) -> bool:
        """Waits until everything has arrived, and says whether it has.

        Args:
            limit: most seconds in all.
            patience: most seconds for the next record to arrive. A server that is known to be down is not waited for.
        """
        deadline = time.monotonic() + limit
        self._wake.set()
        with self._arrived:
            while not self.done and self.failure is None and self._thread.is_alive():
                rest = deadline - time.monotonic()
                if rest <= 0:
                    break
                before = self._offset
                self._arrived.wait(min(rest, patience or rest))
                if patience and patience < rest and self._offset == before and self.failure is None:
                    break
        return self.done

    def finish(self) -> None:
        """Says that nothing will be added: the thread ends when everything has arrived."""
        self._finishing = True
        self._wake.set()

    def close(self, limit: float = LIMIT, patience: float | None = PATIENCE) -> bool:
        """Sends what is left, as `settle` does, and stops. What has not arrived stays in the journal, which is said."""
        self.finish()
        self._try_again(patience or limit)
        done = self.settle(limit, patience)
        self._closed = True
        self._wake.set()
        _senders.discard(self)
        if done:
            self._thread.join(5.0)
            return True
        reason = self.failure or "it answers too slowly"
        remedy = f"send it later with: python -m pipeline replay {self.journal.path}"
        logger.warning("MLflow does not have everything yet (%s); %s", reason, remedy)
        return False

    def _try_again(self, limit: float) -> None:
        """Where the circuit is open, waits for one try more."""
        with self._arrived:
            tries, self._hurried = self._tries, True
            self._wake.set()
            if self.failure is not None:
                self._arrived.wait_for(lambda: self.failure is None or self._tries > tries, limit)

    def _run(self) -> None:
        pause = FIRST_PAUSE
        with contextlib.suppress(Timeout), holding(self.journal):
            while not self._closed:
                self._wake.clear()
                try:
                    self._send()
                except Exception as error:
                    self._fail(error)
                    self._rest(pause)
                    pause = min(2 * pause, LONGEST_PAUSE)
                    continue
                if self._finishing and self.done:
                    break
                pause = FIRST_PAUSE
                self._wake.wait(LONGEST_PAUSE)
        if self.done:
            self._tidy()

    def _tidy(self) -> None:
        """Everything has arrived."""
        _senders.discard(self)
        self.journal.close()
        if self._remove and not self.refused:
            self.journal.remove()

    def _send(self) -> None:
        """Sends until the end of the journal. Raises where the server fails."""
        for records, offset in batches(self.journal, self._offset):
            self.sink = self.sink or self._open_sink()
            self.refused += send(self.sink, records)
            self.journal.sent = offset
            if self._remove:
                self.journal.drop(records)
            with self._arrived:
                if self.failure is not None:
                    logger.warning("MLflow answers again; what it missed is being sent")
                self.failure, self._said = None, False
                self._offset = offset
                self._arrived.notify_all()
            if self._closed:
                return

    def _fail(self, error: Exception) -> None:
        self.sink = None
        with self._arrived:
            self.failure = _line(error)
            self._tries += 1
            self._arrived.notify_all()
        if not self._said:
            self._said = True
            text = "MLflow does not answer (%s); the work goes on, and results are kept in %s"
            logger.warning(text, self.failure, self.journal.path)

    def _rest(self, seconds: float) -> None:
        """Waits with the circuit open: what is new does not close it, only time and the end do."""
        end = time.monotonic() + seconds
        while not (self._closed or self._hurried) and (rest := end - time.monotonic()) > 0:
            self._wake.wait(rest)
            self._wake.clear()
        self._hurried = False


def batches(journal: Journal, offset: int) -> Iterator[tuple[list[Record], int]]:
    """The records from `offset` on, metrics of one run that follow one another together, each with the offset behind.

    Ends at what is the end of the file at the moment.
    """
    group: list[Record] = []
    behind = offset
    for record, after in journal.read(offset):
        joins = group and record["op"] == group[0]["op"] == "metrics" and record["run"] == group[0]["run"]
        if group and (not joins or sum(len(one["values"]) for one in group) >= BATCH):
            yield group, behind
            group = []
        group.append(record)
        behind = after
    if group:
        yield group, behind


def send(sink: Sink, records: Sequence[Record]) -> int:
    """Applies records; those that the server refuses are warned of, and counted."""
    try:
        sink.apply(records)
    except RefusedError as error:
        if len(records) > 1:  # one of them spoils all
            return sum(send(sink, [record]) for record in records)
        if not error.said:
            logger.warning("MLflow refused %s", _line(error))
        return 1
    return 0


@contextlib.contextmanager
def holding(journal: Journal) -> Iterator[None]:
    """Only one process sends a journal. Raises Timeout where another does."""
    with FileLock(journal.path.with_suffix(".lock"), timeout=0):
        yield


def replay(journal: Journal, sink: Sink) -> tuple[int, int]:
    """Sends what has not been sent; the number of records that arrived now, and that were refused.

    Raises:
        TrackingError: the server does not answer; what has arrived is noted. Or another process is sending it.
    """
    arrived = refused = 0
    try:
        with holding(journal):
            for records, offset in batches(journal, journal.sent):
                failed = send(sink, records)
                journal.sent = offset
                arrived, refused = arrived + len(records) - failed, refused + failed
    except Timeout as error:
        raise TrackingError(f"journal: '{journal.path}' is being sent by another process; wait for its end") from error
    except Exception as error:
        remedy = "start it, and replay again"
        raise TrackingError(f"MLflow does not answer after {arrived} records ({_line(error)}); {remedy}") from error
    return arrived, refused


def flush(limit: float = 30.0) -> bool:
    """Waits until what this process has journalled has arrived; for a script that looks at MLflow itself."""
    settled = [sender.settle(limit, PATIENCE) for sender in list(_senders)]
    return all(settled)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


_senders: weakref.WeakSet[Sender] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for sender in list(_senders):
        sender.close()
