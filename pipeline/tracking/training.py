"""MLflow within a training: measurements go to the training's run, at the step of the weights they measure."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow

from pipeline.tracking import Data, NullTracker, Several, Tracker
from pipeline.tracking.mlflow import MlflowTracker, connect, new_run, resume_run

FOLDER = "downstream"  # of the run's artifacts


class TrainingRun:
    """The MLflow run of a training.

    It is the trainer's own run if it has one, else the active run, else the one that `MLFLOW_RUN_ID` names, else one
    that is opened here, continued after a resume, and ended by `end`.

    Attributes:
        own: whether the run was opened here.
        run_id: its id.
        uri: of its server or database.
    """

    def __init__(self, loggers: Sequence[Any], name: str, earlier: str | None = None) -> None:
        """Finds or opens the run.

        Args:
            loggers: the trainer's.
            name: of a new run.
            earlier: id of the run that was opened here before the training was interrupted.

        Raises:
            MlflowException: the tracking server or database cannot be used.
        """
        found = next((one for one in loggers if is_mlflow_logger(one)), None)
        active = mlflow.active_run()
        given = active.info.run_id if active else os.environ.get("MLFLOW_RUN_ID")
        self.own = found is None and given is None
        if found is not None:
            self.run = MlflowTracker(found.experiment, str(found.experiment_id), str(found.run_id))
        elif given is not None:
            client = connect()
            self.run = MlflowTracker(client, client.get_run(given).info.experiment_id, given)
        else:
            client = connect()
            self.run = (resume_run(client, earlier) if earlier else None) or new_run(client, name)
        self.run_id = self.run.run_id
        self.uri: str = self.run.client.tracking_uri
        self._data: set[Data] = set()

    def describe(self, config: Mapping[str, Any], yaml: str) -> None:
        """Logs the configuration, as parameters and as a file."""
        self.run.parameters(config)
        self.run.text(yaml, f"{FOLDER}/config.yaml")

    @contextmanager
    def measurement(self, step: int, digest: str, source: str, child: bool) -> Iterator[Tracker]:
        """The tracker of one measurement: of the weights with `digest`, at `step`.

        Args:
            step: of the training.
            digest: of the encoder.
            source: where the weights are.
            child: give the measurement a run of its own too, with nested runs for its stages.
        """
        name = f"step={step}"
        self.run.checkpoint(name, digest, source, step)
        here = _AtStep(self.run, step, self._data)
        if not child:
            yield here
            return
        with self.run.step(name) as own:
            own.model_id = self.run.model_id
            yield Several([here, own])

    def failed(self, step: int, message: str) -> None:
        """Says on the run that a measurement failed."""
        self.run.tags({f"{FOLDER}.failed.step {step}": message})

    def end(self, status: str) -> None:
        """Ends the run if it was opened here."""
        if self.own:
            self.run.client.set_terminated(self.run_id, status)


class _AtStep:
    """A tracker that logs a measurement's results, not its stages, at a step of the training."""

    def __init__(self, run: MlflowTracker, step: int, data: set[Data]) -> None:
        self.run = run
        self.at = step
        self._data = data
        self._notes: list[str] = []

    @contextmanager
    def step(self, name: str) -> Iterator[Tracker]:  # noqa: ARG002
        """See `Tracker.step`. Notes of the stages are kept, and nothing else."""
        yield _Notes(self)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:  # noqa: ARG002
        """See `Tracker.metrics`."""
        self.run.metrics(values, self.at)

    def artifact(self, path: Path) -> None:
        """See `Tracker.artifact`."""
        self.run.client.log_artifact(self.run.run_id, str(path), f"{FOLDER}/step={self.at}")

    def note(self, text: str) -> None:
        """See `Tracker.note`."""
        self._notes.append(f"- {text}\n")
        self.run.text("".join(self._notes), f"{FOLDER}/step={self.at}/notes.md")

    def data(self, data: Data) -> None:
        """See `Tracker.data`. A run holds a data set once, however often it was used."""
        if data not in self._data:
            self._data.add(data)
            self.run.data(data)


class _Notes(NullTracker):
    def __init__(self, outer: _AtStep) -> None:
        self.outer = outer

    def note(self, text: str) -> None:
        """See `Tracker.note`."""
        self.outer.note(text)


def is_mlflow_logger(logger: Any) -> bool:
    """Whether a trainer's logger is Lightning's for MLflow, of either package."""
    return any(one.__name__ == "MLFlowLogger" for one in type(logger).__mro__)
