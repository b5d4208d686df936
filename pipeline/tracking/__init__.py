"""What a stage tells a tracker. The adapters for MLflow and others are files of their own beside this one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


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

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Numbers by name, none of them NaN, at a step."""
        ...

    def artifact(self, path: Path) -> None:
        """A file to keep."""
        ...

    def note(self, text: str) -> None:
        """A line for whoever reads the run: a warning, or why a metric is left out."""
        ...

    def data(self, data: Data) -> None:
        """A part of the data that was used."""
        ...


class NullTracker:
    """Keeps nothing."""

    @contextmanager
    def step(self, name: str) -> Iterator[Tracker]:  # noqa: ARG002
        """See `Tracker.step`."""
        yield self

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """See `Tracker.metrics`."""

    def artifact(self, path: Path) -> None:
        """See `Tracker.artifact`."""

    def note(self, text: str) -> None:
        """See `Tracker.note`."""

    def data(self, data: Data) -> None:
        """See `Tracker.data`."""
