"""Sends a journal to MLflow in a thread, so that nothing else waits for a server."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable

from filelock import Timeout

from pipeline.tracking.delivery import Sink, groups, is_bug, line_of, lock_for_sending, send_with_retries
from pipeline.tracking.journal import Journal
from pipeline.tracking.journal_owner import remove_journal

logger = logging.getLogger(__name__)

LINGER, MIN_LINGER = 1.0, 0.01  # seconds in which further records may gather, to be sent together; at the end
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between tries of a server that fails
MOMENT = 0.2  # seconds that the end of a training waits for the last records to arrive
PATIENCE = 30.0  # seconds for the next record to arrive, at the end of a program; a busy machine takes ten to connect
LIMIT = 300.0  # seconds in all
TIDYING = 5.0  # seconds for removing a journal of which everything has arrived


class Sender:
    """Sends the records of a journal in order, each until it has arrived or is refused.

    A record starts the thread, and the thread ends when there has been nothing to send for a moment. After a failure
    the thread waits a second, then two, up to a minute.

    Attributes:
        failure: why the last try failed; None while records arrive.
        sink: where records go; None before the first, and after a failure.
        ended: whether nothing is sent any more.
    """

    def __init__(
        self,
        journal: Journal,
        open_sink: Callable[[], Sink],
        remove: bool = False,
        first: Callable[[], Iterable[object]] = tuple,
    ) -> None:
        """Starts the thread.

        Args:
            journal: its records are sent.
            open_sink: connects; called in the thread, again after a failure.
            remove: removes the journal when all of it has arrived and nothing will be added.
            first: work for the thread before anything is sent, piece by piece.
        """
        self.journal = journal
        self.failure: str | None = None
        self.sink: Sink | None = None
        self.ended = False
        self._open_sink = open_sink
        self._remove = remove
        self._first = first
        self._finishing = False
        self._offset = journal.sent
        self._progress = self._failures = 0
        self._tries = 0  # of the next record
        self._known: set[str] = set()  # reasons of refusals that were warned of
        self._changed = threading.Condition()
        self._hurry = threading.Event()
        self._thread: threading.Thread | None = None
        journal.listener = self._start
        _senders.add(self)
        self._start()

    @property
    def done(self) -> bool:
        """Whether everything that was written has arrived."""
        return self._offset >= self.journal.end

    def settle(self, limit: float = MOMENT, patience: float | None = None) -> bool:
        """Waits until everything has arrived, and returns whether it has.

        Args:
            limit: most seconds in all.
            patience: most seconds for the next record to arrive. A server that is known to be down is not waited for.
        """
        deadline = time.monotonic() + limit
        self._hurry.set()
        with self._changed:
            while self._thread is not None and not (self.done or self.failure or self.ended):
                rest = deadline - time.monotonic()
                before = self._progress
                self._changed.wait(max(0.0, min(rest, patience or rest)))
                if rest <= 0 or (patience and patience < rest and self._progress == before):
                    break
        if not self._finishing:
            self._hurry.clear()
        return self.done

    def finish(self) -> None:
        """Nothing will be added: the journal is closed, or removed, when everything has arrived."""
        with self._changed:
            self._finishing = True
            if self._thread is None and self.done:  # at the end of a program Python 3.12 starts no thread for it
                with contextlib.suppress(Timeout), lock_for_sending(self.journal):
                    self._tidy()
        self._hurry.set()
        self._start()

    def close(self, limit: float = LIMIT, patience: float = PATIENCE) -> bool:
        """Sends what is left, as `settle` does, and stops; a server that was down is tried once more.

        What has not arrived stays in the journal, and a warning says how to send it later.
        """
        if not self.ended:
            self.finish()
            self._try_again(min(patience, limit))
            if self.settle(limit, patience):
                with self._changed:
                    self._changed.wait_for(lambda: self.ended, TIDYING)
            else:
                reason = self.failure or "it answers too slowly"
                remedy = f"send it later with: python -m pipeline replay {self.journal.path}"
                logger.warning("MLflow does not have everything yet (%s); %s", reason, remedy)
            self._end()
        return self.done and not self.journal.lost

    def _start(self) -> None:
        """Starts the thread, unless it runs."""
        with self._changed:
            if self._thread is None and not self.ended:
                thread = threading.Thread(target=self._run, name="journal", daemon=True)
                with contextlib.suppress(RuntimeError):  # of Python 3.12, at the end of the program
                    thread.start()
                    self._thread = thread

    def _end(self) -> None:
        with self._changed:
            self.ended = True
            self._changed.notify_all()
        self._hurry.set()
        _senders.discard(self)

    def _try_again(self, limit: float) -> None:
        """After a failure, waits until the server has been tried once more."""
        with self._changed:
            failures = self._failures
            if self.failure is not None:
                self._changed.wait_for(lambda: self.failure is None or self._failures > failures, limit)

    def _run(self) -> None:
        pause = FIRST_PAUSE
        while self._goes_on():
            try:
                with lock_for_sending(self.journal):
                    self._send()
                    if self._finishing and self.done:
                        self._tidy()
                pause = FIRST_PAUSE
                if self._hurry.wait(LINGER):
                    time.sleep(MIN_LINGER)
                continue
            except Exception as error:
                logger.debug("sending of the journal", exc_info=True)
                self._fail(error)
            self._hurry.wait(pause)  # new records do not end the pause, only the end of the program does
            if not self.ended:
                self._hurry.clear()
            pause = min(2 * pause, LONGEST_PAUSE)

    def _goes_on(self) -> bool:
        """Whether the thread has work; where it has none, the next record starts another thread."""
        with self._changed:
            if not self.ended and (self._finishing or self.failure or not self.done):
                return True
            self._thread = None
            return False

    def _send(self) -> None:
        """Sends until the end of the journal. Raises where the server fails."""
        self._offset = max(self._offset, self.journal.sent)
        for records, offset in groups(self.journal, self._offset):
            if self.sink is None:
                for _ in self._first():
                    self._arrived(self._offset, ok=False)
                self._first = tuple
                self.sink = self._open_sink()
            self._tries += 1
            refused = send_with_retries(self.sink, records, self._known, self._tries - 1, at_once=False)
            self.journal.note_sent(offset, refused)
            if self._remove:
                self.journal.drop(records)
            self._arrived(offset)
            if self.ended:
                return
        if self.failure is not None:  # another process has sent it
            self._arrived(self._offset)

    def _arrived(self, offset: int, ok: bool = True) -> None:
        """Notes progress: what is before `offset` has arrived, and with `ok` the server works."""
        with self._changed:
            if ok and self.failure is not None:
                logger.warning("MLflow answers again; what it missed is being sent")
            if ok:
                self.failure, self._tries = None, 0
            self._offset = offset
            self._progress += 1
            self._changed.notify_all()

    def _fail(self, error: Exception) -> None:
        """Notes a failure, and warns of the first of several."""
        self.sink = None
        with self._changed:
            known, self.failure = self.failure is not None, line_of(error)
            self._failures += 1
            self._changed.notify_all()
        if not known:
            what = "results cannot be sent by a mistake in the program" if is_bug(error) else "MLflow does not answer"
            reason, path = line_of(error), self.journal.path
            logger.warning("%s (%s); the work goes on, and results are kept in %s", what, reason, path)

    def _tidy(self) -> None:
        """Everything has arrived, and nothing will be added."""
        if self._remove and not self.journal.refused and not self.journal.lost:
            remove_journal(self.journal.path)
        self.journal.close()
        self._end()


def flush(limit: float = 30.0) -> bool:
    """Waits until what this process has journalled has arrived; for a script that looks at MLflow itself."""
    settled = [sender.settle(limit, PATIENCE) for sender in list(_senders)]
    return all(settled)


_senders: weakref.WeakSet[Sender] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """All of them together are waited for as long as a single sender would be."""
    deadline = time.monotonic() + LIMIT
    patience = PATIENCE
    for sender in list(_senders):
        began = time.monotonic()
        if not sender.close(max(0.1, deadline - began), patience):
            patience = max(0.5, patience - (time.monotonic() - began))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _senders.clear())  # their threads are the parent's
