"""What was measured before: runs that MLflow has, and journals that it has not."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlflow
from filelock import Timeout
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.config import LOSS
from pipeline.errors import ConfigError, TrackingError
from pipeline.metrics import NAMES
from pipeline.tracking.client import be_brief, connect, shown
from pipeline.tracking.delivery import holding, replay
from pipeline.tracking.journal import Journal
from pipeline.tracking.mlflow import MlflowSink
from pipeline.tracking.process import HOST, PROCESS, alive

logger = logging.getLogger(__name__)
SCORE = re.compile(f"test_.+({'|'.join(NAMES)})")


@dataclass(frozen=True)
class Earlier:
    """A run that MLflow has: of a measurement, of several, or of a training.

    Attributes:
        run_id: of the run.
        name: the run's.
        points: downstream metrics at each step, the first step first.
        data: digests of the test sets.
    """

    run_id: str
    name: str
    points: list[tuple[int, dict[str, float]]]
    data: frozenset[str]


def read_runs(run_ids: Sequence[str], tracking_uri: str = "") -> list[Earlier]:
    """The downstream metrics of runs that MLflow has.

    Raises:
        TrackingError: MLflow does not answer, or has no such run.
        ConfigError: a run holds no downstream metric.
    """
    if tracking_uri:
        mlflow.set_tracking_uri(tracking_uri)
    be_brief()
    try:
        client = connect()
        return [_read(client, run_id) for run_id in dict.fromkeys(run_ids)]
    except MlflowException as error:
        raise TrackingError(f"MLflow at '{shown(mlflow.get_tracking_uri())}': {error}; check the run's id") from error


def _read(client: MlflowClient, run_id: str) -> Earlier:
    run = client.get_run(run_id)
    points: dict[int, dict[str, float]] = {}
    for name in sorted(run.data.metrics):
        for point in client.get_metric_history(run_id, name) if _is_score(name) else []:
            points.setdefault(point.step, {})[name] = point.value
    if not points:
        raise ConfigError(f"run '{run_id}' holds no measurement; give runs of measurements or of trainings")
    sets = [one.dataset for one in (run.inputs.dataset_inputs if run.inputs else [])]
    data = frozenset(one.digest for one in sets if one.name.endswith(" test"))
    return Earlier(run_id, str(run.info.run_name), sorted(points.items(), key=lambda point: point[0]), data)


def _is_score(name: str) -> bool:
    """Whether a metric is one of a downstream task's."""
    last = name.rpartition("/")[2]
    return last == LOSS or SCORE.fullmatch(last) is not None


def replay_journal(name: str, tracking_uri: str = "") -> tuple[int, int]:
    """Sends what a journal holds and MLflow does not have; how many records arrived, and how many were refused.

    Raises:
        TrackingError: there is no such journal, MLflow does not answer, or another process is sending it.
    """
    path = Path(name)
    if not path.exists():
        raise TrackingError(f"journal: '{name}' is not there; give the .jsonl file that a warning named")
    if not _is_journal(path):
        raise TrackingError(f"journal: '{name}' is no journal; give the .jsonl file that a warning named")
    journal = Journal(path)
    meant = journal.head.get("uri", "")
    uri = tracking_uri or meant
    if not uri:
        raise TrackingError(f"journal: '{name}' does not say where it is for; give --tracking-uri")
    be_brief()
    remove = journal.head.get("remove") and not alive(journal.head.get("tags", {}).get(PROCESS, ""))
    try:
        sink = MlflowSink(connect(uri), journal)
        arrived, refused = replay(journal, sink, elsewhere=uri != meant)
        sink.kill_unended()
    except (MlflowException, ImportError) as error:
        raise TrackingError(f"MLflow at '{shown(uri)}' does not answer: {error}; start it, and replay again") from error
    finally:
        journal.close()
    if remove and not refused:
        journal.remove()
    return arrived, refused


def _is_journal(path: Path) -> bool:
    """Whether a file begins as a journal does."""
    try:
        with path.open("rb") as stream:
            first = json.loads(stream.readline())
    except (OSError, ValueError):
        return False
    return isinstance(first, dict) and first.get("op") == "journal"


def catch_up(folder: Path, uri: str) -> None:
    """Sends to the same server what programs of this machine left in `folder` when they ended.

    Raises:
        TrackingError: MLflow does not answer.
    """
    for path in sorted(folder.glob("*.jsonl")):
        with contextlib.suppress(OSError, Timeout):  # another process may be doing the same
            if _is_left(path, uri):
                arrived, _ = replay_journal(str(path), uri)
                logger.info("sent %d records to MLflow that an earlier program left in %s", arrived, path)


def _is_left(path: Path, uri: str) -> bool:
    """Whether a journal is for this server, has something to send, and nobody who does. Raises Timeout, OSError."""
    with contextlib.closing(Journal(path)) as journal, holding(journal):
        head, left = journal.head, journal.sent < journal.end
    tags = head.get("tags", {})
    gone = tags.get(HOST) == socket.gethostname() and not alive(tags.get(PROCESS, ""))
    return bool(left and gone and head.get("uri") == uri)
