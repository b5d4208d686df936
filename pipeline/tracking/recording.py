"""Calls of a tracker, kept as plain values and files, so that another process makes them later."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.store.temporary import link_folder
from pipeline.tracking.protocol import Data, NullTracker, Served, Tracker

PLAIN = ("note", "rename", "describe", "tags", "parameters", "checkpoint")  # calls whose arguments are kept as they are


class FailedStageError(Exception):
    """The error that a recorded stage ended with, where it is replayed."""


class Recording(NullTracker):
    """A tracker that keeps what it is told; what is a `Run`'s too.

    Attributes:
        calls: as JSON has them, for `replay`.
    """

    def __init__(self, folder: Path) -> None:
        """Files are copied to `folder`."""
        super().__init__()
        self.folder = folder
        self.calls: list[Any] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[Tracker]:
        """See `Tracker.stage`."""
        within = Recording(self.folder)
        self.calls.append(["stage", name, within.calls])
        try:
            yield within
        except Exception as error:
            within.calls.append(["failed", str(error)])
            raise

    def metrics(self, values: Mapping[str, float], step: int = 0, data: Data | None = None) -> None:
        """See `Tracker.metrics`."""
        numbers = {name: float(value) for name, value in values.items()}
        self.calls.append(["metrics", numbers, step, asdict(data) if data else None])

    def artifact(self, path: Path, folder: str = "", step: int = 0) -> None:
        """See `Tracker.artifact`."""
        kept = f"{os.urandom(8).hex()}/{path.name}"
        (self.folder / kept).parent.mkdir()
        shutil.copyfile(path, self.folder / kept)
        self.calls.append(["artifact", kept, folder, step])

    def served(self, folder: Path, model: Served, step: int = 0) -> None:
        """See `Tracker.served`."""
        kept = os.urandom(8).hex()
        link_folder(folder, self.folder / kept)
        self.calls.append(["served", kept, asdict(model), step])

    def note(self, text: str) -> None:
        """See `Tracker.note`."""
        self.calls.append(["note", text])

    def data(self, data: Data) -> None:
        """See `Tracker.data`."""
        self.calls.append(["data", asdict(data)])

    def rename(self, name: str) -> None:
        """See `Run.rename`."""
        self.calls.append(["rename", name])

    def describe(self, markdown: str) -> None:
        """See `Run.describe`."""
        self.calls.append(["describe", markdown])

    def tags(self, values: Mapping[str, str]) -> None:
        """See `Run.tags`."""
        self.calls.append(["tags", dict(values)])

    def parameters(self, values: Mapping[str, Any], prefix: str = "cfg.") -> None:
        """See `Run.parameters`."""
        self.calls.append(["parameters", dict(values), prefix])

    def checkpoint(self, name: str, digest: str, source: str, step: int | None = None, in_stages: bool = False) -> None:
        """See `Run.checkpoint`."""
        self.calls.append(["checkpoint", name, digest, source, step, in_stages])


def replay(calls: Sequence[Any], tracker: Any, folder: Path) -> None:
    """Makes the calls of a `Recording`, whose files are in `folder`, on a `Tracker`, or a `Run` if some are a run's.

    Raises:
        FailedStageError: a stage ended with an error; then its run does.
    """
    for call, *values in calls:
        if call == "stage":
            with tracker.stage(values[0]) as within:
                replay(values[1], within, folder)
        elif call == "metrics":
            numbers, step, data = values
            tracker.metrics(numbers, step, Data(**data) if data else None)
        elif call == "artifact":
            kept, place, step = values
            tracker.artifact(folder / kept, place, step)
        elif call == "served":
            kept, model, step = values
            tracker.served(folder / kept, Served(**model), step)
        elif call == "data":
            tracker.data(Data(**values[0]))
        elif call == "failed":
            raise FailedStageError(values[0])
        elif call in PLAIN:
            getattr(tracker, call)(*values)
        else:
            raise ValueError(f"a recording has no call '{call}'")
