"""The work of the command line: measures one checkpoint or several, and compares them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline import validation
from pipeline.checkpoints.names import name_of, names_of, step_of, with_step
from pipeline.checkpoints.opening import open_encoder
from pipeline.config.schema import Config
from pipeline.encoders.options import EncoderOptions
from pipeline.encoders.protocol import Encoder
from pipeline.errors import PipelineError
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
from pipeline.tracking.protocol import (
    CHECKPOINTS,
    COMPARISON,
    FOLDER,
    KIND,
    MEASUREMENT,
    Headlines,
    NullTracker,
    Several,
    Tracker,
)

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
    run: JournalRun,
    mirrors: Sequence[Tracker],
    until: str = "score",
    known: Sequence[Examples] = (),
    name: str | None = None,
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

    Raises:
        PipelineError: see `open_encoder` and `validate`.
    """
    encoder = open_encoder(ckpt, EncoderOptions.from_config(config))
    step = step_of(ckpt, encoder)
    label = with_step(name or name_of(ckpt), step)
    return measure_encoder(encoder, ckpt, step, label, config, store, run, mirrors, until, known)


def measure_encoder(
    encoder: Encoder,
    source: str,
    step: int | None,
    label: str,
    config: Config,
    store: Store,
    run: JournalRun | None = None,
    mirrors: Sequence[Tracker] = (),
    until: str = "score",
    known: Sequence[Examples] = (),
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
    """
    tracker: Tracker = Headlines([run]) if run else NullTracker()
    if run is not None:
        run.rename(f"{label} on {config.title}")
        run.tags(tags_of(encoder, step, {}))
        if until == "score":
            run.checkpoint(label, encoder.digest, source, step, in_stages=True)
    examples = _same(known, encoder)
    start = RandomInit(encoder, config, store, Several([tracker, *mirrors]), step or 0) if config.baseline else None
    further: dict[str, Any] = {"compare": start.compare} if start else {}
    scores, changes = validation.measure_and_publish(
        encoder, config, store, tracker, Several(mirrors), source, step, label, until, examples, **further
    )
    facts = facts_of(source, step, encoder, scores) if scores else {}
    if scores and run is not None:
        run.rename(run_name(label, scores))
        run.tags(verdict_tags(verdicts_of(scores, changes)))
        run.describe(summary(facts, scores, changes))
    untrained = _row(changes.start, None, start.scores) if start and start.scores else None
    return CheckpointResult(_row(label, step, scores), scores, changes, facts, untrained)


def _row(label: str, step: int | None, scores: Sequence[Scores]) -> compare.Row:
    """What a leaderboard says of a checkpoint."""
    data = frozenset(one.examples.test.digest for one in scores)
    tables = {metric_name(one.task_name): one.table for one in scores[:1]}  # rows are ranked by the first task
    return compare.Row(label, step, validation.metrics_of(scores), "", data, tables)


def measure_checkpoints(
    ckpts: Sequence[str],
    config: Config,
    store: Store,
    run: JournalRun,
    mirrors: Sequence[Tracker],
    until: str = "score",
) -> tuple[list[compare.Row], compare.Leaderboard | None]:
    """Measures each of several checkpoints in a nested run, and compares them in `run`.

    A checkpoint that cannot be measured is passed over with a warning. Data are read once; the same weights under two
    names are embedded and fitted once.

    Returns:
        A row for each; and the leaderboard, None where nothing was measured.
    """
    run.rename(f"{len(ckpts)} checkpoints on {config.title}")
    run.tags({KIND: CHECKPOINTS})
    rows: list[compare.Row] = []
    untrained: list[compare.Row] = []
    known: list[Examples] = []
    for number, (ckpt, name) in enumerate(zip(ckpts, names_of(ckpts), strict=True), 1):
        logger.info("checkpoint  %d of %d: %s", number, len(ckpts), ckpt)
        try:
            with run.stage(name) as child:
                child.tags({KIND: MEASUREMENT, f"{FOLDER}.tasks": ", ".join(task.task_name for task in config.dataset)})
                measured = measure_checkpoint(ckpt, config, store, child, [], until, known, name)
        except Exception as error:  # whatever a checkpoint is guilty of, such as no memory for it
            kind = "" if isinstance(error, PipelineError) else f"{type(error).__name__}: "
            rows.append(compare.Row(name, None, {}, f"{kind}{' '.join(str(error).split())}"))
            logger.warning("%s: %s", ckpt, rows[-1].error)
            logger.debug("%s", ckpt, exc_info=True)
            continue
        rows.append(measured.row)
        if measured.untrained is not None and measured.untrained not in untrained:
            untrained.append(measured.untrained)
        known = known or [one.examples for one in measured.scores]
    board = _compare(rows, untrained, config, run, mirrors) if any(row.metrics for row in rows) else None
    return rows + untrained, board


def _compare(
    rows: Sequence[compare.Row],
    untrained: Sequence[compare.Row],
    config: Config,
    run: JournalRun,
    mirrors: Sequence[Tracker],
) -> compare.Leaderboard:
    """The leaderboard, and the curve against the step, or against the order given where checkpoints do not say one.

    `untrained` models, with random weights, are in the former alone.
    """
    several = Several([Headlines([run]), *mirrors])
    steps = [row.step for row in rows if row.metrics]
    have_steps = None not in steps and len(set(steps)) == len(steps)
    points = [(row.step or 0 if have_steps else place, row.metrics) for place, row in enumerate(rows) if row.metrics]
    for step, metrics in points:
        several.metrics(metrics, step)
    board = compare.leaderboard([*rows, *untrained], _shown(rows, config))
    compare.publish(board, several, run, config.logging.figures)
    if config.logging.figures and have_steps:
        publish_curves(sorted(points, key=lambda point: point[0]), several)
    return board


def _shown(rows: Sequence[compare.Row], config: Config) -> list[str]:
    """The metrics that a leaderboard shows: the main ones, those first that a row has at all."""
    names = config.headlines
    return [name for name in names if any(name in row.metrics for row in rows)] or compare.choose(rows) or names


def compare_runs(runs: Sequence[Earlier], names: Sequence[str], run: JournalRun) -> compare.Leaderboard:
    """Ranks measurements that were made before, and logs the leaderboard, and the curve of each training, in `run`."""
    run.tags({KIND: COMPARISON})
    board = compare.leaderboard([row for one in runs for row in rows_of_run(one)], names)
    compare.publish(board, run, run)
    for one in runs:
        publish_curves(one.points, run, f"curves/{metric_name(one.name)} {one.run_id[:8]}")
    return board


def rows_of_run(run: Earlier) -> list[compare.Row]:
    """A row for each step that a run was measured at."""
    single, name = len(run.points) == 1, f"{run.name} ({run.run_id[:8]})"
    return [
        compare.Row(name if single else f"step={step} {name}", step, metrics, "", run.data, run.tables.get(step, {}))
        for step, metrics in run.points
    ]


def _same(known: Sequence[Examples], encoder: Encoder) -> list[Examples] | None:
    """The data of another checkpoint, where this encoder takes sequences of the same lengths."""
    return list(known) if known and all(one.encoder_limit == encoder.max_seq_length for one in known) else None
