"""Results as tables: for the terminal, for Markdown and for the page."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.score import Scores
    from pipeline.statistics.metrics import Metric

INTERVAL = "95 %"  # heads the column of the intervals of the scores before it


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        columns: the headings.
        rows: the cells of each row.
        left: the columns of text, aligned left; the others hold numbers, aligned right.
        title: shown on the terminal alone.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: frozenset[int] = frozenset({0})
    title: str = ""

    def text(self) -> str:
        """For the terminal, as wide as it is; 200 characters where the output is a file."""
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        view = RichTable(title=Text(self.title), title_justify="left")
        for index, name in enumerate(self.columns):
            cells = max((len(row[index]) for row in self.rows), default=0)
            heading = name if len(name) <= cells else name.replace(" ", "\n").replace("/", "/\n")
            fixed = index not in self.left and max(map(len, heading.split("\n"))) <= cells  # folded last
            view.add_column(
                Text(heading), justify="left" if index in self.left else "right", overflow="fold", no_wrap=fixed
            )
        for row in self.rows:
            view.add_row(*map(Text, row))
        console = Console(
            width=None if sys.stdout.isatty() else 200, force_jupyter=False
        )  # there it would show nothing
        with console.capture() as captured:
            console.print(view)
        return captured.get().rstrip("\n")

    def markdown(self) -> str:
        """For a run's description."""
        rule = ["---" if index in self.left else "---:" for index in range(len(self.columns))]
        rows = [self.columns, rule, *self.rows]
        return "\n".join(f"| {' | '.join(map(plain, row))} |" for row in rows)


def plain(text: str) -> str:
    """Text that does not break a table in Markdown."""
    return " ".join(text.replace("|", "/").split())


def score_table(scores: Sequence[Scores]) -> Table:
    """A row per metric: the head's with its interval, the probe's beside it, the baseline's, and a constant guess's.

    Columns that would be empty are left out.
    """
    results = [metric for one in scores for metric in one.results]
    lines = {key: value for one in scores for key, value in one.baselines.items()}
    pairs = pairs_of(results)
    columns, rows = ["metric"], [[name] for name in pairs]
    for title, probe in (("score", False), ("probe", True)):
        found = [pair.get(probe) for pair in pairs.values()]
        if probe and not any(found):
            continue
        append(columns, rows, title, [score_text(one) if one else "" for one in found])
        append(columns, rows, INTERVAL, [interval_text(one) for one in found])
        append(columns, rows, "baseline", [number(lines.get(one.key)) if one else "" for one in found])
    append(columns, rows, "constant guess", [number(next(iter(pair.values())).constant) for pair in pairs.values()])
    return Table(columns, rows)


def companion_table(scores: Scores) -> Table:
    """What the embeddings of a task are like, whatever the labels."""
    return Table(("embeddings", "value"), [(name, number(value)) for name, value in scores.companions.items()])


def data_table(scores: Scores) -> Table:
    """A row per part of a task's data: sequences used and left out, labels that are masked, sequences in train too."""
    examples = scores.examples
    rows = []
    for name, part in examples.parts.items():
        shares = [examples.found.get(what) for what in (f"{name}_masked", f"{name}_in_train", f"{name}_near_train")]
        percents = ["" if share is None else f"{share:.1%}" for share in shares]
        rows.append((name, f"{len(part):,}", f"{part.left_out:,}", *percents))
    columns = ("part", "sequences", "left out, too long", "labels masked", "in train too", "nearly the same in train")
    return Table(columns, rows)


def class_table(scores: Scores) -> Table:
    """A row per class: how many test labels are of it, and the metrics of the class alone; no rows for numbers."""
    frame = scores.classes
    if frame.empty:
        return Table((), ())
    several = frame["target"].nunique() > 1
    pairs = zip(frame["target"], frame["class"], strict=True)
    names = [f"{target}: {name}" if several else str(name) for target, name in pairs]
    numbers = frame.drop(columns=["target", "class"])
    cells = [[cell_text(value) for value in row] for row in numbers.itertuples(index=False)]
    columns = ("class", *(name.replace("_", " ") for name in numbers.columns))
    return Table(columns, [(name, *row) for name, row in zip(names, cells, strict=True)])


def cell_text(value: float) -> str:
    """A count as it is, a fraction with four digits, and nothing for what is not defined."""
    return "" if math.isnan(value) else f"{value:.4f}" if isinstance(value, float) else str(value)


def append(columns: list[str], rows: list[list[str]], title: str, cells: Sequence[str]) -> None:
    """Adds a column to a table, unless all its cells are empty."""
    if not any(cells):
        return
    columns.append(title)
    for row, cell in zip(rows, cells, strict=True):
        row.append(cell)


def step_table(points: Sequence[tuple[int, Mapping[str, float]]], names: Sequence[str]) -> Table:
    """A row per measurement of a training: the step, and some of its metrics."""
    rows = [(str(step), *(number(metrics.get(name)) for name in names)) for step, metrics in points]
    return Table(("step", *names), rows, frozenset(), "Scores on the test set, over the training")


def pairs_of(results: Iterable[Metric]) -> dict[str, dict[bool, Metric]]:
    """By name, the head's metric (False) and the probe's beside it (True), as far as they are defined."""
    pairs: dict[str, dict[bool, Metric]] = {}
    for metric in results:
        pairs.setdefault(metric.beside.key, {})[metric.probe] = metric
    return pairs


def interval_text(metric: Metric | None) -> str:
    """The ends of a metric's interval: `0.250, 0.625`; empty where there is none."""
    return f"{metric.interval.low:.3f}, {metric.interval.high:.3f}" if metric and metric.interval else ""


def score_text(metric: Metric) -> str:
    """A metric's value, with its deviation over the seeds where there are several: `0.6420 ± 0.0040`."""
    return number(metric.value) + ("" if metric.seed_std is None else f" ± {number(metric.seed_std)}")


def number(value: float | None) -> str:
    """Four digits behind the point; empty where there is no value."""
    return "" if value is None else f"{value:.4f}"
