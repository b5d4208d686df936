"""MLflow's client: how it is made, how long it tries, and what is asked of it outside a measurement."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import socket
import tempfile
import threading
from pathlib import Path
from typing import Any

import mlflow
from filelock import FileLock
from mlflow import MlflowClient, environment_variables
from mlflow.exceptions import MlflowException

from pipeline.errors import CheckpointError
from pipeline.tracking.journal import HOST, NOTE, PROCESS, alive

# For this thread alone, MLflow's client asks once and waits briefly: the sender has manners of its own, and a create
# that the client repeats by itself after a lost answer makes two.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": 0, "MLFLOW_HTTP_REQUEST_TIMEOUT": 10}
brief: Any = threading.local()


def connect(uri: str = "") -> MlflowClient:
    """A client of the tracking server or database in force, or of the one at `uri`.

    A new SQLite database is made by one process at a time: MLflow makes it without a lock, and two at once break it.
    """
    uri = uri or mlflow.get_tracking_uri()
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or ":memory:" in uri or not os.access(path.parent, os.W_OK):
        return MlflowClient(uri)
    with FileLock(f"{path}.lock"):
        return MlflowClient(uri)


def be_brief() -> None:
    """Makes MLflow's client give up soon, in this thread alone; what the user's environment says holds."""
    brief.on = True
    for name, value in PATIENCE.items():
        variable = getattr(environment_variables, name, None)
        if variable is not None and not hasattr(variable, "usual"):
            variable.usual = variable.get
            variable.get = lambda variable=variable, value=value: (
                value if getattr(brief, "on", False) and not variable.is_set() else variable.usual()
            )


def fail_run(message: str) -> None:
    """Says on the run that `mlflow run` made why it failed, where no tracker was open yet; never raises."""
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if run_id:
        be_brief()
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


def sweep(client: MlflowClient, experiment_id: str) -> None:
    """Ends runs of this machine whose process is gone: SIGKILL leaves them RUNNING."""
    mine = f"attributes.status = 'RUNNING' and tags.`{HOST}` = '{socket.gethostname()}'"
    for run in client.search_runs([experiment_id], mine):
        if not alive(run.data.tags.get(PROCESS, "")):
            client.set_terminated(run.info.run_id, "KILLED")
