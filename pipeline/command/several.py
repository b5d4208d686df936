"""The work of the command line: measures several checkpoints, one after another or all at once, and compares them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pipeline.checkpoints.names import named_step, names_of
from pipeline.checkpoints.opening import refuse_missing
from pipeline.command.engine import device_on
from pipeline.command.measuring import Opened, measure_encoder, open_checkpoint
from pipeline.config.schema import Config
from pipeline.engines.elsewhere import Answer, portable, say
from pipeline.engines.ray_engine import RayEngine
from pipeline.errors import PipelineError
from pipeline.load import Examples, load_all
from pipeline.report import comparison as compare
from pipeline.report.publishing import describe, publish_curves
from pipeline.store.embedding_table import Store
from pipeline.store.temporary import temporary_folder
from pipeline.tracking.journal_run import JournalRun
from pipeline.tracking.protocol import CHECKPOINTS, KIND, MEASUREMENT, Headlines, Run, Several, Tracker
from pipeline.tracking.recording import FailedStageError, Recording, replay

logger = logging.getLogger(__name__)

# Of a checkpoint; of its model with random weights, where that is asked for.
Rows = tuple[compare.Row, compare.Row | None]
Measure = Callable[[str, str, Run], Rows]  # of a checkpoint with this name, in this run


def measure_checkpoints(
    ckpts: Sequence[str],
    config: Config,
    store: Store,
    run: JournalRun,
    mirrors: Sequence[Tracker],
    until: str,
    first: tuple[list[Opened], Sequence[Examples]],
    engine: RayEngine | None = None,
) -> tuple[list[compare.Row], compare.Leaderboard | None]:
    """Measures each of several checkpoints in a nested run, and compares them in `run`; on an engine, all at once.

    A checkpoint that cannot be measured is passed over with a warning. Data are read once; the same weights under two
    names are embedded and fitted once.

    Args:
        ckpts: see `open_encoder`.
        config: the tasks, and how embeddings are made.
        store: where embeddings and heads are kept.
        run: gets the leaderboard, and a nested run for each.
        mirrors: get the metrics and the leaderboard's pictures too.
        until: the last stage.
        first: see `open_first`; it is taken out of the list when its turn comes. Not for an engine, whose processes
            open them.
        engine: where they are measured; None for this process.

    Returns:
        A row for each; and the leaderboard, None where nothing was measured.
    """
    run.rename(f"{len(ckpts)} checkpoints on {config.title}")
    run.tags({KIND: CHECKPOINTS})
    rows: list[compare.Row] = []
    untrained: list[compare.Row] = []
    names = names_of(ckpts)
    if engine is None:
        measure = _in_turn(config, store, until, *first)
    else:
        measure = _at_once(engine, ckpts, names, config, until)
    for number, (ckpt, name) in enumerate(zip(ckpts, names, strict=True), 1):
        logger.info("checkpoint  %d of %d: %s", number, len(ckpts), ckpt)
        try:
            with run.stage(name) as child:
                describe(child, config, MEASUREMENT)
                row, start = measure(ckpt, name, child)
        except Exception as error:  # whatever a checkpoint is guilty of, such as no memory for it
            kind = "" if isinstance(error, PipelineError) else f"{type(error).__name__}: "
            rows.append(compare.Row(name, named_step(ckpt), {}, f"{kind}{' '.join(str(error).split())}"))
            logger.warning("%s: %s", ckpt, rows[-1].error)
            logger.debug("%s", ckpt, exc_info=True)
            continue
        rows.append(row)
        if start is not None and start not in untrained:
            untrained.append(start)
    board = _compare(rows, untrained, config, run, mirrors) if any(row.metrics for row in rows) else None
    return rows + untrained, board


def open_first(ckpts: Sequence[str], config: Config) -> tuple[list[Opened], Sequence[Examples]]:
    """Opens the first of several checkpoints, if it can be, and reads the data.

    Raises:
        CheckpointError: one of the names is nothing that there could be.
        PipelineError: see `load`; what is wrong with the data whatever an encoder takes.
    """
    for ckpt in ckpts:
        refuse_missing(ckpt)
    try:
        opened = open_checkpoint(ckpts[0], config, names_of(ckpts)[0]).with_data(config)
    except Exception:  # it is opened again in its turn, where the failure is said and the others are measured
        logger.debug("%s", ckpts[0], exc_info=True)
        return [], load_all(config.dataset)
    return [opened], opened.examples


def _in_turn(config: Config, store: Store, until: str, ready: list[Opened], examples: Sequence[Examples]) -> Measure:
    """Measures each checkpoint when it is asked for. Data are read once; one encoder at a time is in memory."""
    known = list(examples)

    def measure(ckpt: str, name: str, run: Run) -> Rows:
        opened = ready.pop() if ready else open_checkpoint(ckpt, config, name).with_data(config, known)
        known[:] = opened.examples
        found = measure_encoder(opened, config, store, run, [], until)
        return found.row, found.untrained

    return measure


def _at_once(engine: RayEngine, ckpts: Sequence[str], names: Sequence[str], config: Config, until: str) -> Measure:
    """Has the engine's processes measure them, each one of its own; what they have to log is logged as it is asked for.

    They are all begun with the first.
    """
    there = replace(config, engine="local", device=device_on(engine, config.device))
    work = partial(_recorded, config=there, until=until)
    answers = engine.answers(work, list(zip(ckpts, names, strict=True)))

    def measure(_ckpt: str, _name: str, run: Run) -> Rows:
        answer = next(answers)
        say(answer.said)
        recorded: Recorded = answer.get()
        recorded.replay(run)
        rows: Rows = recorded.rows.get()
        return rows

    return measure


@dataclass(frozen=True)
class Recorded:
    """A measurement in a process without a tracker: its rows or its error, calls for a tracker, and files of these."""

    rows: Answer
    calls: list[Any]
    files: Mapping[str, bytes]

    def replay(self, run: Run) -> None:
        """Makes the calls. Where one of its stages failed, so does that of `run`, and the rest is not made."""
        with temporary_folder() as folder, suppress(FailedStageError):
            for name, content in self.files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
            replay(self.calls, run, folder)


def _recorded(job: tuple[str, str], config: Config, until: str) -> Recorded:
    """Measures a checkpoint, given with its name."""
    ckpt, name = job
    with temporary_folder() as folder:
        run = Recording(folder)
        try:
            opened = open_checkpoint(ckpt, config, name).with_data(config)
            found = measure_encoder(opened, config, Store.from_config(config), run, [], until)
            rows = Answer((found.row, found.untrained))
        except Exception as error:  # it is raised where the checkpoint's turn has come
            rows = Answer(error=portable(error))
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return Recorded(rows, run.calls, files)


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
        failed = {row.step for row in rows if not row.metrics and row.step is not None} - {*steps}
        gaps = [(step, dict[str, float]()) for step in failed if step is not None]
        publish_curves(sorted([*points, *gaps], key=lambda point: point[0]), several)
    return board


def _shown(rows: Sequence[compare.Row], config: Config) -> list[str]:
    """The metrics that a leaderboard shows: the main ones, those first that a row has at all."""
    names = config.headlines
    return [name for name in names if any(name in row.metrics for row in rows)] or compare.choose(rows) or names
