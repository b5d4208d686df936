"""Has at hand what a measurement needs, before its run is begun: a user's mistake leaves no FAILED run in MLflow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pipeline import validation
from pipeline.command.measuring import CheckpointResult, measure_encoder, open_checkpoint
from pipeline.command.several import measure_checkpoints, open_first
from pipeline.config.schema import Config
from pipeline.engines.ray_engine import RayEngine
from pipeline.engines.workers import ALONE
from pipeline.errors import PipelineError
from pipeline.load import Examples, load_all
from pipeline.report.comparison import Leaderboard, Row
from pipeline.report.overview import overview_frame
from pipeline.store.embedding_table import Store
from pipeline.tracking.journal_run import JournalRun
from pipeline.tracking.protocol import Tracker

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Outcome:
    """What a measurement gave.

    Attributes:
        rows: of each checkpoint.
        lines: for people.
        table: the same for scripts; None where nothing was scored.
        board: of several checkpoints.
    """

    rows: Sequence[Row] = ()
    lines: Sequence[str] = ()
    table: pd.DataFrame | None = None
    board: Leaderboard | None = None


Work = Callable[[JournalRun, Sequence[Tracker]], Outcome]  # in a run, and the trackers beside it


def ready(ckpts: Sequence[str], config: Config, store: Store, until: str, engine: RayEngine | None) -> Work:
    """The measurement of checkpoints; with none, a look at the data alone.

    The checkpoint is open by now, of several the first, and the data are read. An engine's processes open several
    checkpoints, and read the data, where they measure them. A failure that is no mistake is raised by the measurement.

    Raises:
        PipelineError: the configuration, the checkpoint or the data cannot be used.
    """
    try:
        return _ready(ckpts, config, store, until, engine)
    except PipelineError:
        raise
    except Exception as error:  # no mistake of the user's: there is to be a run that says it
        return partial(_fail, error)


def _ready(ckpts: Sequence[str], config: Config, store: Store, until: str, engine: RayEngine | None) -> Work:
    validation.check(config.dataset)
    if not ckpts:
        return partial(_look, load_all(config.dataset), config)
    if len(ckpts) == 1:
        opened, workers = open_checkpoint(ckpts[0], config, engine=engine).with_data(config), engine or ALONE
        return lambda run, mirrors: _of_one(measure_encoder(opened, config, store, run, mirrors, until, workers))
    first = open_first(ckpts, config) if engine is None else ([], ())
    return lambda run, mirrors: _of_several(
        *measure_checkpoints(ckpts, config, store, run, mirrors, until, first, engine)
    )


def _fail(error: Exception, _run: JournalRun, _mirrors: Sequence[Tracker]) -> Outcome:
    raise error


def _look(examples: Sequence[Examples], config: Config, run: JournalRun, _: Sequence[Tracker]) -> Outcome:
    run.rename(f"data of {config.title}")
    validation.log_data(examples, run)
    return Outcome()


def _of_one(found: CheckpointResult) -> Outcome:
    lines = [found.overview.text()] if found.scores else []
    return Outcome([found.row], lines, overview_frame(found.scores, found.changes))


def _of_several(rows: Sequence[Row], board: Leaderboard | None) -> Outcome:
    return Outcome(rows, [board.table.text(), *board.remarks], board.frame, board) if board else Outcome(rows)
