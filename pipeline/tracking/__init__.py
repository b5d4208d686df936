"""What a stage tells a tracker. The adapters for MLflow and others are files of their own beside this one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

T = TypeVar("T")
logger = logging.getLogger(__name__)

FOLDER = "downstream"  # of the files that a training's run is given


@dataclass(frozen=True)
class Data:
    """A part of a task's data: its name, where it is from, a digest, how many sequences were kept and left out."""

    name: str
    part: str
    source: str
    digest: str
    rows: int
    left_out: int


class Tracker(Protocol):
    """Somewhere that results go."""

    def step(self, name: str) -> AbstractContextManager[Tracker]:
        """A stage: what the tracker it gives is told belongs to the stage. An exception ends the stage as failed."""
        ...

    def metrics(self, values: Mapping[str, float], step: int = 0, data: Data | None = None) -> None:
        """Numbers by name, none of them NaN, at a step; `data` is what they were measured on."""
        ...

    def artifact(self, path: Path, folder: str = "", step: int = 0) -> None:
        """A file to keep, in a folder of the run's files; a picture may be shown at a step."""
        ...

    def note(self, text: str) -> None:
        """A line for whoever reads the run: a warning, or why a metric is left out."""
        ...

    def data(self, data: Data) -> None:
        """A part of the data that was used."""
        ...


class NullTracker:
    """Keeps nothing; others are made from it that keep something, but of stages nothing."""

    @contextmanager
    def step(self, name: str) -> Iterator[Tracker]:  # noqa: ARG002
        """See `Tracker.step`."""
        yield NullTracker()

    def metrics(self, values: Mapping[str, float], step: int = 0, data: Data | None = None) -> None:
        """See `Tracker.metrics`."""

    def artifact(self, path: Path, folder: str = "", step: int = 0) -> None:
        """See `Tracker.artifact`."""

    def note(self, text: str) -> None:
        """See `Tracker.note`."""

    def data(self, data: Data) -> None:
        """See `Tracker.data`."""


class Several:
    """Tells several trackers the same."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        """In this order."""
        self.trackers = trackers

    @contextmanager
    def step(self, name: str) -> Iterator[Tracker]:
        """See `Tracker.step`."""
        with ExitStack() as stack:
            yield Several([stack.enter_context(tracker.step(name)) for tracker in self.trackers])

    def metrics(self, values: Mapping[str, float], step: int = 0, data: Data | None = None) -> None:
        """See `Tracker.metrics`."""
        for tracker in self.trackers:
            tracker.metrics(values, step, data)

    def artifact(self, path: Path, folder: str = "", step: int = 0) -> None:
        """See `Tracker.artifact`."""
        for tracker in self.trackers:
            tracker.artifact(path, folder, step)

    def note(self, text: str) -> None:
        """See `Tracker.note`."""
        for tracker in self.trackers:
            tracker.note(text)

    def data(self, data: Data) -> None:
        """See `Tracker.data`."""
        for tracker in self.trackers:
            tracker.data(data)


class AtStep:
    """A tracker at one step: that of the weights that are measured. Stages keep their own steps, such as epochs."""

    def __init__(self, inner: Tracker, at: int) -> None:
        """What `inner` is told of results is told at step `at`."""
        self.inner = inner
        self.at = at

    def step(self, name: str) -> AbstractContextManager[Tracker]:
        """See `Tracker.step`."""
        return self.inner.step(name)

    def metrics(self, values: Mapping[str, float], step: int = 0, data: Data | None = None) -> None:  # noqa: ARG002
        """See `Tracker.metrics`."""
        self.inner.metrics(values, self.at, data)

    def artifact(self, path: Path, folder: str = "", step: int = 0) -> None:  # noqa: ARG002
        """See `Tracker.artifact`."""
        self.inner.artifact(path, folder, self.at)

    def note(self, text: str) -> None:
        """See `Tracker.note`."""
        self.inner.note(text)

    def data(self, data: Data) -> None:
        """See `Tracker.data`."""
        self.inner.data(data)


def attempt(what: str, act: Callable[[], T], fatal: tuple[type[Exception], ...] = ()) -> T | None:
    """Does something that must not stop the work, such as a call of a tracker; what it raises becomes a warning.

    Args:
        what: names it in the warning.
        act: does it.
        fatal: what is raised all the same.
    """
    try:
        return act()
    except fatal:
        raise
    except Exception as error:
        logger.warning("%s failed, work goes on: %s: %s", what, type(error).__name__, " ".join(str(error).split()))
        logger.debug("%s", what, exc_info=True)
        return None


class Guarded:
    """A tracker whose failures become warnings."""

    def __init__(self, inner: Tracker) -> None:
        """Guards `inner`."""
        self.inner = inner

    def step(self, name: str) -> AbstractContextManager[Tracker]:
        """See `Tracker.step`."""
        return guarded(f"tracking of {name}", lambda: self.inner.step(name))

    def metrics(self, values: Mapping[str, float], step: int = 0, data: Data | None = None) -> None:
        """See `Tracker.metrics`."""
        attempt("logging of metrics", lambda: self.inner.metrics(values, step, data))

    def artifact(self, path: Path, folder: str = "", step: int = 0) -> None:
        """See `Tracker.artifact`."""
        attempt(f"logging of {path.name}", lambda: self.inner.artifact(path, folder, step))

    def note(self, text: str) -> None:
        """See `Tracker.note`."""
        attempt("logging of a note", lambda: self.inner.note(text))

    def data(self, data: Data) -> None:
        """See `Tracker.data`."""
        attempt("logging of a data set", lambda: self.inner.data(data))


@contextmanager
def guarded(
    what: str, open_tracker: Callable[[], AbstractContextManager[Tracker]], fatal: tuple[type[Exception], ...] = ()
) -> Iterator[Tracker]:
    """A tracker that is opened and closed, whose failures become warnings; what the work within raises passes.

    Args:
        what: names it in the warnings.
        open_tracker: opens it.
        fatal: what is raised all the same when it is opened.
    """
    context = attempt(what, open_tracker, fatal)
    tracker = attempt(what, context.__enter__, fatal) if context else None
    try:
        yield Guarded(tracker) if tracker else NullTracker()
    except BaseException as error:
        if context and tracker:
            with suppress(Exception):
                context.__exit__(type(error), error, error.__traceback__)
        raise
    if context and tracker:
        attempt(what, lambda: context.__exit__(None, None, None))
