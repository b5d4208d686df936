"""Work that rank 0 of a training does for all ranks: each gets its result, or its error."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from pipeline.errors import PipelineError

T = TypeVar("T")


class RankError(PipelineError):
    """The error that rank 0 raised, on the other ranks."""


class LostRankError(PipelineError):
    """A rank did not arrive in time, or is gone. Training cannot go on."""


class Ranks:
    """The ranks of a training, in a process group of their own, whose timeout is not the training's.

    They wait without using CPU or GPU. Without a process group, or with one rank, work is done at once.
    """

    def __init__(self, timeout: float) -> None:
        """`timeout` is in seconds: how long a rank may take to arrive, and rank 0 to do the work."""
        self.timeout = timedelta(seconds=timeout)
        self.group: Any = None

    def open(self) -> None:
        """Makes the group, if there are several ranks and it is not made yet; every rank must call it."""
        if self.group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.group = dist.new_group(backend="gloo", timeout=self.timeout)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, or the only one."""
        return self.group is None or dist.get_rank() == 0

    def close(self) -> None:
        """Forgets the group, without destroying it: it may be broken."""
        self.group = None

    def on_rank_zero(self, work: Callable[[], T]) -> T:
        """Does `work` on rank 0. Returns its result on every rank, or raises on every rank.

        Raises:
            RankError: on the other ranks, what `work` raised on rank 0.
            LostRankError: a rank did not arrive, or is gone; the message names it.
        """
        if self.group is None:
            return work()
        self._arrive()
        if dist.get_rank() != 0:
            heard: T = self._hear()
            return heard
        try:
            result = work()
        except Exception as error:
            self._tell(None, RankError(f"rank 0: {type(error).__name__}: {error}"))
            raise
        except BaseException as error:
            self._tell(None, LostRankError(f"downstream validation: rank 0 was stopped: {type(error).__name__}"))
            raise
        self._tell(result, None)
        return result

    def _arrive(self) -> None:
        try:
            dist.monitored_barrier(self.group, self.timeout, wait_all_ranks=True)
        except RuntimeError as error:
            waited = f"waited {self.timeout.total_seconds():g} s for every rank"
            raise LostRankError(f"downstream validation: rank {dist.get_rank()} {waited}: {error}") from error

    def _tell(self, result: Any, failure: PipelineError | None) -> None:
        try:
            dist.broadcast_object_list([(result, failure)], src=0, group=self.group)
        except RuntimeError as error:
            raise LostRankError(f"downstream validation: rank 0 cannot reach the other ranks: {error}") from error

    def _hear(self) -> Any:
        box: list[Any] = [None]
        try:
            dist.broadcast_object_list(box, src=0, group=self.group)
        except RuntimeError as error:
            waited = f"waited up to {self.timeout.total_seconds():g} s for rank 0"
            remedy = "see its output; raise timeout if it was still at work"
            raise LostRankError(f"downstream validation: rank {dist.get_rank()} {waited}: {error}; {remedy}") from error
        result, failure = box[0]
        if failure is not None:
            raise failure
        return result
