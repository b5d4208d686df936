"""The measurements of one training, whichever loop it has: when they are due, their curve, and what a resume needs."""

from __future__ import annotations

import atexit
import logging
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from pipeline.config.schema import Config
from pipeline.engines.workers import ALONE
from pipeline.errors import PipelineError
from pipeline.report.tables import Table
from pipeline.training.host import Host
from pipeline.training.measurement import Measurement
from pipeline.training.progress import Progress
from pipeline.training.ranks import LostRankError, Ranks

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
        self.ranks = Ranks(config.timeout)
        self.work: Measurement | None = None
        self.curve: list[tuple[int, dict[str, float]]] = []
        self.last_step: int | None = None
        self.description: dict[str, Any] | None = None
        self.overview: Table | None = None
        self.summary = ""
        self._validations = 0
        self._run: str | None = None
        self._points: list[tuple[int, dict[str, float]]] = []  # the curve, with what came before an interruption
        self._progress: dict[str, Any] | None = None  # of rank 0, in the form in which a checkpoint has it
        self._began = self._spent = 0.0
        self._at_exit: Callable[[], None] | None = None

    def forget(self) -> None:
        """Begins anew, for another training, such as another fold."""
        self._validations, self.last_step, self._run = 0, None, None
        self._points, self._progress = [], None

    def open(self, host: Host) -> None:
        """Begins to measure in a loop; every rank calls it."""
        self.ranks.open()
        self.start_clock()
        self._spent = 0.0
        self.work = Measurement(self.config, host, self._run, self.ranks if self._is_shared else ALONE)
        self._continue()

    def start_clock(self) -> None:
        """The time of the training, of which measurements have a share, counts from here."""
        self._began = time.perf_counter()

    def prepare(self, module: nn.Module, may_wait: bool = False) -> None:
        """Finds the encoder and reads all data, see `Measurement.prepare`. Raises PipelineError on every rank alike."""
        assert self.work is not None
        work = self.work

        def prepared() -> dict[str, Any] | None:
            work.prepare(module, may_wait)
            return work.description

        self.description = self._do(prepared)

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
        """The metrics, the same on every rank; empty where the measurement failed and `on_error` is `warn`."""
        assert self.work is not None
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
            return {}
        self.last_step = step
        self.curve.append((step, metrics))
        self._points.append((step, metrics))
        self._report(step, metrics, time.perf_counter() - began)
        return metrics

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
        return {
            "validations": self._validations,
            "last_step": self.last_step,
            "run": run or self._run,
            "points": list(self._points),
            "progress": self.work.progress.state() if self.work else self._progress,
        }

    def load(self, state: Mapping[str, Any], fits: bool = True) -> None:
        """Continues an interrupted training, see `state`; its MLflow run alone where the loop does not train."""
        if fits:
            self._validations = state["validations"]
            self.last_step = state["last_step"]
            self._points = list(state["points"])
            self._progress = state.get("progress")
            self._continue()
        self._run = state["run"]
        if self.work:
            self.work.earlier_run = self._run

    def close(self, status: str) -> None:
        """Draws the curves, and ends the MLflow run if it was opened here."""
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
        self.close("FINISHED" if error is None else failed)

    def _continue(self) -> None:
        """Changes are since the first measurement before an interruption."""
        if self.work and self._progress is not None:
            self.work.progress = Progress.from_state(self._progress)

    def _report(self, step: int, metrics: Mapping[str, float], seconds: float) -> None:
        """Says the headline metrics, the seconds of the measurement, and its share of the training time."""
        self._spent += seconds
        share = 100 * self._spent / max(time.perf_counter() - self._began, 1e-9)
        numbers = ", ".join(f"{name} {metrics[name]:.4f}" for name in self.config.headlines if name in metrics)
        cost = f"{seconds:.1f} s; {share:.0f} % of the training time so far"
        if self.work is not None and self.ranks.is_first:
            self.work.host.say(f"downstream validation at step {step}: {numbers} ({cost})")
