"""The work of the command line: opens a checkpoint, measures it in a run, and compares measurements made before."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import validation
from pipeline.checkpoints.names import name_of, step_of, with_step
from pipeline.command.engine import open_on
from pipeline.config.schema import Config
from pipeline.config.yaml_file import to_mapping
from pipeline.encoders.options import EncoderOptions
from pipeline.encoders.protocol import Encoder
from pipeline.engines.ray_engine import RayEngine
from pipeline.engines.workers import ALONE, Workers
from pipeline.load import Examples, load_all
from pipeline.random_init import RandomInit
from pipeline.report import comparison as compare
from pipeline.report.overview import Changes, overview, run_name, summary, verdicts_of
from pipeline.report.publishing import describe, facts_of, parameters_of, publish_curves, tags_of, verdict_tags
from pipeline.report.tables import Table
from pipeline.score import Scores
from pipeline.statistics.metrics import metric_name
from pipeline.store.embedding_table import Store
from pipeline.tracking.journal_run import JournalRun
from pipeline.tracking.protocol import COMPARISON, KIND, MEASUREMENT, Headlines, NullTracker, Run, Several, Tracker

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.tracking.earlier_runs import Earlier
    from pipeline.tracking.runs import OpenRun

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """An encoder that is to be measured.

    Attributes:
        encoder: what is measured.
        source: where its weights are from.
        step: of the training that made them, if it is known.
        label: what it is called.
        examples: the data of each task; none where they are yet to be read.
    """

    encoder: Encoder
    source: str
    step: int | None
    label: str
    examples: Sequence[Examples] = ()

    def with_data(
        self, config: Config, known: Sequence[Examples] = (), frames: Mapping[str, pd.DataFrame] | None = None
    ) -> Opened:
        """The same with the data.

        Args:
            config: the tasks.
            known: the data of another encoder; they are read again where the limits of length differ.
            frames: see `load`.

        Raises:
            PipelineError: see `load`.
        """
        limit = self.encoder.max_seq_length
        same = bool(known) and all(one.encoder_limit == limit for one in known)
        return replace(self, examples=known if same else load_all(config.dataset, limit, frames))


@dataclass(frozen=True)
class CheckpointResult:
    """A checkpoint's scores, or why there are none.

    Attributes:
        row: what the leaderboard says of it.
        scores: of each task.
        changes: what the scores have changed by since random weights, where that was asked for.
        facts: what else a report says of the measurement, by name; none where nothing was scored.
        untrained: the same as `row` for the model with random weights.
    """

    row: compare.Row
    scores: list[Scores]
    changes: Changes
    facts: Mapping[str, str]
    untrained: compare.Row | None

    @property
    def overview(self) -> Table:
        """A line per target; no lines where nothing was scored."""
        return overview(self.scores, self.changes)


def open_checkpoint(ckpt: str, config: Config, name: str | None = None, engine: RayEngine | None = None) -> Opened:
    """Opens a stored checkpoint.

    Args:
        ckpt: see `open_encoder`.
        config: how it is opened.
        name: of the checkpoint; by default the last part of the path.
        engine: where it is opened; None for this process.

    Raises:
        PipelineError: see `open_encoder`.
    """
    encoder = open_on(engine, ckpt, EncoderOptions.from_config(config))
    step = step_of(ckpt, encoder)
    return Opened(encoder, ckpt, step, with_step(name or name_of(ckpt), step))


@contextmanager
def tracked(name: str, config: Config, tracking_uri: str = "") -> Iterator[tuple[OpenRun, Sequence[Tracker]]]:
    """The run of a measurement, and the trackers beside MLflow. These are begun first: they may find a mistake too.

    Raises:
        TrackingError: see `reach`, `mirrors` and `open_run`.
    """
    from pipeline.tracking.mirrors import mirrors
    from pipeline.tracking.runs import open_run, reach

    reach(config, tracking_uri)
    folder = Path(config.store).expanduser()
    with mirrors(config.logging, name, to_mapping(config), folder) as others, open_run(name, config) as opened:
        describe(opened.run, config, MEASUREMENT)
        yield opened, others


def measure_encoder(
    opened: Opened,
    config: Config,
    store: Store,
    run: Run | None = None,
    mirrors: Sequence[Tracker] = (),
    until: str = "score",
    workers: Workers = ALONE,
) -> CheckpointResult:
    """Measures an open encoder.

    Args:
        opened: what is measured, with its data.
        config: the tasks, and how embeddings are made.
        store: where embeddings and heads are kept.
        run: gets the results; it is renamed after the checkpoint and the tasks. None where nothing is tracked.
        mirrors: get the metrics and the pictures too.
        until: the last stage.
        workers: may fit and score heads.

    Raises:
        PipelineError: see `validate`.
    """
    encoder, source, step, label = opened.encoder, opened.source, opened.step, opened.label
    tracker: Tracker = Headlines([run]) if run else NullTracker()
    if run is not None:
        _introduce(opened, run, config, until)
    start = None
    if config.baseline:
        start = RandomInit(encoder, config, store, Several([tracker, *mirrors]), step or 0, workers)
    further: dict[str, Any] = {"compare": start.compare} if start else {}
    scores, changes = validation.measure_and_publish(
        encoder,
        config,
        store,
        tracker,
        Several(mirrors),
        source,
        step,
        label,
        until,
        opened.examples or None,
        workers=workers,
        **further,
    )
    facts = facts_of(source, step, encoder, scores) if scores else {}
    if scores and run is not None:
        run.rename(run_name(label, scores))
        run.tags(verdict_tags(verdicts_of(scores, changes)))
        run.describe(summary(facts, scores, changes))
    untrained = None
    if start and start.scores:  # not held against the baselines, so nothing is said of it
        untrained = replace(_row(changes.start, None, start.scores), verdicts={})
    return CheckpointResult(_row(label, step, scores, changes), scores, changes, facts, untrained)


def _introduce(opened: Opened, run: Run, config: Config, until: str) -> None:
    """Logs what is going to be measured."""
    encoder, source, step = opened.encoder, opened.source, opened.step
    run.rename(f"{opened.label} on {config.title}")
    run.tags(tags_of(encoder, step))
    run.parameters(parameters_of(encoder, source, step), "ckpt.")
    if until == "score":
        run.checkpoint(opened.label, encoder.digest, source, step, in_stages=True)


def _row(label: str, step: int | None, scores: Sequence[Scores], changes: Changes = Changes()) -> compare.Row:
    """What a leaderboard says of a checkpoint."""
    data = frozenset(one.examples.test.digest for one in scores)
    tables = {metric_name(one.task_name): one.table for one in scores[:1]}  # rows are ranked by the first task
    verdicts = {metric_name(task): text for task, text in verdicts_of(scores, changes).items()}
    return compare.Row(label, step, validation.metrics_of(scores), "", data, tables, verdicts)


def compare_runs(runs: Sequence[Earlier], names: Sequence[str], run: JournalRun) -> compare.Leaderboard:
    """Ranks measurements that were made before, and logs the leaderboard, and the curve of each training, in `run`."""
    run.tags({KIND: COMPARISON})
    run.parameters({"by": names[0], "runs": ", ".join(one.run_id for one in runs)}, "compare.")
    board = compare.leaderboard([row for one in runs for row in rows_of_run(one)], names)
    compare.publish(board, run, run)
    for one in runs:
        gaps = [(step, dict[str, float]()) for step in one.missed]
        points = sorted([*one.points, *gaps], key=lambda point: point[0])
        publish_curves(points, run, f"curves/{metric_name(one.name)} {one.run_id[:8]}")
    return board


def rows_of_run(run: Earlier) -> list[compare.Row]:
    """A row for each step that a run was measured at."""
    single, name = len(run.points) == 1, f"{run.name} ({run.run_id[:8]})"
    labels = [name if single else f"step={step} {name}" for step, _ in run.points]
    said = run.verdicts if single else {}  # of a training MLflow has that of the last step alone
    return [
        compare.Row(label, step, metrics, "", run.data, run.tables.get(step, {}), said)
        for label, (step, metrics) in zip(labels, run.points, strict=True)
    ]
