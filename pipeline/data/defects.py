"""What is wrong with data, kind by kind, and where it stands.

All that can be found is gathered before any of it is raised: one run tells a user everything.
"""

from __future__ import annotations

import csv
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError, PipelineError, raise_all

if TYPE_CHECKING:
    from pipeline.data.tables import Table

SHOWN = 5  # places of a kind that an error names
EMPTY = "empty"  # a kind of its own in every column: many empty cells would hide the others


@dataclass(frozen=True)
class Place:
    """A file or a DataFrame; in it a data row, the first being 0, or a line."""

    file: Path
    row: int | None = None
    line: int | None = None
    in_memory: bool = False

    def text(self, known: dict[Path, list[int]] | None = None, beside: Path | None = None) -> str:
        """`FILE:LINE`, or the row of a DataFrame.

        Args:
            known: the lines of the rows of files that were looked through; of a large file that takes seconds.
            beside: a file that was named before; then this one is named in short.
        """
        if self.in_memory:
            row = "" if self.row is None else f"row {self.row}"
            return row if row and beside == self.file else ", ".join(filter(None, (str(self.file), row)))
        near = beside is not None and beside.parent == self.file.parent
        name = self.file.name if near else f"{self.file.parent.name}/{self.file.name}" if beside else str(self.file)
        line = self.line
        if self.row is not None:
            known = {} if known is None else known
            if self.file not in known:
                known[self.file] = [start for start, _ in records(self.file)]
            line = known[self.file][self.row]
        return name if line is None else f"{name}:{line}"


def records(path: Path) -> list[tuple[int, list[str]]]:
    """Each record below the header with the line it starts on, blank lines left out as pyarrow does."""
    csv.field_size_limit(1 << 30)
    found, start = [], 1
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        reader = csv.reader(stream)
        for record in reader:
            if record:
                found.append((start, record))
            start = reader.line_num + 1
    return found[1:]


def shown(text: str) -> str:
    """The beginning of a cell, quoted."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


class Kind:
    """Places that are wrong in one way: how many, the first of them, and what to do."""

    def __init__(self, what: str, one: str = "", several: str = "") -> None:
        """None yet; `what` they are, and the remedy for one and for several."""
        self.what, self.one, self.several, self.count = what, one, several, 0
        self._first: list[tuple[Place, str, str, str]] = []

    def add(self, place: Place, problem: str, found: str = "", before: str = "") -> None:
        """Counts a place. An error says `problem` behind the first, `before` before it, `found` behind the others."""
        self.count += 1
        if len(self._first) < SHOWN:
            self._first.append((place, problem, found, before))

    def error(self, known: dict[Path, list[int]]) -> DataError:
        """The error to raise: the first place, how many there are, where the next ones are, and what to do."""
        (place, problem, _, before), *others = self._first
        message = f"{before}{place.text(known)}{problem}"
        if self.count == 1:
            return DataError(f"{message}{self.one}")
        also = ", ".join(
            " ".join(filter(None, (other.text(known, place.file), found))) for other, _, found, _ in others
        )
        also += ", ..." if self.count > SHOWN else ""
        return DataError(f"{message}; {self.count} {self.what} are like that, also {also}{self.several}")


class BadCells:
    """The cells of a column that are not what was expected, and those that could not be read at all.

    Attributes:
        rows: of all of them.
        kinds: of those that are not what was expected.
    """

    def __init__(self, table: Table, column: str) -> None:
        """None yet, but for those that the table could not read."""
        self.table, self.column = table, column
        self.rows = set(table.unread.get(column, ()))
        self.kinds: dict[str, Kind] = {}

    def add(self, row: int, expected: str, found: str, kind: str = "") -> None:
        """Counts a cell, unless it is known already. Cells of another `kind` are named for themselves."""
        if row in self.rows:
            return
        self.rows.add(row)
        new = Kind("cells", "; correct or remove the row", "; correct or remove these rows")
        problem = f": column '{self.column}': expected {expected}, found {shown(found)}"
        self.kinds.setdefault(kind if found else EMPTY, new).add(self.table.place(row), problem, shown(found))

    @property
    def good(self) -> npt.NDArray[np.bool_]:
        """Which rows have a cell that is as expected."""
        good = np.full(len(self.table.row_of), True)
        good[list(self.rows)] = False
        return good


class Defects:
    """What is wrong with the data of a task, in the order in which it was found."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._found: list[PipelineError | BadCells] = []
        self._kinds: dict[Hashable, Kind] = {}

    def cells(self, table: Table, column: str) -> BadCells:
        """Those of a column, none yet."""
        cells = BadCells(table, column)
        self._found.append(cells)
        return cells

    @property
    def bad_cells(self) -> int:
        """How many cells are not as expected, or could not be read."""
        return sum(len(found.rows) for found in self._found if isinstance(found, BadCells))

    def kind(self, key: Hashable, what: str, several: str = "", one: str = "") -> Kind:
        """Those of a kind that is found in files or parts; see `Kind`."""
        return self._kinds.setdefault(key, Kind(what, one, several))

    def add(self, *errors: PipelineError) -> None:
        """Adds what is wrong once."""
        self._found += errors

    def refuse(self) -> None:
        """Raises DataError where something is wrong, as `raise_all`."""
        known: dict[Path, list[int]] = {}
        errors: list[PipelineError] = [kind.error(known) for kind in self._kinds.values() if kind.count]
        for found in self._found:
            errors += [kind.error(known) for kind in found.kinds.values()] if isinstance(found, BadCells) else [found]
        raise_all(errors)
