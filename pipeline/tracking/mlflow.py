"""Applies the records of a journal to MLflow: a run per measurement, with a nested run per stage.

Applying a record twice has the same effect as applying it once: runs and models have a key of the journal as a tag,
which is searched for before they are made. Choices were measured on MLflow 3.17. Runs are written through
`MlflowClient` by id: the fluent API keeps its active run per thread, and would open a second run for a caller that has
an active run.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModel,
    LoggedModelStatus,
    Metric,
    Param,
    Run,
    RunTag,
    ViewType,
)
from mlflow.exceptions import MlflowException
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.models.utils import get_external_mlflow_model_spec
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL

from pipeline.store.temporary import temporary_folder
from pipeline.tracking.client import connect, fail_fast, patient, sweep
from pipeline.tracking.delivery import RefusedError
from pipeline.tracking.journal import Journal, Record
from pipeline.tracking.journal_owner import KEY, WRITER, lives
from pipeline.tracking.mlflow_served import link_model, log_served

MAX_RUNS = 10_000  # that may be RUNNING, or nested in a run
# Error codes of answers that will be the same next time; any other may be a server in trouble.
REFUSALS = {
    "INVALID_PARAMETER_VALUE",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
    "BAD_REQUEST",
    "INVALID_STATE",
}


class MlflowSink:
    """Applies records to a server or database. See `Sink`."""

    def __init__(self, uri: str, journal: Journal) -> None:
        """Connects; in the thread that will apply the records."""
        fail_fast()
        self.client = connect(uri)
        self.journal = journal
        self.ids: dict[str, str] = {}
        self.experiments: dict[str, str] = {}
        self._models: dict[tuple[str, str], str] = {}
        self._refused: set[str] = set()  # runs that could not be made

    def apply(self, records: Sequence[Record]) -> None:
        """See `Sink.apply`."""
        first = records[0]
        fail_fast()  # each call may come from another thread
        if "run" not in first:  # the head of the journal, or a line that a kill tore
            return
        try:
            if first["op"] == "run":
                self._run(first)
            elif first["op"] == "metrics":
                self._metrics(self.run_id(first["run"]), records)
            else:
                getattr(self, f"_{first['op']}")(self.run_id(first["run"]), first)
        except (MlflowException, ImportError) as error:
            if isinstance(error, MlflowException) and error.error_code not in REFUSALS:
                raise
            key = first["run"]
            refused = RefusedError(f"{first['op']} of run {key[:8]}: {error}", known=key in self._refused)
            if key not in self.ids:  # then everything else of the run is refused as well
                self._refused.add(key)
            raise refused from error

    def answers(self) -> bool:
        """See `Sink.answers`."""
        try:
            self.client.search_experiments(max_results=1)
        except MlflowException:
            return False
        return True

    def run_id(self, key: str) -> str:
        """The id of a run, by its key; searched for on the server if this object did not make it."""
        if key not in self.ids:
            if key not in self.journal.runs:
                raise RefusedError(f"run {key[:8]}: the journal does not hold its beginning")
            self._begin(self.journal.runs[key], again=False)
        return self.ids[key]

    def _run(self, record: Record) -> None:
        self._begin(record, again=True)
        if not record.get("parent"):
            sweep(self.client, self.experiments[record["run"]])

    def _begin(self, record: Record, again: bool) -> None:
        """Finds the run of a record, or makes it; with `again`, a run that had ended is opened again."""
        key, given = record["run"], record.get("run_id")
        if given:
            experiment = self.client.get_run(given).info.experiment_id
            self._tag(given, record["tags"])
            if record.get("name"):
                self.client.update_run(given, name=record["name"])
        else:
            experiment = self._experiment_of(record)
            found = self._find(experiment, key)
            if found and again:
                self._go_on(found, record)
            given = found.info.run_id if found else self._create(experiment, record)
        self.ids[key], self.experiments[key] = given, experiment

    def _create(self, experiment: str, record: Record) -> str:
        tags = {**record["tags"], KEY: record["run"]}
        if record.get("parent"):
            tags["mlflow.parentRunId"] = self.run_id(record["parent"])
        # Where there is no name, MLflow draws one with the random state of the training.
        name = record.get("name") or f"run {record['run'][:8]}"
        made = self.client.create_run(experiment, record["time"], tags, name)
        return str(made.info.run_id)

    def _go_on(self, run: Run, record: Record) -> None:
        """Opens a run again that ended before this record; not if another process has continued it."""
        ended, writer = run.info.end_time, run.data.tags.get(WRITER)
        other = not ended and writer is not None and writer != record["tags"].get(WRITER)
        if (ended and ended >= record["time"]) or (other and lives(Path(str(writer)))):
            return
        self.client.update_run(run.info.run_id, status="RUNNING")
        self._tag(run.info.run_id, record["tags"])

    def _find(self, experiment: str, key: str) -> Run | None:
        """The run with this key; of two that a late answer left, the run that was written to."""
        return max(
            self._with_key(experiment, key), key=lambda run: len(run.data.metrics) + len(run.data.params), default=None
        )

    def _with_key(self, experiment: str, key: str) -> list[Run]:
        return list(self.client.search_runs([experiment], f"tags.`{KEY}` = '{key}'", ViewType.ACTIVE_ONLY, 10))

    def _remove_others(self, key: str) -> None:
        """Deletes a second run, which the server makes if it serves a request late that was sent again meanwhile."""
        for run in self._with_key(self.experiments[key], key):
            if run.info.run_id != self.ids[key]:
                self.client.delete_run(run.info.run_id)

    def _experiment_of(self, record: Record) -> str:
        if record.get("parent"):
            self.run_id(record["parent"])
            return self.experiments[record["parent"]]
        named = record.get("experiment") or {}
        name = named.get("name")
        if not name:
            return str(named.get("id") or "0")
        found = self.client.get_experiment_by_name(name)
        if found is None:
            with contextlib.suppress(MlflowException):  # another process may have made it meanwhile
                return str(self.client.create_experiment(name))
            found = self.client.get_experiment_by_name(name)
        if found is None:
            raise MlflowException(f"experiment '{name}' cannot be made")
        return str(found.experiment_id)

    def _metrics(self, run_id: str, records: Sequence[Record]) -> None:
        metrics = [
            Metric(key, value, record["time"], record["step"], *self._links(record))
            for record in records
            for key, value in record["values"].items()
        ]
        self.client.log_batch(run_id, metrics=metrics)

    def _links(self, record: Record) -> tuple[str | None, str | None, str | None]:
        """The id of the measured model, and the name and digest of the data that it was measured on."""
        name, digest = record.get("data") or (None, None)
        return self._model_id(record), name, digest

    def _parameters(self, run_id: str, record: Record) -> None:
        self.client.log_batch(run_id, params=[Param(key, value) for key, value in record["values"].items()])

    def _tags(self, run_id: str, record: Record) -> None:
        self._tag(run_id, record["values"])

    def _tag(self, run_id: str, values: Mapping[str, str]) -> None:
        self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in values.items()])

    def _name(self, run_id: str, record: Record) -> None:
        self.client.update_run(run_id, name=record["name"])

    def _artifact(self, run_id: str, record: Record) -> None:
        path = self.journal.files / record["file"]
        if not path.is_file():
            raise RefusedError(f"the file '{path}' is gone")
        with patient():
            self.client.log_artifact(run_id, str(path), record["folder"] or None)

    def _served(self, run_id: str, record: Record) -> None:
        folder = self.journal.files / record["file"]
        if not folder.is_dir():
            raise RefusedError(f"the model '{folder}' is gone")
        log_served(self.client, run_id, self.experiments[record["run"]], folder, record)

    def _data(self, run_id: str, record: Record) -> None:
        data = record["data"]
        source = json.dumps({"uri": data["source"]})
        dataset = Dataset(data["name"], data["digest"][:16], "local", source)
        tags = {"mlflow.data.context": data["part"], "rows": str(data["rows"]), "left_out": str(data["left_out"])}
        inputs = DatasetInput(dataset, [InputTag(key, value) for key, value in tags.items()])
        try:
            self.client.log_inputs(run_id, [inputs])
        except MlflowException:  # two processes may insert the same new data set at once: then it exists now
            self.client.log_inputs(run_id, [inputs])

    def _model(self, run_id: str, record: Record) -> None:
        experiment = self.experiments[record["run"]]
        model = self._known_model(experiment, record["digest"]) or self._new_model(experiment, run_id, record)
        if model.status != LoggedModelStatus.READY:
            self._finish(model)
        self._models[experiment, record["digest"]] = model.model_id
        link_model(self.client, run_id, model.model_id, record["step"] or 0)

    def _model_id(self, record: Record) -> str | None:
        """The id of the LoggedModel whose weights were measured; None where the record names no weights."""
        experiment, digest = self.experiments[record["run"]], record.get("model")
        if not digest:
            return None
        if (experiment, digest) not in self._models:
            known = self._known_model(experiment, digest)
            if known is None:
                raise RefusedError(f"the model of {digest[:16]} was not logged")
            self._models[experiment, digest] = known.model_id
        return self._models[experiment, digest]

    def _known_model(self, experiment: str, digest: str) -> LoggedModel | None:
        found = self.client.search_logged_models([experiment], f"tags.`ckpt.digest` = '{digest}'", max_results=1)
        return found[0] if found else None

    def _new_model(self, experiment: str, run_id: str, record: Record) -> LoggedModel:
        """As `mlflow.create_external_model`, which uses the global tracking URI and not this client's."""
        tags = {MLFLOW_MODEL_IS_EXTERNAL: "true", "ckpt.digest": record["digest"], "ckpt.source": record["source"]}
        name = re.sub(r"[/:.%\"']", "_", record["name"])
        params = {} if record["step"] is None else {"global_step": str(record["step"])}
        return self.client.create_logged_model(
            experiment, name=name, source_run_id=run_id, tags=tags, params=params, model_type="checkpoint"
        )

    def _finish(self, model: LoggedModel) -> None:
        with temporary_folder() as folder:
            get_external_mlflow_model_spec(model).save(str(folder / MLMODEL_FILE_NAME))
            with patient():
                self.client.log_model_artifacts(model.model_id, str(folder))
        self.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)

    def _end(self, run_id: str, record: Record) -> None:
        begun = self.journal.runs[record["run"]]
        self.client.set_terminated(run_id, record["status"], record["time"])
        if not begun.get("run_id") and not begun.get("parent"):
            self._remove_others(record["run"])

    def kill_unended(self) -> None:
        """Ends the journal's runs that are RUNNING; only for a journal whose program is gone.

        A program in another container may write a journal of the same path: its runs are not in this journal.
        """
        experiments = [experiment.experiment_id for experiment in self.client.search_experiments()]
        writers = {record["tags"].get(WRITER) for record in self.journal.runs.values()} - {None}
        given = {record.get("run_id") for record in self.journal.runs.values()}
        for run in self.client.search_runs(experiments, "attributes.status = 'RUNNING'", max_results=MAX_RUNS):
            tags, run_id = run.data.tags, run.info.run_id
            if tags.get(WRITER) in writers and (tags.get(KEY) in self.journal.runs or run_id in given):
                self.client.set_terminated(run_id, "KILLED")
