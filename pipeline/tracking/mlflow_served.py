"""Models that can be served, in MLflow: a LoggedModel with files for each, and versions in the model registry."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from pipeline.tracking.client import patient
from pipeline.tracking.journal_owner import KEY

BEST = "best-"  # before the task's name, in the alias of a registered model
TASK, METRIC, VALUE, DATA = (f"downstream.{name}" for name in ("task", "metric", "value", "data"))  # tags of a version
ALIKE = (TASK, METRIC, DATA)  # of versions that are ranked together


def log_served(client: MlflowClient, run_id: str, experiment: str, folder: Path, record: Mapping[str, Any]) -> None:
    """Makes the LoggedModel of a record and links it to the run, and the run's metrics to it; then registers it.

    What is there already, from an earlier try, is left as it is.

    Args:
        client: of the server.
        run_id: of the run that the model was made in.
        experiment: of that run.
        folder: the model, as MLflow has it.
        record: of the journal.
    """
    found = client.search_logged_models([experiment], f"tags.`{KEY}` = '{record['key']}'", max_results=1)
    model = found[0] if found else _new(client, experiment, run_id, record)
    if model.status != LoggedModelStatus.READY:
        _name_itself(folder, model, run_id)
        with patient():
            client.log_model_artifacts(model.model_id, str(folder))
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    link_model(client, run_id, model.model_id, record["step"])
    _link_metrics(client, run_id, experiment, model.model_id, record)
    if record["served"]["registered"]:
        _register(client, run_id, model.model_id, record)


def link_model(client: MlflowClient, run_id: str, model_id: str, step: int) -> None:
    """Makes a LoggedModel an output of a run, unless it is."""
    outputs = client.get_run(run_id).outputs
    if not any(output.model_id == model_id for output in (outputs.model_outputs if outputs else [])):
        client.log_outputs(run_id, [LoggedModelOutput(model_id, step)])


def _new(client: MlflowClient, experiment: str, run_id: str, record: Mapping[str, Any]) -> LoggedModel:
    return client.create_logged_model(
        experiment,
        name=f"model-{record['served']['task']}",
        source_run_id=run_id,
        tags={KEY: record["key"], "downstream.ckpt": record["model"]},
        params={"global_step": str(record["step"])},
        model_type="served",
    )


def _name_itself(folder: Path, model: LoggedModel, run_id: str) -> None:
    """Writes into a model's own description which LoggedModel it is: those who load it ask for that."""
    path = folder / MLMODEL_FILE_NAME
    described = Model.load(str(folder))
    described.model_id = described.model_uuid = model.model_id
    described.run_id, described.artifact_path = run_id, model.artifact_location
    described.model_size_bytes = sum(one.stat().st_size for one in folder.rglob("*") if one.is_file())
    path.unlink()  # it may be a link
    described.save(str(path))


def _link_metrics(client: MlflowClient, run_id: str, experiment: str, model_id: str, record: Mapping[str, Any]) -> None:
    """Links metrics at the step to the model, as MLflow's own `log_model` does: the run's, and others of its stages."""
    wanted = set(record["served"]["metrics"])
    stages = client.search_runs([experiment], f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{run_id}'")
    for run in (client.get_run(run_id), *stages):
        points = [
            Metric(point.key, point.value, point.timestamp, point.step, model_id)
            for name in sorted(wanted & set(run.data.metrics))
            for point in client.get_metric_history(run.info.run_id, name)
            if point.step == record["step"]
        ]
        client.log_batch(run.info.run_id, metrics=points)
        wanted -= {point.key for point in points}


def _register(client: MlflowClient, run_id: str, model_id: str, record: Mapping[str, Any]) -> None:
    """Makes a version of the model, and has the alias of its task name the best version measured on the same data."""
    served, name = record["served"], record["served"]["registered"]
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {KEY: record["key"], TASK: served["task"], DATA: served["data"]}
    if served["value"] is not None:
        tags |= {METRIC: served["headline"], VALUE: repr(served["value"])}
    if not any(one.tags.get(KEY) == record["key"] for one in _versions(client, name)):
        client.create_model_version(name, f"models:/{model_id}", run_id, tags, model_id=model_id)
    same = [one for one in _versions(client, name) if all(one.tags.get(key) == tags.get(key) for key in ALIKE)]
    alike = [one for one in same if VALUE in one.tags]
    if alike:
        sign = -1 if served["lower_is_better"] else 1
        best = max(alike, key=lambda one: (sign * float(one.tags[VALUE]), -int(one.version)))
        client.set_registered_model_alias(name, BEST + served["task"], str(best.version))


def _versions(client: MlflowClient, name: str) -> list[ModelVersion]:
    return list(client.search_model_versions(f"name = '{name}'"))
