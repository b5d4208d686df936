"""What was measured before: runs that MLflow has, and journals that were not sent to the end."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

import mlflow
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import Timeout
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from pipeline.errors import ConfigError, TrackingError
from pipeline.statistics.metrics import Metric
from pipeline.store.temporary import host_mark, temporary_folder
from pipeline.tracking.client import connect, fail_fast, shown
from pipeline.tracking.delivery import is_bug, replay
from pipeline.tracking.journal import Journal
from pipeline.tracking.journal_owner import HOST, deserted, is_original, journals_in, remove_journal
from pipeline.tracking.mlflow import MAX_RUNS, MlflowSink
from pipeline.tracking.protocol import CHECKPOINTS, FAILED, FOLDER, KIND, MEASUREMENT, PREDICTIONS, VERDICT

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Earlier:
    """A run that MLflow has: of a measurement, or of a training.

    Attributes:
        run_id: of the run.
        name: the run's; of a measurement the checkpoint's.
        points: downstream metrics at each step, the first step first.
        data: digests of the test sets.
        tables: at each step, the predictions by task, those that were kept and read (`with_predictions`); see
            `Scores.table`.
        verdicts: by task what is said of the last measurement.
        missed: the steps of a training whose measurement failed.
    """

    run_id: str
    name: str
    points: list[tuple[int, dict[str, float]]]
    data: frozenset[str]
    tables: Mapping[int, dict[str, pa.Table]] = field(default_factory=dict)
    verdicts: Mapping[str, str] = field(default_factory=dict)
    missed: tuple[int, ...] = ()


def read_runs(run_ids: Sequence[str], tracking_uri: str = "") -> list[Earlier]:
    """The downstream metrics of runs that MLflow has, without predictions.

    Raises:
        TrackingError: MLflow does not answer, or has no such run.
        ConfigError: a run holds no downstream metric.
    """
    if tracking_uri:
        mlflow.set_tracking_uri(tracking_uri)
    fail_fast()
    try:
        client = connect()
        found = [one for run_id in dict.fromkeys(run_ids) for one in _read(client, client.get_run(run_id))]
    except MlflowException as error:
        raise TrackingError(f"MLflow at '{shown(mlflow.get_tracking_uri())}': {error}; check the run's id") from error
    return list({one.run_id: one for one in found}.values())


def _read(client: MlflowClient, run: Run) -> list[Earlier]:
    """A run; of a run of several checkpoints those of the checkpoints, which have the predictions."""
    several = run.data.tags.get(KIND) == CHECKPOINTS
    read = [_read_one(client, one) for one in (_nested(client, run) if several else [run])]
    found, without = [one for one in read if one.points], [one.name for one in read if not one.points]
    if found and without:
        logger.warning("run %s: left out, as they have no scores: %s", run.info.run_id, ", ".join(without))
    if not found:
        raise ConfigError(f"run '{run.info.run_id}' holds no measurement; give runs of measurements or of trainings")
    return found


def _read_one(client: MlflowClient, run: Run) -> Earlier:
    """A measurement has what is looked at first in its own run, and every metric in those of its stages."""
    measurement, name = run.data.tags.get(KIND) == MEASUREMENT, str(run.info.run_name)
    points: dict[int, dict[str, float]] = {}
    for one in [*(_nested(client, run) if measurement else []), run]:
        for metric in sorted(filter(Metric.parse, one.data.metrics)):
            for point in client.get_metric_history(one.info.run_id, metric):
                points.setdefault(point.step, {})[metric] = point.value
    sets = [given.dataset for given in (run.inputs.dataset_inputs if run.inputs else [])]
    data = frozenset(dataset.digest for dataset in sets if dataset.name.endswith(" test"))
    label = name.partition(": ")[0] if measurement else name  # the scores follow
    verdicts = {tag.removeprefix(VERDICT): text for tag, text in run.data.tags.items() if tag.startswith(VERDICT)}
    failed = [tag.removeprefix(FAILED) for tag in run.data.tags if tag.startswith(FAILED)]
    missed = tuple(int(step) for step in failed if step.isdecimal() and int(step) not in points)
    found = sorted(points.items(), key=lambda point: point[0])
    return Earlier(run.info.run_id, label, found, data, verdicts=verdicts, missed=missed)


def _nested(client: MlflowClient, run: Run) -> list[Run]:
    """The runs that are nested in a run, the first first."""
    parent, order = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{run.info.run_id}'", ["attributes.start_time ASC"]
    return list(client.search_runs([run.info.experiment_id], parent, max_results=MAX_RUNS, order_by=order))


def with_predictions(runs: Sequence[Earlier], name: str) -> list[Earlier]:
    """The same runs with the predictions that a metric is computed from, and no others."""
    metric, client = Metric.parse(name), connect()
    task = metric.task if metric else ""
    return [
        replace(run, tables={step: _tables(client, run.run_id, step, task) for step, _ in run.points}) for run in runs
    ]


def _tables(client: MlflowClient, run_id: str, step: int, task: str) -> dict[str, pa.Table]:
    """The predictions of a measurement in a training, or of one alone; none where they cannot be had.

    Without a name of a task there is one alone.
    """
    found = {}
    try:
        paths = [one.path for one in client.list_artifacts(run_id, f"{FOLDER}/step={step}")]
        for path in paths or [one.path for one in client.list_artifacts(run_id)]:
            name = Path(path).name
            if fnmatchcase(name, f"{PREDICTIONS}{task or '*'}.parquet"):
                with temporary_folder() as folder:
                    local = client.download_artifacts(run_id, path, str(folder))
                    found[name.removeprefix(PREDICTIONS).removesuffix(".parquet")] = pq.read_table(local)
    except (MlflowException, OSError, pa.ArrowException) as error:
        logger.warning("run %s: its predictions cannot be read, so it has no intervals: %s", run_id, error)
    return found


def replay_journal(name: str, tracking_uri: str = "") -> tuple[int, int]:
    """Sends what MLflow does not have of a journal. Returns how many records arrived, and how many were refused.

    Raises:
        TrackingError: there is no such journal, MLflow does not answer, or another process is sending it.
    """
    path = Path(name)
    if not path.exists():
        raise TrackingError(f"journal: '{name}' is not there; give the .jsonl file that a warning named")
    if not _is_journal(path):
        raise TrackingError(f"journal: '{name}' is no journal; give the .jsonl file that a warning named")
    with deserted(path) as unlocked:
        return _replay(path, tracking_uri, unlocked)


def _replay(path: Path, tracking_uri: str, unlocked: bool) -> tuple[int, int]:
    """See `replay_journal`. With `unlocked`, its program is gone: the runs end, and the journal may be removed."""
    journal = Journal(path, write=False)
    gone = unlocked and is_original(path, journal.head)
    meant = journal.head.get("uri", "")
    uri = tracking_uri or meant
    if not uri:
        raise TrackingError(f"journal: '{path}' does not say where it is for; give --tracking-uri")
    try:
        sink = MlflowSink(uri, journal)
        arrived, refused = replay(journal, sink, elsewhere=uri != meant)
        if gone:
            sink.kill_unended()
    except (MlflowException, ImportError) as error:
        raise TrackingError(f"MLflow at '{shown(uri)}' does not answer: {error}; start it, and replay again") from error
    kept_for = refused if uri != meant else journal.refused
    if gone and journal.head.get("remove") and not kept_for:
        remove_journal(path)
    return arrived, refused


def _is_journal(path: Path) -> bool:
    """Whether a file begins as a journal does."""
    try:
        with path.open("rb") as stream:
            first = json.loads(stream.readline())
    except (OSError, ValueError):
        return False
    return isinstance(first, dict) and first.get("op") == "journal"


def catch_up(folder: Path, uri: str) -> Iterator[Path]:
    """Sends to the server at `uri` what programs of this machine left in `folder`, and removes journals that are sent.

    Yields:
        Each journal, after it has been dealt with.

    Raises:
        TrackingError: MLflow does not answer.
    """
    for path in journals_in(folder):
        try:
            with deserted(path) as gone:
                if gone:
                    _finish(path, uri)
        except Exception as error:
            cause = error.__cause__ or error
            if isinstance(error, TrackingError) and not is_bug(cause) and not isinstance(cause, Timeout):
                raise
            logger.warning("the journal '%s' of an earlier program stays: %s", path, error)
            logger.debug("the journal of an earlier program", exc_info=True)
        yield path


def _finish(path: Path, uri: str) -> None:
    """Sends and removes the journal of a program that is gone, where it is for the server at `uri`."""
    if not _is_journal(path):
        ours = path.stem.endswith(host_mark())  # another host's lock may not be seen here
        if ours and (not path.exists() or b"\n" not in path.read_bytes()):  # it was killed as it made or removed it
            remove_journal(path)
        return
    journal = Journal(path, write=False)
    if journal.head.get("uri") != uri or journal.head.get("tags", {}).get(HOST) != socket.gethostname():
        return
    may_go = journal.head.get("remove") and not journal.refused and is_original(path, journal.head)
    if journal.sent >= journal.end and not may_go:
        return
    arrived, _ = _replay(path, "", unlocked=True)
    if arrived:
        logger.info("sent %d records to MLflow that an earlier program left in %s", arrived, path)
