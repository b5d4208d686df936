"""The workers that share the work of a measurement: all run the same program, each does its part, and all agree.

A stage asks for no more than this, so it knows nothing of processes, groups or networks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")
J = TypeVar("J")


class Workers(Protocol):
    """Workers that go through the same calls in the same order.

    Attributes:
        rank: of this one; the first is 0.
        count: of all.
        shares: whether other processes take jobs of `each`.
    """

    @property
    def rank(self) -> int:
        """See above."""

    @property
    def count(self) -> int:
        """See above."""

    @property
    def shares(self) -> bool:
        """See above."""

    def together(self, work: Callable[[], T]) -> list[T]:
        """Has every worker do its own `work`, and waits for all. May be nested.

        Returns:
            What each worker's gave, in order of rank; the same on every worker. It must be possible to pickle it.

        Raises:
            Exception: on every worker, where `work` failed on one: there its own error, elsewhere one that names it.
        """

    def from_first(self, work: Callable[[], T]) -> T:
        """Has the first worker do `work`. Returns its result on every worker, or raises on every one."""

    def each(self, work: Callable[[J], T], jobs: Sequence[J], costs: Sequence[float]) -> list[T]:
        """Has one worker or another do `work` for each job, the most costly first.

        Returns:
            The results in the order of the jobs, on every worker.

        Raises:
            Exception: as `together`.
        """


class Alone:
    """One worker, which does everything."""

    rank, count, shares = 0, 1, False

    def together(self, work: Callable[[], T]) -> list[T]:
        """See `Workers.together`."""
        return [work()]

    def from_first(self, work: Callable[[], T]) -> T:
        """See `Workers.from_first`."""
        return work()

    def each(self, work: Callable[[J], T], jobs: Sequence[J], costs: Sequence[float]) -> list[T]:  # noqa: ARG002
        """See `Workers.each`."""
        return [work(job) for job in jobs]


ALONE = Alone()


def here(workers: Workers, work: Callable[[], T]) -> T:
    """As `Workers.together`, where the others do not need this worker's result. Returns it."""
    found: list[T] = []
    workers.together(lambda: found.append(work()))
    return found[0]


def shared_out(costs: Sequence[float], count: int) -> list[list[int]]:
    """The places of each worker's jobs: the most costly first, each to the one with the least to do."""
    shares: list[list[int]] = [[] for _ in range(count)]
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        min(shares, key=lambda share: sum(costs[one] for one in share)).append(place)
    return shares
