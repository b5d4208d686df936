"""The ranks of a training as workers: each does its part, and all get the results, or all an error."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pipeline.engines.workers import shared_out
from pipeline.errors import PipelineError

T = TypeVar("T")
J = TypeVar("J")

AGREED = "all_ranks_know"  # an attribute of errors
FAREWELL = timedelta(seconds=10)  # how long a rank that is stopped waits for the others, to tell them


class RankError(PipelineError):
    """The error that another rank raised."""


class LostRankError(PipelineError):
    """A rank did not arrive in time, or is gone. Training cannot go on."""


class Ranks:
    """See `Workers`: the ranks of a training, in a process group of their own, whose timeout is not the training's.

    They wait without using CPU or GPU. Without a process group, or with one rank, work is done at once.

    Whatever the ranks tell each other begins with a message of one kind, a result or an error. So a rank that fails
    between two calls of `together` is heard at the next one, whichever that is on the other ranks, and none waits for
    it in vain.
    """

    def __init__(self, timeout: float) -> None:
        """`timeout` is in seconds: how long the ranks wait for one another, while one is still at work too."""
        self.timeout: timedelta = timedelta(seconds=timeout)
        self.group: Any = None

    def open(self) -> None:
        """Makes the group, if there are several ranks and it is not made yet; every rank must call it."""
        if self.group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.group = dist.new_group(backend="gloo", timeout=self.timeout)

    @property
    def rank(self) -> int:
        """See `Workers.rank`."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def count(self) -> int:
        """See `Workers.count`."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def shares(self) -> bool:
        """See `Workers.shares`."""
        return self.count > 1

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, or the only one."""
        return self.rank == 0

    def close(self) -> None:
        """Forgets the group, without destroying it: it may be broken."""
        self.group = None

    def on_rank_zero(self, work: Callable[[], T]) -> T:
        """Does `work` on rank 0, once all ranks are there. Returns its result on every rank, or raises on every rank.

        Raises:
            RankError: on the other ranks, what `work` raised on rank 0.
            LostRankError: a rank did not arrive, or is gone; the message names it.
        """
        self.arrive()
        return self.from_first(work)

    def together(self, work: Callable[[], T]) -> list[T]:
        """See `Workers.together`.

        Raises:
            RankError: what `work` raised on the first rank where it failed, on all others.
            LostRankError: a rank did not arrive, or is gone; the message names it.
        """
        if self.group is None:
            return [work()]
        own: Exception | None = None
        try:
            message = pickle.dumps((work(), None))
        except Exception as error:
            if _is_agreed(error):
                raise
            own, message = error, _failure(RankError(f"rank {self.rank}: {type(error).__name__}: {error}"))
        except BaseException as error:
            if not _is_agreed(error):
                self._take_leave(error)
            raise
        messages = [pickle.loads(one) for one in self._exchange(message)]  # noqa: S301  # from a rank of this training
        failed = [rank for rank, (_, failure) in enumerate(messages) if failure is not None]
        if failed:
            first = own if own is not None and failed[0] == self.rank else messages[failed[0]][1]
            setattr(first, AGREED, True)
            raise first
        return [result for result, _ in messages]

    def from_first(self, work: Callable[[], T]) -> T:
        """See `Workers.from_first`; raises as `together`. Only the result is sent, by rank 0."""
        if self.group is None:
            return work()
        found: list[T] = []
        message = b""

        def do() -> int:
            nonlocal message
            if self.rank == 0:
                found.append(work())
                message = pickle.dumps(found[0])
            return len(message)

        size = self.together(do)[0]
        sent = torch.frombuffer(bytearray(message or size), dtype=torch.uint8)  # empty where it is to come
        try:
            dist.broadcast(sent, 0, self.group)
        except RuntimeError as error:
            raise self._lost(error) from error
        return found[0] if found else pickle.loads(sent.numpy().data)  # noqa: S301  # from a rank of this training

    def each(self, work: Callable[[J], T], jobs: Sequence[J], costs: Sequence[float]) -> list[T]:
        """See `Workers.each`; raises as `together`."""
        mine = shared_out(costs, self.count)[self.rank]
        found = dict(
            pair for of_rank in self.together(lambda: [(one, work(jobs[one])) for one in mine]) for pair in of_rank
        )
        return [found[place] for place in range(len(jobs))]

    def arrive(self, within: timedelta | None = None) -> None:
        """Waits for all ranks, by default as long as `timeout`. Raises LostRankError where one does not come."""
        if self.group is None:
            return
        try:
            dist.monitored_barrier(self.group, within or self.timeout, wait_all_ranks=True)
        except RuntimeError as error:
            raise self._lost(error) from error

    def _take_leave(self, error: BaseException) -> None:
        """Tells the others, once, that this rank is stopped; one that does not listen finds out as this process ends.

        They may be at work, or in the very exchange that was interrupted: so this rank does not wait for long.
        """
        setattr(error, AGREED, True)
        stopped = f"downstream validation: rank {self.rank} was stopped: {type(error).__name__}"
        with suppress(LostRankError):
            self._exchange(_failure(LostRankError(stopped)), min(FAREWELL, self.timeout))

    def _exchange(self, message: bytes, within: timedelta | None = None) -> list[bytes]:
        """The messages of all ranks; each waits until all have one."""
        self.arrive(within)  # which names a rank that does not come
        found: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(found, message, self.group)
        except RuntimeError as error:
            raise self._lost(error) from error
        return found

    def _lost(self, error: Exception) -> LostRankError:
        waited = f"waited up to {self.timeout.total_seconds():g} s for every rank"
        remedy = "see the output of that rank; raise timeout if it was still at work"
        return LostRankError(f"downstream validation: rank {self.rank} {waited}: {error}; {remedy}")


def _failure(error: PipelineError) -> bytes:
    return pickle.dumps((None, error))


def _is_agreed(error: BaseException | None) -> bool:
    """Whether all ranks know of an error already, or of one that it comes from."""
    seen = set[int]()
    while error is not None and id(error) not in seen:
        if hasattr(error, AGREED) or isinstance(error, LostRankError):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False
