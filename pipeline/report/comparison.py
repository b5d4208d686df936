"""Checkpoints side by side: the leaderboard."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import ConfigError, nearest
from pipeline.heads.verdict import NO_BETTER
from pipeline.report.differences import FIRST, differences
from pipeline.report.overview import verdict_of_target
from pipeline.report.page import leaderboard_page
from pipeline.report.tables import Table, append, number, plain
from pipeline.statistics.metrics import Metric, lower_is_better
from pipeline.store.temporary import temporary_folder
from pipeline.tracking.journal_run import JournalRun
from pipeline.tracking.protocol import Tracker

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

FILE, PAGE, VERDICT = "leaderboard.json", "report.html", "verdict"


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
        verdicts: by task what is said of it, see `verdicts_of`; empty where that is not known.
    """

    label: str
    step: int | None
    metrics: Mapping[str, float]
    error: str = ""
    data: frozenset[str] = field(default_factory=frozenset)
    tables: Mapping[str, pa.Table] = field(default_factory=dict, compare=False)
    verdicts: Mapping[str, str] = field(default_factory=dict)

    def verdict(self, name: str) -> str:
        """What is said of the target of a metric, see `verdict_of_target`; empty where that is not known.

        The task is the only one where the name has none.
        """
        metric = Metric.parse(name)
        of_task = self.verdicts.get(metric.task, "") if metric and metric.task else [*self.verdicts.values(), ""][0]
        return verdict_of_target(of_task, metric.target) if metric else of_task


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


@dataclass(frozen=True)
class Leaderboard:
    """Checkpoints, best first.

    Attributes:
        frame: the columns `rank` (from 1), `checkpoint`, `step`, each metric, those of `names` first, `verdict` (of the
            task of the first of `names`; left out where none is known), and `error`.
            Where predictions are at hand, `<metric>_delta_first` and its `_ci_low` and `_ci_high` follow the first of
            `names`: the difference to the first row, with its paired 95 % interval.
        names: the metrics to show; rows are ranked by the first.
        remarks: how it is to be read: what its marks mean, and what its rows differ in.
    """

    frame: pd.DataFrame
    names: Sequence[str]
    remarks: Sequence[str]

    @property
    def table(self) -> Table:
        """The metrics to show, and beside the first how far each row is from the first row."""
        rows, names, key = [], self.names, self.names[0] + FIRST
        compared = key in self.frame.columns
        for row in self.frame.to_dict("records"):
            values = [number(row[name]) if row[name] == row[name] else "" for name in names]
            cells = ["failed", *values[1:]] if row["error"] else values
            if compared:
                cells.insert(1, _difference(row[key], row[f"{key}_ci_low"], row[f"{key}_ci_high"]))
            rows.append([str(row["rank"]), row["checkpoint"], *cells])
        columns = ["#", "checkpoint", *names[:1], *(["against #1 (95 %)"] if compared else []), *names[1:]]
        left = frozenset({1, len(columns)} if VERDICT in self.frame else {1})
        append(columns, rows, VERDICT, [*self.frame.get(VERDICT, [""] * len(rows))])
        return Table(columns, rows, left, f"Checkpoints by {names[0]}")

    @property
    def errors(self) -> list[str]:
        """Why checkpoints were not measured."""
        failed = self.frame[self.frame["error"] != ""]
        return [f"{plain(name)}: {why}" for name, why in zip(failed["checkpoint"], failed["error"], strict=True)]

    @property
    def bars(self) -> list[Bar | None]:
        """Of each row the difference to the first, to be drawn on one scale; empty where there is none at all."""
        key = self.names[0] + FIRST
        if key not in self.frame.columns:
            return []
        numbers = self.frame[[f"{key}_ci_low", key, f"{key}_ci_high"]].to_numpy(float)
        low, high = min(0.0, float(np.nanmin(numbers))), max(0.0, float(np.nanmax(numbers)))
        places = 3 + 94 * (np.insert(numbers, 3, 0.0, axis=1) - low) / ((high - low) or 1)
        return [None if np.isnan(row).any() else Bar(*row.round(2).tolist()) for row in places]

    @property
    def every_metric(self) -> Table:
        """A row per metric, a column per checkpoint."""
        names = [name for name in self.frame.columns if name not in ("rank", "checkpoint", "step", VERDICT, "error")]
        cells = [[number(value) if value == value else "" for value in self.frame[name]] for name in names]
        return Table(
            ("metric", *self.frame["checkpoint"]), [(name, *row) for name, row in zip(names, cells, strict=True)]
        )

    @property
    def summary(self) -> str:
        """The leaderboard in Markdown, the errors, and how it is to be read."""
        return "\n".join([self.table.markdown(), "", *(f"- {line}" for line in (*self.errors, *self.remarks))])


