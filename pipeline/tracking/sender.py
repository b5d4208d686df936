"""Sends a journal on: one thread that never holds up whoever writes the journal, and may be left behind at any time."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence

from filelock import Timeout

from pipeline.tracking.delivery import Sink, groups, holding, insist, is_bug, line_of
from pipeline.tracking.journal import Journal, Record

logger = logging.getLogger(__name__)

LINGER = 1.0  # seconds in which further records may join the first of a group
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between tries of a server that fails
MOMENT = 0.2  # seconds that the end of a training waits for what is on its way
PATIENCE = 30.0  # seconds for the next record to arrive, at the end of a program; a busy machine takes ten to connect
LIMIT = 300.0  # seconds in all


class Sender:
    """Sends the records of a journal in order, each until it has arrived or is refused.

    A failure opens the circuit: nothing is tried for a second, then for two, up to a minute.

    Attributes:
        failure: why the circuit is open; None while records arrive.
        refused: how many records the server would not have.
        sink: where records go; None before the first, and after a failure.
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
            journal: what is sent.
            open_sink: connects; called in the thread, again after a failure.
            remove: removes the journal when all of it has arrived and nothing will be added.
            first: is done in the thread before anything is sent, piece by piece.
        """
        self.journal = journal
        self.failure: str | None = None
        self.refused = 0
        self.sink: Sink | None = None
        self._open_sink = open_sink
        self._remove = remove
        self._first = first
        self._pieces = 0  # done of it
        self._arrived = threading.Condition()
        self._wake, self._hurry = threading.Event(), threading.Event()
        self._finishing = self._resting = self._closed = self._tidied = False
        self._said: set[str] = set()
        self._failures = self._of_record = 0
        self._offset = journal.sent
        self._thread: threading.Thread | None = None
        journal.listener = self._notify
        _senders.add(self)
        self._notify()

    @property
    def done(self) -> bool:
        """Whether everything that was written has arrived."""
        return self._offset >= self.journal.end

    @property
    def ended(self) -> bool:
        """Whether it sends no more."""
        return self._closed or self._tidied

    def settle(self, limit: float = MOMENT, patience: float | None = None) -> bool:
        """Waits until everything has arrived, and says whether it has.

        Args:
            limit: most seconds in all.
            patience: most seconds for the next record to arrive. A server that is known to be down is not waited for.
        """
        deadline = time.monotonic() + limit
        self._hurry.set()
        with self._arrived:
            while not self.done and self.failure is None and self._thread is not None:
                rest = deadline - time.monotonic()
                if rest <= 0:
                    break
                before = self._offset, self._pieces
                self._arrived.wait(min(rest, patience or rest))
                if patience and patience < rest and (self._offset, self._pieces) == before and self.failure is None:
                    break
        self._hurry.clear()
        return self.done

    def rest(self) -> None:
        """Says that nothing is expected for now: the thread ends when everything has arrived, until there is more."""
        self._resting = True
        self._hurry.set()
        self._wake.set()

    def finish(self) -> None:
        """Says that nothing will be added: the thread ends when everything has arrived, and tidies up."""
        self._finishing = True
        self.rest()
        self._notify()

    def close(self, limit: float = LIMIT, patience: float | None = PATIENCE) -> bool:
        """Sends what is left, as `settle` does, and stops. What has not arrived stays in the journal, which is said."""
        if self.ended:
            return self.done and not self.journal.lost
        self.finish()
        thread = self._thread
        self._try_again(min(patience or limit, limit))
        done = self.settle(limit, patience)
        if done and thread is not None:
            thread.join(5.0)  # it ends by itself, and tidies up
        self._closed = True
        self._wake.set()
        self._hurry.set()
        _senders.discard(self)
        if done:
            return not self.journal.lost
        reason = self.failure or "it answers too slowly"
        remedy = f"send it later with: python -m pipeline replay {self.journal.path}"
        logger.warning("MLflow does not have everything yet (%s); %s", reason, remedy)
        return False

    def _notify(self) -> None:
        """There is something new; starts the thread if it has come to rest."""
        self._wake.set()
        with self._arrived:
            if self._thread is None and not self.ended:
                self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
                self._thread.start()

    def _try_again(self, limit: float) -> None:
        """Where the circuit is open, waits for one try more."""
        with self._arrived:
            failures = self._failures
            self._hurry.set()
            if self.failure is not None:
                self._arrived.wait_for(lambda: self.failure is None or self._failures > failures, limit)

    def _run(self) -> None:
        pause = FIRST_PAUSE
        while not self._closed:
            try:
                with holding(self.journal):
                    self._work()
                break
            except Timeout:
                self._fail("another process is sending the journal", pause)
            except Exception as error:
                logger.debug("sending of the journal", exc_info=True)
                self._fail(line_of(error), pause, is_bug(error))
            pause = min(2 * pause, LONGEST_PAUSE)
        with self._arrived:
            self._thread = None
            self._arrived.notify_all()
        if not self.ended and not self.done:  # something was added at the last moment
            self._notify()

    def _work(self) -> None:
        """Sends what there is, again and again, until it may rest. Raises where the server fails."""
        self._offset = max(self._offset, self.journal.sent)
        while not self._closed:
            self._wake.clear()
            self._send()
            if self.done and self._finishing:
                self._tidy()
                return
            if self.done and self._resting:
                self._resting = False
                self._hurry.clear()
                return
            if self._wake.wait(LONGEST_PAUSE) and not self._resting:
                self._hurry.wait(LINGER)

    def _send(self) -> None:
        """Sends until the end of the journal. Raises where the server fails."""
        for records, offset in groups(self.journal, self._offset):
            self.sink = self.sink or self._connect()
            self.journal.note_sent(offset, self._apply(records))
            if self._remove:
                self.journal.drop(records)
            with self._arrived:
                if self.failure is not None:
                    logger.warning("MLflow answers again; what it missed is being sent")
                self.failure, self._offset, self._of_record = None, offset, 0
                self._arrived.notify_all()
            if self._closed:
                return

    def _connect(self) -> Sink:
        """Connects; what is to be done first is done once."""
        for _ in self._first():
            with self._arrived:
                self._pieces += 1
                self._arrived.notify_all()
        self._first = tuple
        return self._open_sink()

    def _apply(self, records: Sequence[Record]) -> int:
        """Applies records; how many were refused. Raises where they are to be tried again."""
        assert self.sink is not None
        failed, self._of_record = self._of_record, self._of_record + 1
        refused = insist(self.sink, records, self._said, failed, at_once=False)
        self.refused += refused
        return refused

    def _fail(self, reason: str, pause: float, bug: bool = False) -> None:
        """Opens the circuit: what is new does not close it, only time and the end do."""
        self.sink = None
        with self._arrived:
            said, self.failure = self.failure is not None, reason
            self._failures += 1
            self._arrived.notify_all()
        if not said:
            what = "results cannot be sent by a mistake in the program" if bug else "MLflow does not answer"
            logger.warning("%s (%s); the work goes on, and results are kept in %s", what, reason, self.journal.path)
        self._hurry.wait(pause)
        if not self._closed:
            self._hurry.clear()

    def _tidy(self) -> None:
        """Everything has arrived, and nothing will be added."""
        self._tidied = True
        _senders.discard(self)
        if self._remove and not self.journal.refused and not self.journal.lost:
            self.journal.remove()
        self.journal.close()


def flush(limit: float = 30.0) -> bool:
    """Waits until what this process has journalled has arrived; for a script that looks at MLflow itself."""
    settled = [sender.settle(limit, PATIENCE) for sender in list(_senders)]
    return all(settled)


_senders: weakref.WeakSet[Sender] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """All of them together are waited for as long as one would be."""
    deadline = time.monotonic() + LIMIT
    patience = PATIENCE
    for sender in list(_senders):
        began = time.monotonic()
        if not sender.close(max(0.1, deadline - began), patience):
            patience = max(0.5, patience - (time.monotonic() - began))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _senders.clear())  # their threads are the parent's
