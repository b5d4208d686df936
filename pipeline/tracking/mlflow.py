"""MLflow: a run per measurement, with a nested run per stage. Facts behind the choices are measured on MLflow 3.17.

Runs are written through `MlflowClient` by id: the fluent API keeps its active run per thread, and would open a second
one for a caller that has its own.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import (
    DatasetInput,
    InputTag,
    LoggedModel,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
    RunTag,
)
from mlflow.exceptions import MlflowException
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.models.utils import get_external_mlflow_model_spec
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL

from pipeline.errors import CheckpointError, TrackingError
from pipeline.tracking import Data

NOTE = "mlflow.note.content"
PROCESS = "pipeline.process"
HOST = "pipeline.host"
BATCH = 100  # most parameters or tags in one call; a server refuses more


class MlflowTracker:
    """Writes to one run; its steps are nested runs."""

    def __init__(self, client: MlflowClient, experiment_id: str, run_id: str) -> None:
        """The run must exist."""
        self.client = client
        self.experiment_id = experiment_id
        self.run_id = run_id
        self.model_id: str | None = None
        self._notes: list[str] = []

    @contextmanager
    def step(self, name: str) -> Iterator[MlflowTracker]:
        """See `Tracker.step`. The nested run ends as FINISHED, FAILED or KILLED."""
        tags = {**resolve_tags(), "mlflow.parentRunId": self.run_id, **_process_tags()}
        run = self.client.create_run(self.experiment_id, run_name=name, tags=tags)
        child = MlflowTracker(self.client, self.experiment_id, run.info.run_id)
        with _ending(child):
            yield child

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """See `Tracker.metrics`. On a run with a checkpoint, the metrics are linked to it too."""
        now = int(time.time() * 1000)
        metrics = [Metric(key, float(value), now, step, model_id=self.model_id) for key, value in values.items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def artifact(self, path: Path) -> None:
        """See `Tracker.artifact`."""
        self.client.log_artifact(self.run_id, str(path))

    def note(self, text: str) -> None:
        """See `Tracker.note`. Notes are the run's description."""
        self._notes.append(text)
        self.describe("\n".join(f"- {note}" for note in self._notes))

    def data(self, data: Data) -> None:
        """See `Tracker.data`."""
        from mlflow.data import sources

        source = sources.LocalArtifactDatasetSource(data.source)  # type: ignore[attr-defined]
        dataset = MetaDataset(source, name=f"{data.name} {data.part}", digest=data.digest[:16])  # type: ignore[abstract]
        tags = {"mlflow.data.context": data.part, "rows": str(data.rows), "left_out": str(data.left_out)}
        inputs = DatasetInput(dataset._to_mlflow_entity(), [InputTag(key, value) for key, value in tags.items()])
        for last in (False, False, True):
            try:
                self.client.log_inputs(self.run_id, [inputs])
                break
            except MlflowException:  # two processes may insert the same new data set at once: then it is there now
                if last:
                    raise

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Nested settings as `cfg.<key>`: MLproject's own parameters are logged by `mlflow run`, under their names."""
        flat = [Param(f"cfg.{key}", str(value)[:6000]) for key, value in _flatten(values)]
        for begin in range(0, len(flat), BATCH):
            self.client.log_batch(self.run_id, params=flat[begin : begin + BATCH])

    def tags(self, values: Mapping[str, str]) -> None:
        """Tags of the run."""
        self.client.log_batch(self.run_id, tags=[RunTag(key, value[:8000]) for key, value in values.items()])

    def text(self, content: str, name: str) -> None:
        """A text artifact."""
        self.client.log_text(self.run_id, content, name)

    def describe(self, markdown: str) -> None:
        """The description on the run's page."""
        self.tags({NOTE: markdown})

    def checkpoint(self, name: str, digest: str, source: str, step: int = 0) -> None:
        """Links the run's metrics from here on to the LoggedModel of what is measured, made if it is not there yet."""
        known = self.client.search_logged_models(
            [self.experiment_id], filter_string=f"tags.`ckpt.digest` = '{digest}'", max_results=1
        )
        model = known[0] if known else self._new_model(name, digest, source)
        self.model_id = model.model_id
        with contextlib.suppress(MlflowException):  # the run is linked to the same weights already
            self.client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step)])

    def _new_model(self, name: str, digest: str, source: str) -> LoggedModel:
        """As `mlflow.create_external_model`, which goes to whatever server was named last."""
        tags = {MLFLOW_MODEL_IS_EXTERNAL: "true", "ckpt.digest": digest, "ckpt.source": source}
        model = self.client.create_logged_model(
            self.experiment_id,
            name=re.sub(r"[/:.%\"']", "_", name),
            source_run_id=self.run_id,
            tags=tags,
            model_type="checkpoint",
        )
        with tempfile.TemporaryDirectory() as folder:
            get_external_mlflow_model_spec(model).save(str(Path(folder) / MLMODEL_FILE_NAME))
            self.client.log_model_artifacts(model.model_id, folder)
        return self.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)

    @property
    def link(self) -> str:
        """The run's page, below the address of the UI. Without the last part MLflow 3 opens its view for agents."""
        return f"/#/experiments/{self.experiment_id}/runs/{self.run_id}?workflowType=machine_learning"

    @property
    def runs_link(self) -> str:
        """The experiment's table of runs, likewise."""
        return f"/#/experiments/{self.experiment_id}/runs?workflowType=machine_learning"


