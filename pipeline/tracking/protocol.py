"""The protocol of trackers, and those that pass on to others: several, at one step, with failures as warnings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pipeline.statistics.metrics import is_shown_first, shown_at

T = TypeVar("T")
logger = logging.getLogger(__name__)

FOLDER = "downstream"  # of a measurement's files, in the run of a training
KIND = f"{FOLDER}.kind"  # tag of every run: what it is of
VERDICT = f"{FOLDER}.verdict."  # begins the tags with what is said of each task
FAILED = f"{FOLDER}.failed.step "  # begins the tags with why a measurement of a training failed
MEASUREMENT, CHECKPOINTS, COMPARISON, STAGE, TRAINING = "measurement", "checkpoints", "comparison", "stage", "training"
PREDICTIONS = "predictions_"  # before the task's name, in the name of the file of its predictions


@dataclass(frozen=True)
class Data:
    """A part of a task's data: its name, its source, a digest, how many sequences are used and how many left out."""

    name: str
    part: str
    source: str
    digest: str
    rows: int
    left_out: int


@dataclass(frozen=True)
class Served:
    """A model that answers for a task, and how good it is.

    Attributes:
        task: the task's name, of letters, digits, `_` and `-`.
        metrics: names of the metrics that are the model's too.
        headline: the name of the metric by which models of the task are ranked; empty for none.
        value: of that metric.
        lower_is_better: of that metric.
        data: a digest of what it was measured on.
        registered: the name that it is registered under; None for none.
    """

    task: str
    metrics: Sequence[str]
    headline: str
    value: float | None
    lower_is_better: bool
    data: str
    registered: str | None = None


class Tracker(Protocol):
    """Where results are logged."""

    def stage(self, name: str) -> AbstractContextManager[Tracker]:
        """Begins a stage, and gives the tracker for what belongs to it. An exception ends the stage as failed."""

    def metrics(self, values: Mapping[str, float], step: int = 0, data: Data | None = None) -> None:
        """Logs numbers by name, none of them NaN, at a step; `data` is what they were measured on."""

    def artifact(self, path: Path, folder: str = "", step: int = 0) -> None:
        """Stores a file in a folder of the run's files; a picture may be shown at a step."""

    def served(self, folder: Path, model: Served, step: int = 0) -> None:
        """Stores a folder that holds a model which can be served. Its metrics at that step have been logged."""

    def note(self, text: str) -> None:
        """Logs a line for the readers of the run: a warning, or why a metric is left out."""

    def data(self, data: Data) -> None:
        """Logs a part of the data that was used."""


class Run(Tracker, Protocol):
    """A run of MLflow's that belongs to one checkpoint."""

    def rename(self, name: str) -> None:
        """Gives the run another name."""

    def describe(self, markdown: str) -> None:
        """The description on the run's page."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Sets tags of the run."""

    def parameters(self, values: Mapping[str, Any], prefix: str = "cfg.") -> None:
        """Logs settings, nested ones too, as `<prefix><key>`."""

    def checkpoint(self, name: str, digest: str, source: str, step: int | None = None, in_stages: bool = False) -> None:
        """Links the run's metrics from here on to the model of these weights; `in_stages`: or its stages' metrics."""


class Several:
    """Passes everything on to several trackers."""

    trackers: Sequence[Tracker] = ()

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        """In this order."""
        self.trackers = trackers

    @contextmanager
    def stage(self, name: str) -> Iterator[Tracker]:
        """See `Tracker.stage`."""
        with ExitStack() as stack:
            yield Several([stack.enter_context(tracker.stage(name)) for tracker in self.trackers])

    def metrics(self, values: Mapping[str, float], step: int = 0, data: Data | None = None) -> None:
        """See `Tracker.metrics`."""
        self._each("metrics", lambda tracker: tracker.metrics(values, step, data))

    def artifact(self, path: Path, folder: str = "", step: int = 0) -> None:
        """See `Tracker.artifact`."""
        self._each(path.name, lambda tracker: tracker.artifact(path, folder, step))

    def served(self, folder: Path, model: Served, step: int = 0) -> None:
        """See `Tracker.served`."""
        self._each(f"the model of {model.task}", lambda tracker: tracker.served(folder, model, step))

    def note(self, text: str) -> None:
        """See `Tracker.note`."""
        self._each("a note", lambda tracker: tracker.note(text))

    def data(self, data: Data) -> None:
        """See `Tracker.data`."""
        self._each("a data set", lambda tracker: tracker.data(data))

    def _each(self, what: str, log: Callable[[Tracker], None]) -> None:  # noqa: ARG002
        for tracker in self.trackers:
            log(tracker)


