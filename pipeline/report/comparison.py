"""Checkpoints side by side: the leaderboard."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError, nearest
from pipeline.report.tables import cells
from pipeline.statistics.metrics import Metric, lower_is_better
from pipeline.store.temporary import temporary_folder
from pipeline.tracking import Tracker
from pipeline.tracking.journal_run import JournalRun

if TYPE_CHECKING:
    from rich.table import Table

FILE = "leaderboard.json"


@dataclass(frozen=True)
class Row:
    """A checkpoint, or a step of a training.

    Attributes:
        label: its name.
        step: of the training, if it is known.
        metrics: by name; none where the measurement failed.
        error: why it failed.
        data: digests of the test sets.
    """

    label: str
    step: int | None
    metrics: Mapping[str, float]
    error: str = ""
    data: frozenset[str] = field(default_factory=frozenset)


def rank(rows: Sequence[Row], by: str) -> list[Row]:
    """The rows, the best in `by` first; those without it last. Equal ones stay in the order given."""
    sign = 1 if lower_is_better(by) else -1
    return sorted(rows, key=lambda row: (by not in row.metrics, sign * row.metrics.get(by, 0.0)))


def choose(rows: Sequence[Row], by: str = "") -> list[str]:
    """The metrics to show: the one to rank by first; by default, the first main one that all rows have.

    Raises:
        ConfigError: no row has the metric `by`.
    """
    every = list(dict.fromkeys(name for row in rows for name in row.metrics))
    if by and by not in every:
        raise ConfigError(f"by: expected a metric of the runs, found '{by}'{nearest(by, every)}")
    parsed = {name: Metric.parse(name) for name in every}
    main = [name for name, metric in parsed.items() if metric and metric.is_headline] or every
    common = [name for name in main if all(name in row.metrics for row in rows)]
    return list(dict.fromkeys([*([by] if by else common), *main]))


def table(rows: Sequence[Row], names: Sequence[str]) -> Table:
    """The leaderboard for a terminal, by the first of `names`, best first."""
    from rich.markup import escape
    from rich.table import Table

    view = Table(title=escape(f"Checkpoints by {names[0]}"), title_justify="left")
    view.add_column("#", justify="right")
    view.add_column("checkpoint", overflow="fold")
    for name in names:
        view.add_column(escape(name), justify="right", overflow="fold")
    for place, row in enumerate(rows, 1):
        view.add_row(str(place), escape(row.label), *_cells(row, names))
    return view


def markdown(rows: Sequence[Row], names: Sequence[str]) -> str:
    """The same in Markdown, with what went wrong, and whether the rows can be compared."""
    lines = [f"| # | checkpoint | {' | '.join(names)} |", f"|---:|---|{'---:|' * len(names)}"]
    for place, row in enumerate(rows, 1):
        lines.append(f"| {place} | {_plain(row.label)} | {' | '.join(_cells(row, names))} |")
    lines += ["", *(f"- {_plain(row.label)}: {row.error}" for row in rows if row.error)]
    if not comparable(rows):
        lines.append("- The test sets differ between rows: sequences that one encoder takes are too long for another.")
    return "\n".join(lines)


def comparable(rows: Sequence[Row]) -> bool:
    """Whether all rows were measured on the same test sets."""
    return len({row.data for row in rows if row.metrics}) <= 1


def publish(rows: Sequence[Row], names: Sequence[str], tracker: Tracker, run: JournalRun) -> None:
    """Logs the leaderboard: as a table that MLflow shows, and in the run's description."""
    metrics = list(dict.fromkeys([*names, *(name for row in rows for name in row.metrics)]))
    columns = ["rank", "checkpoint", "step", *metrics, "error"]
    data = [
        [place, row.label, row.step, *(row.metrics.get(name) for name in metrics), row.error]
        for place, row in enumerate(rows, 1)
    ]
    with temporary_folder() as folder:
        path = folder / FILE
        path.write_text(json.dumps({"columns": columns, "data": data}), encoding="utf-8")
        tracker.artifact(path)
    run.tags({"mlflow.loggedArtifacts": json.dumps([{"path": FILE, "type": "table"}])})
    run.describe(f"{len(rows)} checkpoints by `{names[0]}`\n\n{markdown(rows, names)}")


def _plain(text: str) -> str:
    """Text that does not break a table."""
    return " ".join(text.replace("|", "/").split())


def _cells(row: Row, names: Sequence[str]) -> list[str]:
    if row.error:
        return ["failed", *[""] * (len(names) - 1)]
    return cells(row.metrics, names)
