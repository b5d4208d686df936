"""Tables as columns of text, from CSV files or a DataFrame, and where a cell stands.

Nothing is typed here: a digit string such as `0011` must keep its zeros.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from pipeline.data.defects import Defects, Kind, Place, records
from pipeline.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    import pandas as pd

REPLACED = "\ufffd"  # stands for bytes that are not UTF-8

# x[000..049], x{000..049}, x(000..049), x<000..049>, x_OP_000..049_CL_
RANGE = re.compile(r"(?:\[|\{|\(|<|_OP_)(\d+\.\.\d+)(?:\]|\}|\)|>|_CL_)")


@dataclass(frozen=True)
class Table:
    """Rows of one or several CSV files, in order, or of a DataFrame.

    Attributes:
        files: the files read; a DataFrame has a name in place of a path.
        file_of: for each row, the index of its file. Length n.
        row_of: for each row, its number within its file, the first data row being 0. Length n.
        columns: for each column asked for, its n cells as text.
        in_memory: the table is a DataFrame.
        unread: for columns where some cells could not be read, the rows of these; they stand as empty text.
        whole: all rows could be read.
    """

    files: tuple[Path, ...]
    file_of: list[int]
    row_of: list[int]
    columns: dict[str, list[str]]
    in_memory: bool = False
    unread: dict[str, set[int]] = field(default_factory=dict)
    whole: bool = True

    def place(self, row: int) -> Place:
        """Where a row stands."""
        return Place(self.files[self.file_of[row]], self.row_of[row], in_memory=self.in_memory)

    def where(self, name: str) -> str:
        """Where the row with this name stands, see `Part.rows`: `FILE:LINE`, or the row of a DataFrame."""
        stem, _, row = name.rpartition(":")
        file = next((one for one in self.files if one.name == stem), self.files[0])
        return Place(file, int(row), in_memory=self.in_memory).text()


def of_frame(frame: pd.DataFrame, name: str, columns: Sequence[str], defects: Defects) -> Table:
    """The `columns` of a DataFrame as text; `name` stands for it in error messages.

    Numbers become the text that reads back as the same number, lists of numbers JSON, lists of booleans a mask.
    `defects` gets the columns that it has not, and whether it has no rows.
    """
    header, place = [str(column) for column in frame.columns], Place(Path(name), in_memory=True)
    there = [column for column in columns if _has(header, column, place, defects)]
    if not len(frame):
        defects.kind("rows", "frames").add(place, ": expected rows, found none")
    cells = {column: [cell_text(cell) for cell in frame.iloc[:, header.index(column)]] for column in there}
    cells, unread = _with_unread(cells, columns, len(frame))
    rows = list(range(len(frame)))
    return Table((place.file,), [0] * len(frame), rows, cells, True, unread, whole=bool(rows))


def _with_unread(
    cells: dict[str, list[str]], columns: Sequence[str], rows: int
) -> tuple[dict[str, list[str]], dict[str, set[int]]]:
    """The cells of all columns, empty where a column is not there; and the rows of such."""
    missing = [column for column in columns if column not in cells]
    return cells | {column: [""] * rows for column in missing}, {column: set(range(rows)) for column in missing}


def cell_text(cell: Any) -> str:
    """A cell of a DataFrame as it would stand in a file; empty where it is missing."""
    if isinstance(cell, (list, tuple, np.ndarray)):
        values = [value.item() if isinstance(value, np.generic) else value for value in cell]
        if all(isinstance(value, bool) for value in values):
            return "".join(str(int(value)) for value in values)
        return json.dumps([None if value is None or value != value else value for value in values], default=str)
    missing = cell is None or type(cell).__name__ == "NAType" or cell != cell
    return "" if missing else str(cell)


def _has(header: Sequence[str], column: str, place: Place, defects: Defects) -> bool:
    """Whether there is one such column; else `defects` gets it."""
    times = header.count(column)
    if times != 1:
        what = "it twice" if times else f"no such column{nearest(column, header)}"
        kind = defects.kind(("column", column, times), "frames" if place.in_memory else "files")
        kind.add(place, f": expected a column '{column}', found {what}")
    return times == 1


def expand(name: str) -> list[str]:
    """The file names that `name` stands for: a range in any bracket form, with or without `.csv`.

    >>> expand("x[000..002]")
    ['x000.csv', 'x001.csv', 'x002.csv']
    """
    stem = RANGE.sub(r"{\1}", name.removesuffix(".csv"))
    if "{" not in stem and "\\" not in stem:
        return [f"{stem}.csv"]
    import braceexpand

    try:
        return [f"{part}.csv" for part in braceexpand.braceexpand(stem)]
    except ValueError as error:
        raise ConfigError(f"dataset: '{name}' is not a file name or a range such as x[000..004]: {error}") from error


def read(folder: Path, name: str, columns: Sequence[str], defects: Defects | None = None) -> Table:
    """The `columns` of the CSV files that `name` stands for, in `folder`, as text.

    Args:
        folder: of the files.
        name: see `expand`.
        columns: names in the header.
        defects: gets what is wrong, with as much as can be read in the table; by default it is raised.

    Raises:
        DataError: a file is missing, empty, not UTF-8, has no such column, or has a row of another width.
        ConfigError: see `expand`.
    """
    files, found = tuple(folder / part for part in expand(name)), defects or Defects()
    table = Table(files, [], [], {column: [] for column in columns}, unread={column: set() for column in columns})
    whole = True
    for index, path in enumerate(files):
        content = _read_file(path, columns, found)
        whole &= content.whole
        for column in columns:
            table.unread[column].update(len(table.row_of) + row for row in content.unread.get(column, ()))
            table.columns[column].extend(content.columns[column])
        table.file_of.extend([index] * len(content.row_of))
        table.row_of.extend(content.row_of)
    if defects is None:
        found.refuse()
    return replace(table, whole=whole)


def _read_file(path: Path, columns: Sequence[str], defects: Defects) -> Table:
    """What can be read of a file."""
    nothing = Table((path,), [], [], {column: [] for column in columns}, whole=False)
    header, spoilt = _header(path, defects)
    if not header:
        return nothing
    there = [column for column in columns if _has(header, column, Place(path, line=1), defects)]
    if spoilt:
        return _read_spoilt(path, header, there, columns, defects)
    bad: list[pa_csv.InvalidRow] = []

    def skip(row: pa_csv.InvalidRow) -> str:
        bad.append(row)
        return "skip"

    try:
        table = pa_csv.read_csv(
            path,
            read_options=pa_csv.ReadOptions(use_threads=False, block_size=1 << 24),
            parse_options=pa_csv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip),
            convert_options=pa_csv.ConvertOptions(
                include_columns=there,
                column_types={column: pa.string() for column in there},
                strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid as error:
        return _read_spoilt(path, header, there, columns, defects) if _not_utf8(path, error, defects) else nothing
    if bad:
        wide = _width(path, header, defects)
        before, found = wide.count, _read_spoilt(path, header, there, columns, defects)
        if wide.count == before:  # the two readers are not of one mind
            wide.add(Place(path, line=0), _fields(header, bad[0].actual_columns))
        return found
    if not table.num_rows:
        defects.kind("rows", "files").add(Place(path), ": expected rows below the header, found none")
        return nothing
    cells = {column: table[column].to_pylist() for column in there}
    cells, unread = _with_unread(cells, columns, table.num_rows)
    return Table((path,), [], list(range(table.num_rows)), cells, unread=unread)


def _header(path: Path, defects: Defects) -> tuple[list[str], bool]:
    """The names of the columns, none where they cannot be read; and whether bytes near them are not UTF-8."""
    header, spoilt = None, False
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            header = next(csv.reader(stream), None)
    except OSError as error:
        problem = f", found none ({error.strerror}); the files of a part lie in train/ and test/ of dataset_path"
        kind = defects.kind(("missing", error.strerror), "files")
        kind.add(Place(path.resolve()), problem, before="expected a CSV file at ")
        return [], False
    except (UnicodeDecodeError, csv.Error) as error:
        if not _not_utf8(path, error, defects):
            return [], False
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
            header, spoilt = next(csv.reader(stream), []), True
        return ([], True) if any(REPLACED in name for name in header) else (header, True)
    if not header:
        defects.kind("header", "files").add(Place(path), ": expected a header row, found an empty file")
    return header or [], spoilt


def _read_spoilt(
    path: Path, header: list[str], there: Sequence[str], columns: Sequence[str], defects: Defects
) -> Table:
    """The rows of a file with some of another width than the header, which are left out, or not in UTF-8."""
    rows, wide = [], _width(path, header, defects)
    found = records(path)
    for row, (line, record) in enumerate(found):
        if len(record) == len(header):
            rows.append(row)
        else:
            wide.add(Place(path, line=line), _fields(header, len(record)), f"with {len(record)}")
    cells = {column: [found[row][1][header.index(column)] for row in rows] for column in there}
    cells, unread = _with_unread(cells, columns, len(rows))
    for column in there:
        unread[column] = {row for row, cell in enumerate(cells[column]) if REPLACED in cell}
    return Table((path,), [], rows, cells, unread=unread, whole=0 < len(rows) == len(found))


def _width(path: Path, header: list[str], defects: Defects) -> Kind:
    """Rows of another width than the header of their file, in the files of a part."""
    return defects.kind(("width", path.parent, len(header)), "rows", "; correct or remove these rows")


def _fields(header: list[str], found: int) -> str:
    return f": expected {len(header)} fields as in the header, found {found}"


def _not_utf8(path: Path, error: Exception, defects: Defects) -> bool:
    """Adds the lines of a file that are not UTF-8. False where there are none, and it is not CSV for another reason."""
    kind, found = defects.kind(("utf-8", path.parent), "lines", "; save these files as UTF-8"), False
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            line.decode()
        except UnicodeDecodeError as wrong:
            byte = f"0x{line[wrong.start]:02x}"
            kind.add(Place(path, line=number), f": not a CSV file in UTF-8: found the byte {byte}", byte)
            found = True
    if not found:
        defects.add(DataError(f"{path}: not a CSV file in UTF-8: {error}"))
    return found
