"""Results as tables: for the terminal, for Markdown and for the page."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, JustifyMethod

    from pipeline.score import Scores
    from pipeline.statistics.metrics import Metric

INTERVAL = "95 %"  # heads the column of the intervals of the scores before it
WORDS = 24  # the narrowest that a column of words becomes
MARK = "\N{DAGGER}"  # behind a score, see `Metric.hangs_on_seeds`
FOOTNOTE = (
    f"{MARK} the deviation over seeds (±) is larger than half of the interval, which is of the test sequences alone:"
    " another seed may score outside of it; the probe has no seeds"
)


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

    @property
    def footnote(self) -> str:
        """What the mark behind some of its scores means; empty where none has it."""
        return footnote(cell for row in self.rows for cell in row)

    def text(self) -> str:
        """For the terminal, as wide as it is; 200 characters where the output is a file.

        Where a number or a name would be broken, each row is a block of lines.
        """
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else 200, force_jupyter=False)  # there it shows nothing
        cells = [max((len(row[index]) for row in self.rows), default=0) for index in range(len(self.columns))]
        for breaks in (" /", " /_"):
            headings = [_folded(name, room, breaks) for name, room in zip(self.columns, cells, strict=True)]
            widths = [max(room, *map(len, text.split("\n"))) for room, text in zip(cells, headings, strict=True)]
            if self._words is not None:
                widths[self._words] = min(widths[self._words], WORDS)
            if sum(widths) + 3 * len(widths) + 1 <= console.width:
                return "\n".join([self._drawn(console, headings), *wrap(self.footnote, console.width)])
        blocks = [line for row in self.rows for line in self._block(row, console.width)]
        return "\n".join([self.title, *blocks, *wrap(self.footnote, console.width)])

    @property
    def _words(self) -> int | None:
        """The column whose cells may be broken between words: the last, where it is of text; None without one."""
        last = len(self.columns) - 1
        return last if last in self.left and last > 0 else None

    def _drawn(self, console: Console, headings: Sequence[str]) -> str:
        from rich.table import Table as RichTable
        from rich.text import Text

        view = RichTable(title=Text(self.title), title_justify="left")
        for index, heading in enumerate(headings):
            side: JustifyMethod = "left" if index in self.left else "right"
            view.add_column(Text(heading), justify=side, overflow="fold", no_wrap=index != self._words)
        for row in self.rows:
            view.add_row(*map(Text, row))
        with console.capture() as captured:
            console.print(view)
        return captured.get().rstrip("\n")

    def _block(self, row: Sequence[str], width: int) -> list[str]:
        """An empty line, what the row is of, and a line for each other cell with the interval behind it."""
        first = min(self.left, default=0)
        lines = ["", " ".join(row[: first + 1]) if self.left else f"{self.columns[0]} {row[0]}"]
        found: dict[str, str] = {}
        for name, cell in zip(self.columns[first + 1 :], row[first + 1 :], strict=True):
            if name == INTERVAL and found and cell:
                found[[*found][-1]] += f" ({INTERVAL}: {cell})"
            elif cell:
                found[name] = cell
        room = max(map(len, found), default=0)
        for name, text in found.items():
            lines += wrap(text, width, initial_indent=f"  {name:{room}}  ", subsequent_indent=" " * (room + 4))
        return lines

    def markdown(self) -> str:
        """For a run's description."""
        rule = ["---" if index in self.left else "---:" for index in range(len(self.columns))]
        rows = [self.columns, rule, *self.rows]
        lines = [f"| {' | '.join(map(plain, row))} |" for row in rows]
        return "\n".join([*lines, *(["", self.footnote] if self.footnote else [])])


def _folded(name: str, room: int, breaks: str) -> str:
    """A heading, in lines as wide as the cells below it where it has a break behind one of the characters `breaks`."""
    pieces = re.findall(f"[^{breaks}]*[{breaks}]|[^{breaks}]+", name)
    room, lines = max([room, *(len(piece.rstrip()) for piece in pieces)]), [""]
    for piece in pieces:
        if len((lines[-1] + piece).rstrip()) <= room:
            lines[-1] += piece
        else:
            lines.append(piece)
    return "\n".join(line.rstrip() for line in lines)


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
        append(columns, rows, score_title(title, found), [score_text(one) if one else "" for one in found])
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
    """A row per measurement of a training: the step, and some of its metrics, or that it failed or was dropped."""
    missed, rows = dict.fromkeys(names[:1], "not measured"), []
    for step, metrics in points:
        cells = {name: number(metrics.get(name)) for name in names} | ({} if metrics else missed)
        rows.append((str(step), *cells.values()))
    return Table(("step", *names), rows, frozenset(), "Scores on the test set, over the training")


def pairs_of(results: Iterable[Metric]) -> dict[str, dict[bool, Metric]]:
    """By name, the head's metric (False) and the probe's beside it (True), as far as they are defined."""
    pairs: dict[str, dict[bool, Metric]] = {}
    for metric in results:
        pairs.setdefault(metric.beside.key, {})[metric.probe] = metric
    return pairs


def interval_text(metric: Metric | None) -> str:
    """The ends of a metric's interval: `0.250, 0.625`; empty where there is none."""
    return f"{metric.interval.low:z.3f}, {metric.interval.high:z.3f}" if metric and metric.interval else ""


def score_text(metric: Metric) -> str:
    """A metric's value, with its deviation over the seeds where there are several: `0.6420 ± 0.0040`.

    Marked where that is much beside its interval, see `footnote`.
    """
    return number(metric.value) + (f" {seeds_text(metric)}" if metric.seed_std is not None else "")


def seeds_text(metric: Metric) -> str:
    """The deviation over the seeds: `± 0.0040`, or with a mark `± 0.0400 †`; empty for a single one."""
    if metric.seed_std is None:
        return ""
    return f"± {number(metric.seed_std)}" + (f" {MARK}" if metric.hangs_on_seeds else "")


def footnote(texts: Iterable[str]) -> str:
    """What the mark behind a score means; empty where none of the texts has it."""
    return FOOTNOTE if any(re.search(f"± \\S+ {MARK}", text) for text in texts) else ""


def score_title(name: str, found: Sequence[Metric | None]) -> str:
    """Heads a column of `score_text`: says what the deviations are over, where there are some."""
    return f"{name} ± seeds" if any(one and one.seed_std is not None for one in found) else name


def number(value: float | None) -> str:
    """Four digits behind the point; empty where there is no value."""
    return "" if value is None else f"{value:z.4f}"