def connect() -> MlflowClient:
    """A client of the tracking server or database in force.

    A new SQLite database is made by one process at a time: MLflow makes it without a lock, and two at once break it.
    """
    uri = mlflow.get_tracking_uri()
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or ":memory:" in uri or not os.access(path.parent, os.W_OK):
        return MlflowClient()
    with FileLock(f"{path}.lock"):
        return MlflowClient()


@contextmanager
def open_run(name: str, tracking_uri: str = "") -> Iterator[MlflowTracker]:
    """The run of a measurement: the one that `mlflow run` made, else a new one. Sweeps up what a kill left RUNNING.

    Raises:
        TrackingError: the tracking server or database cannot be used.
    """
    if tracking_uri:
        mlflow.set_tracking_uri(tracking_uri)
    given = os.environ.get("MLFLOW_RUN_ID")
    try:
        client = connect()
        if given:
            experiment_id = client.get_run(given).info.experiment_id
            run_id = given
            client.update_run(run_id, name=name)
            client.log_batch(run_id, tags=[RunTag(key, value) for key, value in _process_tags().items()])
            sweep(client, experiment_id)
            tracker = MlflowTracker(client, experiment_id, run_id)
        else:
            tracker = new_run(client, name)
    except MlflowException as error:
        raise TrackingError(f"MLflow at '{mlflow.get_tracking_uri()}' cannot be used: {error}") from error
    try:
        with _ending(tracker):
            yield tracker
    except MlflowException as error:
        raise TrackingError(f"MLflow at '{mlflow.get_tracking_uri()}' refused: {error}") from error


def fail_run(message: str) -> None:
    """Says on the run that `mlflow run` made why it failed, where no tracker was open yet; never raises."""
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if run_id:
        with contextlib.suppress(MlflowException):
            MlflowClient().set_tag(run_id, NOTE, f"**Failed:** {message}")


def download(uri: str) -> Path:
    """A local copy of what an MLflow URI names, gone when the program ends. Raises CheckpointError if there is none."""
    folder = tempfile.mkdtemp(prefix="checkpoint-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=folder))
    except (MlflowException, OSError) as error:
        raise CheckpointError(
            f"ckpt: '{uri}' cannot be downloaded from '{mlflow.get_tracking_uri()}': {error}"
        ) from error


def resume_run(client: MlflowClient, run_id: str) -> MlflowTracker | None:
    """A run that this project opened before, open again; None if it is not there any more."""
    try:
        run = client.get_run(run_id)
        client.update_run(run_id, status="RUNNING")
    except MlflowException:
        return None
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in _process_tags().items()])
    return MlflowTracker(client, run.info.experiment_id, run_id)


def new_run(client: MlflowClient, name: str) -> MlflowTracker:
    """A new run in the experiment that MLflow's own variables name. Sweeps up what a kill left RUNNING."""
    experiment_id = _experiment(client)
    tags = {**resolve_tags(), **_process_tags()}
    run_id = client.create_run(experiment_id, run_name=name, tags=tags).info.run_id
    sweep(client, experiment_id)
    return MlflowTracker(client, experiment_id, run_id)


def sweep(client: MlflowClient, experiment_id: str) -> None:
    """Ends runs of this machine whose process is gone: SIGKILL leaves them RUNNING."""
    mine = f"attributes.status = 'RUNNING' and tags.`{HOST}` = '{socket.gethostname()}'"
    for run in client.search_runs([experiment_id], mine):
        if not _alive(run.data.tags.get(PROCESS, "")):
            client.set_terminated(run.info.run_id, "KILLED")


@contextmanager
def _ending(tracker: MlflowTracker) -> Iterator[None]:
    """Ends the run with the status that the exception, if there is one, calls for."""
    try:
        yield
    except Exception as error:
        tracker.describe(f"**Failed:** {error}")
        tracker.client.set_terminated(tracker.run_id, "FAILED")
        raise
    except BaseException:
        tracker.client.set_terminated(tracker.run_id, "KILLED")
        raise
    tracker.client.set_terminated(tracker.run_id, "FINISHED")


def _experiment(client: MlflowClient) -> str:
    """The experiment that MLflow's own variables name, or the default one."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME")
    if not name:
        return os.environ.get("MLFLOW_EXPERIMENT_ID", "0")
    found = client.get_experiment_by_name(name)
    return str(found.experiment_id if found else client.create_experiment(name))


def _flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, (dict, list)) and values:
        items = values.items() if isinstance(values, dict) else enumerate(values)
        for key, value in items:
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values


def _process_tags() -> dict[str, str]:
    return {HOST: socket.gethostname(), PROCESS: f"{os.getpid()} {_started(os.getpid())}"}


def _started(pid: int) -> str:
    """When a process started, in clock ticks since boot, so that a number used again is not taken for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return "?"


def _alive(process: str) -> bool:
    pid, _, started = process.partition(" ")
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return started in ("?", _started(int(pid)))
