"""The work of the command line: measures one checkpoint or several, and compares them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipeline import validation
from pipeline.checkpoints.names import name_of, step_of, with_step
from pipeline.command.engine import open_on
from pipeline.config.schema import Config
from pipeline.encoders.options import EncoderOptions
from pipeline.encoders.protocol import Encoder
from pipeline.engines.ray_engine import RayEngine
from pipeline.engines.workers import ALONE, Workers
from pipeline.load import Examples
from pipeline.random_init import RandomInit
from pipeline.report import comparison as compare
from pipeline.report.overview import Changes, overview, run_name, summary, verdicts_of
from pipeline.report.publishing import facts_of, publish_curves, tags_of, verdict_tags
from pipeline.report.tables import Table
from pipeline.score import Scores
from pipeline.statistics.metrics import metric_name
from pipeline.store.embedding_table import Store
from pipeline.tracking.journal_run import JournalRun
from pipeline.tracking.protocol import COMPARISON, KIND, Headlines, NullTracker, Run, Several, Tracker

if TYPE_CHECKING:
    from pipeline.tracking.earlier_runs import Earlier

logger = logging.getLogger(__name__)


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


def measure_checkpoint(
    ckpt: str,
    config: Config,
    store: Store,
    run: Run,
    mirrors: Sequence[Tracker],
    until: str = "score",
    known: Sequence[Examples] = (),
    name: str | None = None,
    engine: RayEngine | None = None,
) -> CheckpointResult:
    """Measures a stored checkpoint.

    Args:
        ckpt: see `open_encoder`.
        config: the tasks, and how embeddings are made.
        store: where embeddings and heads are kept.
        run: gets the results; it is renamed after the checkpoint and the tasks.
        mirrors: get the metrics and the pictures too.
        until: the last stage.
        known: the data of an earlier checkpoint; they are read again where the encoders' limits of length differ.
        name: of the checkpoint; by default the last part of the path.
        engine: where it is opened, embedded and fitted; None for this process.

    Raises:
        PipelineError: see `open_encoder` and `validate`.
    """
    encoder = open_on(engine, ckpt, EncoderOptions.from_config(config))
    step = step_of(ckpt, encoder)
    label = with_step(name or name_of(ckpt), step)
    workers = engine or ALONE
    return measure_encoder(encoder, ckpt, step, label, config, store, run, mirrors, until, known, workers)


def measure_encoder(
    encoder: Encoder,
    source: str,
    step: int | None,
    label: str,
    config: Config,
    store: Store,
    run: Run | None = None,
    mirrors: Sequence[Tracker] = (),
    until: str = "score",
    known: Sequence[Examples] = (),
    workers: Workers = ALONE,
) -> CheckpointResult:
    """Measures an open encoder, see `measure_checkpoint`.

    Args:
        encoder: what is measured.
        source: where its weights are from.
        step: of the training that made them, if it is known.
        label: what it is called.
        config: see above, as the others.
        store: see above.
        run: see above; None where nothing is tracked.
        mirrors: see above.
        until: see above.
        known: see above.
        workers: may fit and score heads.
    """
    tracker: Tracker = Headlines([run]) if run else NullTracker()
    if run is not None:
        run.rename(f"{label} on {config.title}")
        run.tags(tags_of(encoder, step))
        if until == "score":
            run.checkpoint(label, encoder.digest, source, step, in_stages=True)
    examples = _same(known, encoder)
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
        examples,
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


def _row(label: str, step: int | None, scores: Sequence[Scores], changes: Changes = Changes()) -> compare.Row:
    """What a leaderboard says of a checkpoint."""
    data = frozenset(one.examples.test.digest for one in scores)
    tables = {metric_name(one.task_name): one.table for one in scores[:1]}  # rows are ranked by the first task
    verdicts = {metric_name(task): text for task, text in verdicts_of(scores, changes).items()}
    return compare.Row(label, step, validation.metrics_of(scores), "", data, tables, verdicts)


def compare_runs(runs: Sequence[Earlier], names: Sequence[str], run: JournalRun) -> compare.Leaderboard:
    """Ranks measurements that were made before, and logs the leaderboard, and the curve of each training, in `run`."""
    run.tags({KIND: COMPARISON})
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


def _same(known: Sequence[Examples], encoder: Encoder) -> list[Examples] | None:
    """The data of another checkpoint, where this encoder takes sequences of the same lengths."""
    return list(known) if known and all(one.encoder_limit == encoder.max_seq_length for one in known) else None
