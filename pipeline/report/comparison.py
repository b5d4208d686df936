"""Checkpoints side by side: the leaderboard."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError, nearest
from pipeline.report.differences import FIRST, differences
from pipeline.report.tables import Table, number, plain
from pipeline.statistics.metrics import Metric, lower_is_better
from pipeline.store.temporary import temporary_folder
from pipeline.tracking.journal_run import JournalRun
from pipeline.tracking.protocol import Tracker

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

FILE = "leaderboard.json"


@dataclass(frozen=True)
class Row:
    """A checkpoint, or a step of a training.

    Attributes:
        label: its name.
        step: of the training, if it is known.
        metrics: by name; empty where the measurement failed.
        error: why it failed.
        data: digests of the test sets.
        tables: predictions by task, as `Scores.table`; empty where they were not kept.
    """

    label: str
    step: int | None
    metrics: Mapping[str, float]
    error: str = ""
    data: frozenset[str] = field(default_factory=frozenset)
    tables: Mapping[str, pa.Table] = field(default_factory=dict, compare=False)


def choose(rows: Sequence[Row], by: str = "") -> list[str]:
    """The metrics to show: the one to rank by first; by default, the first headline metric that all rows have.

    The probe's follow those of the heads that they are beside.

    Raises:
        ConfigError: no row has the metric `by`.
    """
    every = list(dict.fromkeys(name for row in rows for name in row.metrics))
    if by and by not in every:
        raise ConfigError(f"by: expected a metric of the runs, found '{by}'{nearest(by, every)}")
    parsed = {name: Metric.parse(name) for name in every}
    headlines = {name: metric for name, metric in parsed.items() if metric and metric.is_headline}
    places = [metric.beside.key for metric in headlines.values()]
    ordered = sorted(headlines.items(), key=lambda item: (places.index(item[1].beside.key), item[1].probe))
    main = [name for name, _ in ordered] or every
    common = [name for name in main if all(name in row.metrics for row in rows)]
    return list(dict.fromkeys([*([by] if by else common), *main]))


def leaderboard(rows: Sequence[Row], names: Sequence[str]) -> pd.DataFrame:
    """The checkpoints, best first in the first of `names`; those without it are last, ties in the order given.

    Returns:
        The columns `rank` (from 1), `checkpoint`, `step`, each metric, those of `names` first, and `error`. Where
        predictions are at hand, `<metric>_delta_first` and its `_ci_low` and `_ci_high` follow the first of `names`:
        the difference to the first row, with its paired 95 % interval.
    """
    import pandas as pd

    metrics = list(dict.fromkeys([*names, *(name for row in rows for name in row.metrics)]))
    ranked = _ranked(rows, names[0])
    records = [{"checkpoint": row.label, "step": row.step, **row.metrics, "error": row.error} for row in ranked]
    frame = pd.DataFrame(records, columns=["checkpoint", "step", *metrics, "error"])
    frame = frame.astype({"step": "Int64", **dict.fromkeys(metrics, "float64")})
    found, _ = differences([row.tables for row in ranked], names[0])
    if any(found):
        key = names[0] + FIRST
        columns = pd.DataFrame([one.interval.named(key) | {key: one.value} if one else {} for one in found])
        place = frame.columns.tolist().index(names[0]) + 1
        for offset, column in enumerate((key, f"{key}_ci_low", f"{key}_ci_high")):
            frame.insert(place + offset, column, columns[column])
    frame.insert(0, "rank", frame.index + 1)
    return frame


def _ranked(rows: Sequence[Row], name: str) -> list[Row]:
    """The rows, best first in a metric; those without it are last, ties in the order given."""
    sign = 1 if lower_is_better(name) else -1
    return sorted(rows, key=lambda row: (name not in row.metrics, sign * row.metrics.get(name, 0.0)))


def board_table(board: pd.DataFrame, names: Sequence[str]) -> Table:
    """A leaderboard with some of its metrics, and beside the first how far each row is from the first row."""
    rows, key = [], names[0] + FIRST
    compared = key in board.columns
    for row in board.to_dict("records"):
        values = [number(row[name]) if row[name] == row[name] else "" for name in names]
        cells = ["failed", *values[1:]] if row["error"] else values
        if compared:
            cells.insert(1, _difference(row[key], row[f"{key}_ci_low"], row[f"{key}_ci_high"]))
        rows.append([str(row["rank"]), row["checkpoint"], *cells])
    columns = [*names[:1], *(["against #1 (95 %)"] if compared else []), *names[1:]]
    return Table(("#", "checkpoint", *columns), rows, frozenset({1}), f"Checkpoints by {names[0]}")


def _difference(value: float, low: float, high: float) -> str:
    """`-0.021 (-0.050 to 0.008) =`, where `=` marks rows that cannot be told apart; empty where there is none."""
    if value != value:
        return ""
    return f"{value:+.3f} ({low:+.3f} to {high:+.3f})" + (" =" if low <= 0 <= high else "")


def comparable(rows: Sequence[Row]) -> bool:
    """Whether all rows were measured on the same test sets."""
    return len({row.data for row in rows if row.metrics}) <= 1


def remarks(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """How a leaderboard is to be read: what its marks mean, and what its rows differ in."""
    measured = _ranked([row for row in rows if row.metrics], names[0])
    found, reasons = differences([row.tables for row in measured], names[0])
    lines = [f"There is no difference to the first row: {reason}" for reason in reasons]
    if any(found):
        lines.append("Rows with = cannot be told apart from the first: the interval of the difference holds 0.")
    if any(found) and len(measured) > 2:
        lines.append(f"The first is the best of {len(measured)}: its lead is not corrected for that choice.")
    if len({row.step for row in measured}) > 1:
        lines.append("The rows are of different steps.")
    if not comparable(rows):
        lines.append("The test sets differ between rows: sequences that one encoder takes are too long for another.")
    return lines


def summary(rows: Sequence[Row], names: Sequence[str]) -> str:
    """The leaderboard in Markdown, the errors, and how it is to be read."""
    lines = [board_table(leaderboard(rows, names), names).markdown(), ""]
    lines += [f"- {plain(row.label)}: {row.error}" for row in rows if row.error]
    return "\n".join([*lines, *(f"- {remark}" for remark in remarks(rows, names))])


def publish(rows: Sequence[Row], names: Sequence[str], tracker: Tracker, run: JournalRun) -> pd.DataFrame:
    """Logs the leaderboard as a table that MLflow shows, and in the run's description; returns it."""
    board = leaderboard(rows, names)
    data = board.astype(object).where(board.notna(), None).to_dict("split", index=False)
    with temporary_folder() as folder:
        path = folder / FILE
        path.write_text(json.dumps(data), encoding="utf-8")
        tracker.artifact(path)
    run.tags({"mlflow.loggedArtifacts": json.dumps([{"path": FILE, "type": "table"}])})
    run.describe(f"{len(rows)} checkpoints by `{names[0]}`\n\n{summary(rows, names)}")
    return board
