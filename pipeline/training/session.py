"""The measurements of one training, whichever loop it has: when they are due, their curve, and what a resume needs."""

from __future__ import annotations

import atexit
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from pipeline.config.schema import Config
from pipeline.engines.workers import ALONE
from pipeline.errors import PipelineError
from pipeline.report.tables import Table
from pipeline.training.background import Arrival
from pipeline.training.host import Host
from pipeline.training.late import Late, why_not_late
from pipeline.training.lines import Lines
from pipeline.training.measurement import Measurement
from pipeline.training.progress import Progress
from pipeline.training.ranks import LostRankError, Ranks

Point = tuple[int, dict[str, float]]  # a step, and the metrics of its weights
logger = logging.getLogger(__name__)

T = TypeVar("T")


class Session:
    """Has the ranks measure, or rank 0 alone, and gives every rank the result.

    Attributes:
        ranks: of the training.
        work: measures, between `open` and `close`; None before and after.
        curve: the step and the metrics of each measurement of this process, on every rank.
        last_step: of the last measurement, also before an interruption.
        description: what a checkpoint needs to be opened; None where that takes a class, and before `prepare`.
        overview: after `close`: the last scores, and what they have changed by; None without any.
        summary: after `close`: the overview and the headline metrics of each step, in Markdown.
    """

    def __init__(self, config: Config) -> None:
        """Checks the configuration. Raises ConfigError."""
        config.check()
        self.config = config
        self.ranks: Ranks = Ranks(config.timeout)
        self.work: Measurement | None = None
        self.curve: list[tuple[int, dict[str, float]]] = []
        self.last_step: int | None = None
        self.description: dict[str, Any] | None = None
        self.overview: Table | None = None
        self.summary: str = ""
        self._validations = 0
        self._run: str | None = None
        # The curve, with what came before an interruption; nothing is known of a step that failed or was dropped.
        self._points: list[Point] = []
        self._progress: dict[str, Any] | None = None  # of rank 0, in the form in which a checkpoint has it
        self._lines = Lines(config.headlines)
        self._may_be_late = False
        self._is_never_late = config.mode != "background"
        self._late: Late | None = None
        self._untold: list[Point] = []  # what came while the training was resumed
        self._left: Mapping[str, Any] | None = None  # its state, from before an interruption
        self._at_exit: Callable[[], None] | None = None

    def forget(self) -> None:
        """Begins anew, for another training, such as another fold."""
        self._validations, self.last_step, self._run = 0, None, None
        self._points, self._progress, self._left = [], None, None

    def open(self, host: Host, may_be_late: bool = True) -> None:
        """Begins to measure in a loop; every rank calls it.

        Args:
            host: the loop.
            may_be_late: whether the loop goes on while something is measured.
        """
        self._may_be_late = may_be_late and self.config.mode == "background"
        self.ranks.open()
        if self.config.engine != "local" and self.ranks.is_first:
            host.say(f"engine: {self.config.engine} is for the command line; in a training its ranks measure, see mode")
        self._lines = Lines(self.config.headlines)
        self.work = Measurement(self.config, host, self._run, self.ranks if self._is_shared else ALONE)
        self._continue()

    def start_clock(self) -> None:
        """The time of the training, of which measurements have a share, counts from here."""
        self._lines.start_clock()

    def prepare(self, module: nn.Module, may_wait: bool = False) -> None:
        """Finds the encoder and reads all data, see `Measurement.prepare`. Raises PipelineError on every rank alike."""
        assert self.work is not None
        work = self.work

        def prepared() -> tuple[dict[str, Any] | None, str]:
            work.prepare(module, may_wait)
            why = why_not_late(self.config, module, work.runs_module) if self._may_be_late else ""
            if self._may_be_late and not why and work.description is not None:
                del work.description["made_with"]  # the worker measures otherwise, such as on another device
            return work.description, why

        self.description, why = self._do(prepared)
        if why and self.ranks.is_first:
            work.host.warn(f"mode: background cannot be, the training waits for its measurements: {why}")
        self._may_be_late = self._may_be_late and not why
        self._is_never_late = self._is_never_late or bool(why)
        if not self._may_be_late:
            self._late = None
            self._continue()
        elif self._late is None:
            self._late = Late(self.config, self.ranks, work)
            self._continue()

    @property
    def is_late(self) -> bool:
        """Whether the training does not wait for its measurements (`mode: background`); known after `prepare`."""
        return self._late is not None

    def try_out(self, module: nn.Module) -> None:
        """Tries whether a measurement can work. Raises PipelineError on every rank where it cannot."""
        assert self.work is not None
        work = self.work
        self._do(lambda: work.try_out(module))

    def is_due(self) -> bool:
        """Counts a validation, and says whether `every_n_validations` has it measured."""
        self._validations += 1
        return (self._validations - 1) % self.config.every_n_validations == 0

    def measure(self, module: nn.Module, step: int) -> dict[str, float]:
        """The metrics, the same on every rank; empty where the measurement failed and `on_error` is `warn`.

        In the background, writes a snapshot, on rank 0; the metrics come later, see `poll`.
        """
        assert self.work is not None
        if self._late is not None:
            self.last_step = step
            with self._counted():
                self._late.hand_over(module, step)
            return {}
        work, began = self.work, time.perf_counter()
        try:
            metrics = self._do(lambda: work.measure(module, step))
        except LostRankError:
            raise
        except Exception as error:
            if self.config.on_error == "raise":
                raise
            logger.debug("downstream validation at step %d", step, exc_info=True)
            kind = "" if isinstance(error, PipelineError) else f"{type(error).__name__}: "
            if self.ranks.is_first:
                work.host.warn(f"downstream validation failed at step {step}, training goes on: {kind}{error}")
            self._add(step, {})
            return {}
        self.last_step = step
        self.curve.append((step, metrics))
        self._add(step, metrics)
        self._say(self._lines.of_measurement(step, metrics, time.perf_counter() - began))
        return metrics

    def poll(self) -> list[Point]:
        """Takes in what has been measured in the background since the last call: steps and metrics, on rank 0.

        Raises:
            PipelineError: a measurement failed, `on_error` is `raise`, and there is one rank; several raise at the end.
        """
        if self._late is None:
            return []
        with self._counted():
            arrivals = self._late.poll()
        found, self._untold = [*self._untold, *self._take_in(arrivals)], []
        return found

    def finish(self, module: nn.Module | None = None, step: int = 0, alone: bool = False) -> list[Point]:
        """Waits for what is measured in the background; afterwards all ranks have the curve. Every rank calls it.

        Args:
            module: is measured, where the last snapshot that was due was skipped; None where it is not at hand.
            step: of the module.
            alone: without the other ranks, as a program ends.

        Returns:
            As `poll`.

        Raises:
            PipelineError: on every rank, where a measurement failed and `on_error` is `raise`.
        """
        late, found = self._late, self._untold
        self._untold = []
        if late is None:
            return found

        def drained() -> tuple[list[Point], list[Point]]:
            began = time.perf_counter()
            arrivals = late.drain(module, step)
            waited = time.perf_counter() - began
            found.extend(self._take_in(arrivals))
            if arrivals:
                self._say(self._lines.of_the_end(waited))
            late.raise_failures()
            return self.curve, self._points

        if not alone:
            self.curve, self._points = self.ranks.on_rank_zero(drained)
        elif self.ranks.is_first:
            drained()
        return found

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Counts the time within as waited by the training."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._lines.waited(time.perf_counter() - began)

    @property
    def _is_shared(self) -> bool:
        """Whether all ranks measure; with `save` rank 0 alone opens what it writes."""
        return self.config.mode == "sharded" and not self.config.save

    def _do(self, work: Callable[[], T]) -> T:
        """Does `work` on every rank, or on rank 0 alone; gives all ranks what it gave on rank 0."""
        if not self._is_shared:
            return self.ranks.on_rank_zero(work)
        self.ranks.arrive()
        return self.ranks.together(work)[0]

    def state(self) -> dict[str, Any]:
        """What a resumed training needs to continue the curve and the MLflow run."""
        run = self.work.own_run if self.work else None
        progress, left = self._progress, self._left
        if self._late is not None:
            progress, left = self._late.progress_state(), self._late.state()
        elif self.work is not None:
            progress = self.work.progress.state()
        return {
            "validations": self._validations,
            "last_step": self.last_step,
            "run": run or self._run,
            "points": list(self._points),
            "progress": progress,
            "background": left,
        }

    def load(self, state: Mapping[str, Any], fits: bool = True) -> None:
        """Continues an interrupted training, see `state`; its MLflow run alone where the loop does not train."""
        if fits:
            self._validations = state["validations"]
            self.last_step = state["last_step"]
            self._points = list(state["points"])
            self._progress, self._left = state.get("progress"), state.get("background")
        self._run = state["run"]
        if self.work:
            self.work.earlier_run = self._run
        if fits:
            self._continue()

    def close(self, status: str) -> None:
        """Draws the curves, and ends the MLflow run if it was opened here."""
        self._close_late()
        if self.work is not None:
            self._run = self.work.own_run or self._run
            self._progress = self.work.progress.state()
            self.overview = self.work.progress.overview
            self.summary = self.work.progress.summary(self._points, self.config)
            self.work.close(status, self._points)
        self.work = None
        self.ranks.close()
        if self._at_exit is not None:
            atexit.unregister(self._at_exit)
            self._at_exit = None

    def close_at_exit(self) -> None:
        """Closes when the program ends, if that is not done before, also where nothing else holds the session by then.

        Called after a measurement, when MLflow and W&B have registered what they do then: it comes after this.
        """
        if self._at_exit is None:
            self._at_exit = self._close_as_the_program_ends
            atexit.register(self._at_exit)

    def _close_as_the_program_ends(self) -> None:
        error = getattr(sys, "last_value", None)
        failed = "FAILED" if isinstance(error, Exception) else "KILLED"
        try:
            if error is None:
                self.finish(alone=True)
        finally:
            self.close("FINISHED" if error is None else failed)

    def _continue(self) -> None:
        """Changes are since the first measurement before an interruption."""
        if self.work and self._progress is not None:
            self.work.progress = Progress.from_state(self._progress)
        if self._late is not None and self._left is not None:
            self._untold += self._take_in(self._late.resume(self._left, self._progress, self.last_step))
            self._left = None
        elif self.work and self._left is not None and self._left["pending"] and self._is_never_late:
            steps = ", ".join(map(str, self._left["pending"]))
            self.work.host.warn(f"steps {steps} of before the interruption are not measured: mode is not background")
            self._left = None

    def _take_in(self, arrivals: Sequence[Arrival]) -> list[Point]:
        """Adds measurements that have come back to the curve, and says them. Returns those that are new."""
        new = []
        for one in arrivals:
            self._add(one.step, one.metrics)
            if one.is_new and one.metrics:
                new.append((one.step, one.metrics))
                self._say(self._lines.of_measurement(one.step, one.metrics, one.waited, one.seconds))
        self.curve += new
        return new

    def _add(self, step: int, metrics: dict[str, float]) -> None:
        """Adds a measurement to the points, in the order of their steps; a step without any gives way to one with."""
        if not metrics and any(known == step for known, _ in self._points):
            return
        others = [point for point in self._points if point[0] != step or point[1]]
        self._points = sorted([*others, (step, metrics)], key=lambda point: point[0])

    def _close_late(self) -> None:
        """Takes in what is there, and ends the worker."""
        if self._late is not None and self.work is not None:
            self._take_in(self._late.close())
            self.work.progress = self._late.progress() or self.work.progress
            self._left, self._late = self._late.state(), None

    def _say(self, line: str) -> None:
        if self.work is not None and self.ranks.is_first:
            self.work.host.say(line)
