"""Where the ranks of a training agree: rank 0 does the work, and all learn how it went."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from pipeline.errors import PipelineError

T = TypeVar("T")


class RankError(PipelineError):
    """What rank 0 raised, on every other rank."""


class LostRankError(PipelineError):
    """The ranks are no longer together: one did not come in time, or is gone. Training cannot go on."""


class Ranks:
    """The ranks of a process group, over a group of their own: its timeout is not the training's.

    Waiting costs nothing, and no GPU takes part. Where there is no process group, or one rank, work is just done.
    """

    def __init__(self, timeout: float) -> None:
        """`timeout` is in seconds, for a rank to arrive and for rank 0 to be done."""
        self.timeout = timedelta(seconds=timeout)
        self.group: Any = None

    def open(self) -> None:
        """Makes the group; every rank must call it. Does nothing where it is made, or not needed."""
        if self.group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.group = dist.new_group(backend="gloo", timeout=self.timeout)

    def close(self) -> None:
        """Gives the group up; what is broken is left as it is."""
        self.group = None

    def agree(self, work: Callable[[], T]) -> T:
        """Does `work` on rank 0. Returns its result on every rank, or raises on every rank.

        Raises:
            RankError: on the other ranks, what `work` raised on rank 0.
            LostRankError: a rank did not come, or went away; named in the message.
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
