"""MLflow's client: how it is made, how long it tries, and what it is used for outside a measurement."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mlflow
from filelock import FileLock
from mlflow import MlflowClient, environment_variables
from mlflow.exceptions import MlflowException

from pipeline.errors import CheckpointError
from pipeline.store.temporary import temporary_folder
from pipeline.tracking.journal_owner import HOST, KEY, WRITER, lives
from pipeline.tracking.journal_run import NOTE

# Of MLflow's variables, in threads that call `fail_fast`: the client sends a request once and waits briefly. The sender
# tries again by itself, and a client that repeats the creation of a run after a lost answer makes a second run.
FAST = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": 0,
    "MLFLOW_HTTP_REQUEST_TIMEOUT": 10,
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": True,  # two lines for each nested run
}
UPLOAD_SECONDS = 300
ASKED_SECONDS = {"http": 5, "database": 60}  # a machine under load takes long to import what opens a database


class _Thread(threading.local):
    values: Mapping[str, Any] = MappingProxyType({})  # of variables, in this thread


_thread = _Thread()


def _value(variable: Any, usual: Callable[[], Any]) -> Any:
    if variable.name in _thread.values and not variable.is_set():
        return _thread.values[variable.name]
    return usual()


for _name in FAST:
    _variable: Any = getattr(environment_variables, _name, None)  # MLflow 3.1 lacks the last
    if _variable is not None:
        _variable.get = partial(_value, _variable, _variable.get)


def connect(uri: str = "") -> MlflowClient:
    """A client of the server or database at `uri`; by default of MLflow's current one.

    A new SQLite database is created under a lock, and renamed when it is complete. MLflow creates it without a lock:
    two processes at once corrupt it, and what a killed process leaves incomplete cannot be opened again.
    """
    uri = uri or mlflow.get_tracking_uri()
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or set(":?") & set(path.name) or not os.access(path.parent, os.W_OK):
        return MlflowClient(uri)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            new = path.with_name(f"{path.name}.new")
            for left in (new, new.with_name(f"{new.name}-journal")):
                left.unlink(missing_ok=True)
            MlflowClient(f"sqlite:///{new}").search_experiments(max_results=1)
            new.replace(path)
        client = MlflowClient(uri)
    _enable_loggers()
    return client


def _enable_loggers() -> None:
    """Enables this project's loggers again: MLflow 3.1 disables all others when it makes a database."""
    for name, known in logging.root.manager.loggerDict.items():
        if name.startswith("pipeline") and isinstance(known, logging.Logger):
            known.disabled = False


def fail_fast() -> None:
    """Makes MLflow's client give up soon, in this thread alone; variables that the user has set take precedence."""
    _thread.values = FAST


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """Within, a request may take as long as the upload of a file does."""
    _thread.values = {**FAST, "MLFLOW_HTTP_REQUEST_TIMEOUT": UPLOAD_SECONDS}
    try:
        yield
    finally:
        _thread.values = FAST


def shown(uri: str) -> str:
    """An address without the password in it.

    >>> shown("https://me:secret@host:5000/x")
    'https://host:5000/x'
    """
    return re.sub(r"//[^/@]*@", "//", uri)


def fail_run(message: str) -> None:
    """Writes into the run that `mlflow run` made why it failed, before a tracker was open; never raises."""
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if run_id:
        fail_fast()
        with contextlib.suppress(MlflowException):
            MlflowClient().set_tag(run_id, NOTE, f"**Failed:** {message}")


def download(uri: str) -> Path:
    """A local copy of what an MLflow URI names, gone when the program ends. Raises CheckpointError if there is none."""
    kept = contextlib.ExitStack()
    folder = kept.enter_context(temporary_folder())
    atexit.register(kept.close)
    try:
        found = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder))
        if found is None:  # MLflow 3.1
            raise FileNotFoundError("there is no such artifact")
        return Path(found)
    except (MlflowException, OSError) as error:
        raise CheckpointError(
            f"ckpt: '{uri}' cannot be downloaded from '{mlflow.get_tracking_uri()}': {error}"
        ) from error


def answer(uri: str = "") -> tuple[str, str]:
    """An address to show, by default that in force, and why it does not answer; empty where it does.

    A SQLite database, or a folder of runs, that does not exist is not made: the first measurement makes it.
    """
    uri = uri or mlflow.get_tracking_uri()
    place = uri.removeprefix("sqlite:///").removeprefix("file://")
    if "://" not in place and not place.startswith("databricks") and not Path(place).exists():
        writable = os.access(Path(place).absolute().parent, os.W_OK)
        return shown(uri), "" if writable else "its folder cannot be written"
    seconds = ASKED_SECONDS["http" if uri.startswith("http") else "database"]
    answers: list[str] = []

    def ask() -> None:
        fail_fast()
        try:
            MlflowClient(uri).search_experiments(max_results=1)
            answers.append("")
        except Exception as error:  # of the many libraries below MLflow
            text = " ".join(str(error).split())
            reason = re.search(r"\[Errno -?\d+\] ([^'\")]+)", text)  # at the end of what requests says
            answers.append(reason[1] if reason else text[:200] or type(error).__name__)

    thread = threading.Thread(target=ask, name="asking MLflow", daemon=True)
    thread.start()
    thread.join(seconds)
    return shown(uri), next(iter(answers), f"nothing came within {seconds} s")


def sweep(client: MlflowClient, experiment_id: str) -> None:
    """Ends runs of this machine whose program is gone: SIGKILL leaves them RUNNING."""
    mine = f"attributes.status = 'RUNNING' and tags.`{HOST}` = '{socket.gethostname()}'"
    for run in client.search_runs([experiment_id], mine):
        run_id, journal = run.info.run_id, Path(run.data.tags.get(WRITER, ""))
        if lives(journal) or not _names(journal, run.data.tags.get(KEY) or run_id):
            continue
        if client.get_run(run_id).info.status == "RUNNING":  # it may have ended since the search
            client.set_terminated(run_id, "KILLED")


def _names(journal: Path, run: str) -> bool:
    """Whether a journal holds a run, by its key or id; it may be another container's of the same path."""
    with contextlib.suppress(OSError), journal.open("rb") as stream:
        return any(run.encode() in line for line in stream)
    return False
