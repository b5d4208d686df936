"""MLflow within a training: measurements are logged to the training's run, at the step of the measured weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow

from pipeline.config.schema import Config
from pipeline.config.yaml_file import to_mapping
from pipeline.statistics.metrics import shown_at
from pipeline.tracking.client import shown
from pipeline.tracking.journal_run import JournalRun
from pipeline.tracking.mirrors import is_kind
from pipeline.tracking.protocol import (
    FAILED,
    FOLDER,
    KIND,
    MEASUREMENT,
    AtStep,
    Data,
    Headlines,
    NullTracker,
    Served,
    Several,
    Tracker,
)
from pipeline.tracking.runs import OpenRun, journal_path


class TrainingRun:
    """The MLflow run of a training, written by way of a journal: nothing here waits for a server.

    It is the run of the trainer's logger, else the active run, else the run that `MLFLOW_RUN_ID` names, else a new run
    that is continued after a resume and ended by `end`.

    Attributes:
        own: whether the run was opened here.
        opened: the run with its sender; None where the trainer's logger has them.
        run: the tracker to log to.
        run_id: of the run on the server, where it is known.
    """

    def __init__(self, loggers: Sequence[Any], name: str, config: Config, earlier: str | None = None) -> None:
        """Finds or opens the run.

        Args:
            loggers: the trainer's.
            name: of a new run.
            config: names the folder of journals.
            earlier: key of the run that was opened before the training was interrupted.

        Raises:
            OSError: the journal cannot be written.
        """
        self._config = to_mapping(config)
        self.run_id: str | None = None
        self.opened: OpenRun | None = None
        self._data: set[Data] = set()
        journalled = next((logger for logger in loggers if is_kind(logger, "JournalLogger")), None)
        found = next((logger for logger in loggers if is_kind(logger, "MLFlowLogger")), None)
        active = mlflow.active_run()
        self.own = False
        if journalled is not None:
            self.run: JournalRun = journalled.experiment
            return
        if found is not None:
            self.run_id, uri = str(found.run_id), found.experiment.tracking_uri
        else:
            self.run_id = active.info.run_id if active else os.environ.get("MLFLOW_RUN_ID")
            uri = mlflow.get_tracking_uri()
        self.own = self.run_id is None
        what = {"run_id": self.run_id} if self.run_id else {"key": earlier, "name": name}
        self.opened = OpenRun(journal_path(config, name), uri, config.logging.journal is None, **what)
        self.run = self.opened.run

    @property
    def place(self) -> str:
        """Name and address of the run, for the log; the server may not have given its id yet."""
        if self.opened is None:
            return "the run of the trainer's logger"
        self.opened.sender.settle()
        ids = self.opened.ids
        name = f"run {ids[1]}" if ids else "a new run"
        return f"{name} at {shown(self.opened.uri)}"

    @contextmanager
    def measurement(
        self,
        step: int,
        digest: str,
        source: str = "live weights",
        tasks: str = "",
        child: bool = False,
        time: int | None = None,
    ) -> Iterator[Tracker]:
        """The tracker of one measurement, of the weights with `digest` at `step` of the training.

        Args:
            step: of the training; results are logged at it.
            digest: of the encoder.
            source: where the weights are.
            tasks: their names, for the name of the nested run.
            child: logs the measurement to a nested run too, which has a nested run for each stage.
            time: of the metrics, in milliseconds since 1970, so that a server takes those logged once more for the
                same; by default, that of each call.
        """
        name = f"step={step}"
        linked = JournalRun(self.run.journal, self.run.key, self.run.context)  # a logger may write to the run as well
        linked.time = time
        linked.checkpoint(name, digest, source, step)
        here = _Here(linked, self._data, step)
        with here.ordered():
            if not child:
                yield here
                return
            with linked.stage(f"{name} on {tasks}" if tasks else name) as own:
                about = {"step": str(step), "checkpoint": digest[:16], "tasks": tasks}
                own.tags({KIND: MEASUREMENT, **{f"{FOLDER}.{key}": value for key, value in about.items()}})
                own.parameters(self._config)
                own.parameters({"source": source, "step": step, "digest": digest[:16]}, "ckpt.")
                yield Several([here, AtStep(Headlines([own]), step)])

    def failed(self, step: int, message: str) -> None:
        """Tags the run with the failure of a measurement."""
        self.run.tags({f"{FAILED}{step}": message})

    def end(self, status: str) -> None:
        """Ends the run if it was opened here. What has not arrived is sent before the program ends."""
        if self.own:
            self.run.end(status)
        if self.opened:
            self.opened.sender.finish()
            self.opened.sender.settle()


class _Here(AtStep):
    """Logs a measurement's results to the training's run, but not its stages."""

    def __init__(self, run: JournalRun, data: set[Data], at: int) -> None:
        super().__init__(run, at)
        self.run = run
        self._data = data
        self._notes: list[str] = []
        self._numbers: list[tuple[Mapping[str, float], Data | None]] = []
        self._models: list[Callable[[], None]] = []

    @contextmanager
    def ordered(self) -> Iterator[None]:
        """Within, numbers are kept; at the end they are logged, those first that a reader looks at first; then models.

        MLflow's page of a run lists metrics in the order in which they came, as long as a database keeps that.
        """
        try:
            yield
        finally:
            for place in range(3):
                for values, data in self._numbers:
                    chosen = {name: value for name, value in values.items() if shown_at(name) == place}
                    if chosen:
                        super().metrics(chosen, data=data)
            for log in self._models:
                log()
            self._numbers, self._models = [], []

    def metrics(self, values: Mapping[str, float], step: int = 0, data: Data | None = None) -> None:  # noqa: ARG002
        """See `Tracker.metrics`."""
        self._numbers.append((dict(values), data))

    @contextmanager
    def stage(self, name: str) -> Iterator[Tracker]:  # noqa: ARG002
        """See `Tracker.stage`. Only notes of the stages are logged."""
        yield _Notes(self)

    def artifact(self, path: Path, folder: str = "", step: int = 0) -> None:  # noqa: ARG002
        """See `Tracker.artifact`."""
        self.run.artifact(path, f"{FOLDER}/step={self.at}/{folder}".rstrip("/"))

    def served(self, folder: Path, model: Served, step: int = 0) -> None:  # noqa: ARG002
        """See `Tracker.served`."""
        self._models.append(self.run.serving(folder, model, self.at))

    def note(self, text: str) -> None:
        """See `Tracker.note`. Notes are a file beside the others of the measurement."""
        self._notes.append(f"- {text}\n")
        self.run.text("".join(self._notes), f"{FOLDER}/step={self.at}/notes.md")

    def data(self, data: Data) -> None:
        """See `Tracker.data`. A run holds a data set once, however often it was used."""
        if data not in self._data:
            self._data.add(data)
            self.run.data(data)


class _Notes(NullTracker):
    def __init__(self, outer: _Here) -> None:
        self.outer = outer

    def note(self, text: str) -> None:
        """See `Tracker.note`."""
        self.outer.note(text)