@dataclass(frozen=True)
class Bar:
    """Where a difference, the ends of its interval and no difference are drawn, in percent from the left."""

    low: float
    middle: float
    high: float
    zero: float

    @property
    def tied(self) -> bool:
        """Whether the row cannot be told apart from the first."""
        return self.low <= self.zero <= self.high


def leaderboard(rows: Sequence[Row], names: Sequence[str]) -> Leaderboard:
    """The checkpoints, best first in the first of `names`; those without it are last, ties in the order given."""
    import pandas as pd

    ranked = _ranked(rows, names[0])
    measured = [row for row in ranked if row.metrics]
    found, reasons = differences([row.tables for row in measured], names[0])
    key = names[0] + FIRST
    changes = [{key: one.value, **one.interval.named(key)} if one else {} for one in found]
    changes += [{}] * (len(ranked) - len(measured))  # what failed is last
    first = [names[0], *(key + end for end in ("", "_ci_low", "_ci_high") if any(found))]
    numbers = list(dict.fromkeys([*first, *names, *(name for row in rows for name in row.metrics)]))
    said = [row.verdict(names[0]) for row in ranked]
    records = [
        {"rank": place, "checkpoint": row.label, "step": row.step, **row.metrics, **change}
        | {VERDICT: verdict, "error": row.error}
        for place, (row, change, verdict) in enumerate(zip(ranked, changes, said, strict=True), 1)
    ]
    last = [VERDICT, "error"] if any(said) else ["error"]
    frame = pd.DataFrame(records, columns=["rank", "checkpoint", "step", *numbers, *last])
    frame = frame.astype({"step": "Int64", **dict.fromkeys(numbers, "float64")})
    lines = [f"There is no difference to the first row: {reason}" for reason in reasons]
    return Leaderboard(frame, names, lines + _remarks(measured, any(found), names[0]))


def _ranked(rows: Sequence[Row], name: str) -> list[Row]:
    """The rows, best first in a metric; then those without it, then what failed; ties in the order given."""
    sign = 1 if lower_is_better(name) else -1
    return sorted(rows, key=lambda row: (not row.metrics, name not in row.metrics, sign * row.metrics.get(name, 0.0)))


def _difference(value: float, low: float, high: float) -> str:
    """`-0.021 (-0.050 to 0.008) =`, where `=` marks rows that cannot be told apart; empty where there is none."""
    if value != value:
        return ""
    return f"{value:+.3f} ({low:+.3f} to {high:+.3f})" + (" =" if low <= 0 <= high else "")


def comparable(rows: Sequence[Row]) -> bool:
    """Whether all rows were measured on the same test sets."""
    return len({row.data for row in rows if row.metrics}) <= 1


def _remarks(measured: Sequence[Row], compared: bool, name: str) -> list[str]:
    lines = []
    said = [verdict for row in measured if (verdict := row.verdict(name))]
    if said and all(NO_BETTER in verdict for verdict in said):
        which = "these" if len(said) == len(measured) else "those with a verdict"
        lines.append(f"None of {which} is better than its baseline in {name}: that one is the first says little.")
    if compared:
        lines.append(
            f"Rows with = cannot be told apart from the first by {name}: the interval of the difference holds 0."
        )
    if compared and len(measured) > 2:
        lines.append(f"The first is the best of {len(measured)}: its lead is not corrected for that choice.")
    if len({row.step for row in measured}) > 1:
        lines.append("The rows are of different steps: how long each was trained is part of the difference.")
    if not comparable(measured):
        lines.append("The test sets differ between rows: sequences that one encoder takes are too long for another.")
    return lines


def publish(board: Leaderboard, tracker: Tracker, run: JournalRun, with_page: bool = True) -> None:
    """Logs a leaderboard as a table that MLflow shows, as the page `report.html`, and in the run's description."""
    frame, title = board.frame, f"{len(board.frame)} checkpoints by {board.names[0]}"
    data = frame.astype(object).where(frame.notna(), None).to_dict("split", index=False)
    files = {FILE: json.dumps(data), **({PAGE: leaderboard_page(title, board)} if with_page else {})}
    with temporary_folder() as folder:
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
            tracker.artifact(folder / name)
    run.tags({"mlflow.loggedArtifacts": json.dumps([{"path": FILE, "type": "table"}])})
    run.describe(f"{len(frame)} checkpoints by `{board.names[0]}`\n\n{board.summary}")