class NullTracker(Several):
    """Discards everything; base of trackers that override some of the methods."""


class Headlines(Several):
    """Passes on the numbers that a reader looks at first; its stages get every number."""

    def metrics(self, values: Mapping[str, float], step: int = 0, data: Data | None = None) -> None:
        """See `Tracker.metrics`."""
        if first := sorted(filter(is_shown_first, values), key=shown_at):
            super().metrics({name: values[name] for name in first}, step, data)


class AtStep(Several):
    """Logs results at the training step of the weights; stages keep their own steps, such as epochs, for all else."""

    def __init__(self, inner: Tracker, at: int) -> None:
        """Results go to `inner` at step `at`."""
        super().__init__([inner])
        self.at = at

    @contextmanager
    def stage(self, name: str) -> Iterator[Tracker]:
        """See `Tracker.stage`."""
        with super().stage(name) as run:
            yield _StageAtStep(run, self.at)

    def metrics(self, values: Mapping[str, float], step: int = 0, data: Data | None = None) -> None:  # noqa: ARG002
        """See `Tracker.metrics`."""
        super().metrics(values, self.at, data)

    def artifact(self, path: Path, folder: str = "", step: int = 0) -> None:  # noqa: ARG002
        """See `Tracker.artifact`."""
        super().artifact(path, folder, self.at)

    def served(self, folder: Path, model: Served, step: int = 0) -> None:  # noqa: ARG002
        """See `Tracker.served`."""
        super().served(folder, model, self.at)


class _StageAtStep(AtStep):
    """A stage, whose results are what it has measured on data."""

    def metrics(self, values: Mapping[str, float], step: int = 0, data: Data | None = None) -> None:
        """See `Tracker.metrics`."""
        self.trackers[0].metrics(values, self.at if data else step, data)


class Guarded(Several):
    """A tracker whose failures become warnings."""

    @contextmanager
    def stage(self, name: str) -> Iterator[Tracker]:
        """See `Tracker.stage`."""
        with guarded(f"tracking of {name}", lambda: self.trackers[0].stage(name)) as tracker:
            yield tracker

    def _each(self, what: str, log: Callable[[Tracker], None]) -> None:
        attempt(f"logging of {what}", lambda: log(self.trackers[0]))


def attempt(what: str, act: Callable[[], T], fatal: tuple[type[Exception], ...] = ()) -> T | None:
    """Calls `act`, such as a call of a tracker, whose failure must not stop the work: an exception becomes a warning.

    Args:
        what: names the call in the warning.
        act: the call.
        fatal: exceptions that are raised all the same.
    """
    try:
        return act()
    except fatal:
        raise
    except Exception as error:
        logger.warning("%s failed, work goes on: %s: %s", what, type(error).__name__, " ".join(str(error).split()))
        logger.debug("%s", what, exc_info=True)
        return None


@contextmanager
def guarded(
    what: str, open_tracker: Callable[[], AbstractContextManager[Tracker]], fatal: tuple[type[Exception], ...] = ()
) -> Iterator[Tracker]:
    """Opens and closes a tracker whose failures become warnings; exceptions of the work within pass.

    Args:
        what: names the tracker in the warnings.
        open_tracker: opens it.
        fatal: exceptions that are raised all the same when it is opened.
    """
    context = attempt(what, open_tracker, fatal)
    tracker = attempt(what, context.__enter__, fatal) if context else None
    try:
        yield Guarded([tracker]) if tracker else NullTracker()
    except BaseException as error:
        if context and tracker:
            with suppress(Exception):
                context.__exit__(type(error), error, error.__traceback__)
        raise
    if context and tracker:
        attempt(what, lambda: context.__exit__(None, None, None))
