"""Tables as columns of text, from CSV files or a DataFrame, and where a cell stands.

Nothing is typed here: a digit string such as `0011` must keep its zeros.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from pipeline.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 5  # bad cells of a column that an error names

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
    """

    files: tuple[Path, ...]
    file_of: list[int]
    row_of: list[int]
    columns: dict[str, list[str]]
    in_memory: bool = False

    def error(self, row: int, column: str, expected: str, found: str) -> DataError:
        """The error to raise for a cell: names file, line and column."""
        bad = BadCells(self, column)
        bad.add(row, expected, found)
        return bad.error()

    def where(self, name: str) -> str:
        """Where the row with this name stands, see `Part.rows`: `FILE:LINE`, or the row of a DataFrame."""
        stem, _, row = name.rpartition(":")
        file = next((one for one in self.files if one.name == stem), self.files[0])
        return place(file, int(row), self.in_memory)


class BadCells:
    """The cells of a column that are not what was expected: how many, and the first of them."""

    def __init__(self, table: Table, column: str) -> None:
        """None yet."""
        self.table, self.column, self.count = table, column, 0
        self._first: list[tuple[int, str, str]] = []

    def add(self, row: int, expected: str, found: str) -> None:
        """Counts a cell."""
        self.count += 1
        if len(self._first) < SHOWN:
            self._first.append((row, expected, found if len(found) <= 60 else found[:57] + "..."))

    def error(self) -> DataError:
        """The error to raise: file, line and column of the first, where the next ones are, and what to do."""
        (_, expected, found), *others = self._first
        first, *places = self._places()
        message = f"{first}: column '{self.column}': expected {expected}, found {found!r}"
        if self.count == 1:
            return DataError(f"{message}; correct or remove the row")
        also = ", ".join(f"{place} {found!r}" for place, (_, _, found) in zip(places, others, strict=True))
        also += ", ..." if self.count > SHOWN else ""
        return DataError(f"{message}; {self.count} cells are like that, also {also}; correct or remove these rows")

    def refuse(self) -> None:
        """Raises DataError where there are such cells."""
        if self.count:
            raise self.error()

    def _places(self) -> list[str]:
        """Where they stand: with the path the first, with the file's name alone the others."""
        table, rows = self.table, [row for row, _, _ in self._first]
        files, numbers = [table.files[table.file_of[row]] for row in rows], [table.row_of[row] for row in rows]
        if table.in_memory:
            return [f"{files[0]}, row {numbers[0]}", *(f"row {number}" for number in numbers[1:])]
        records = {file: _records(file) for file in set(files)}  # of a large file that takes seconds
        lines = [records[file][number][0] for file, number in zip(files, numbers, strict=True)]
        names = [str(files[0]), *(file.name for file in files[1:])]
        return [f"{name}:{line}" for name, line in zip(names, lines, strict=True)]


def place(file: Path, row: int, in_memory: bool = False) -> str:
    """Where a data row stands: `FILE:LINE`, or the row of a DataFrame."""
    return f"{file}, row {row}" if in_memory else f"{file}:{line_of(file, row)}"


def of_frame(frame: pd.DataFrame, name: str, columns: Sequence[str]) -> Table:
    """The `columns` of a DataFrame as text; `name` stands for it in error messages.

    Numbers become the text that reads back as the same number, lists of numbers JSON, lists of booleans a mask.

    Raises:
        DataError: it has no such column, or no rows.
    """
    header = [str(column) for column in frame.columns]
    for column in columns:
        _check_column(header, column, name)
    if not len(frame):
        raise DataError(f"{name}: expected rows, found none")
    cells = {column: [_text(cell) for cell in frame.iloc[:, header.index(column)]] for column in columns}
    return Table((Path(name),), [0] * len(frame), list(range(len(frame))), cells, in_memory=True)


def _text(cell: Any) -> str:
    """A cell of a DataFrame as it would stand in a file; empty where it is missing."""
    if isinstance(cell, (list, tuple, np.ndarray)):
        values = [value.item() if isinstance(value, np.generic) else value for value in cell]
        if all(isinstance(value, bool) for value in values):
            return "".join(str(int(value)) for value in values)
        return json.dumps([None if value is None or value != value else value for value in values], default=str)
    missing = cell is None or type(cell).__name__ == "NAType" or cell != cell
    return "" if missing else str(cell)


def _check_column(header: Sequence[str], column: str, where: str) -> None:
    if header.count(column) != 1:
        what = "it twice" if column in header else f"no such column{nearest(column, header)}"
        raise DataError(f"{where}: expected a column '{column}', found {what}")


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


def read(folder: Path, name: str, columns: Sequence[str]) -> Table:
    """The `columns` of the CSV files that `name` stands for, in `folder`, as text.

    Raises:
        DataError: a file is missing, empty, not UTF-8, has no such column, or has a row of another width.
    """
    files = tuple(folder / part for part in expand(name))
    cells: dict[str, list[str]] = {column: [] for column in columns}
    file_of: list[int] = []
    row_of: list[int] = []
    for index, path in enumerate(files):
        table = _read_file(path, columns)
        for column in columns:
            cells[column] += table[column].to_pylist()
        file_of += [index] * table.num_rows
        row_of += range(table.num_rows)
    return Table(files, file_of, row_of, cells)


def _read_file(path: Path, columns: Sequence[str]) -> pa.Table:
    header = _header(path)
    for column in columns:
        _check_column(header, column, f"{path}:1")
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
                include_columns=list(columns),
                column_types={column: pa.string() for column in columns},
                strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid as error:
        raise _not_utf8(path, error) from error
    if bad:
        line = next((line for line, record in _records(path) if len(record) != len(header)), 0)
        raise DataError(f"{path}:{line}: expected {len(header)} fields as in the header, found {bad[0].actual_columns}")
    if not table.num_rows:
        raise DataError(f"{path}: expected rows below the header, found none")
    return table


def _header(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            header = next(csv.reader(stream), None)
    except OSError as error:
        layout = "the files of a part lie in <dataset_path>/train and <dataset_path>/test"
        raise DataError(f"expected a CSV file at {path.resolve()}, found none ({error.strerror}); {layout}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise _not_utf8(path, error) from error
    if not header:
        raise DataError(f"{path}: expected a header row, found an empty file")
    return header


def _not_utf8(path: Path, error: Exception) -> DataError:
    """The error for a file that cannot be parsed, and the line of its first byte that is not UTF-8."""
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError as wrong:
        line = wrong.object.count(b"\n", 0, wrong.start) + 1
        return DataError(f"{path}:{line}: not a CSV file in UTF-8: found the byte 0x{wrong.object[wrong.start]:02x}")
    return DataError(f"{path}: not a CSV file in UTF-8: {error}")


def _records(path: Path) -> list[tuple[int, list[str]]]:
    """Each record below the header with the line it starts on, blank lines left out as pyarrow does."""
    csv.field_size_limit(1 << 30)
    records, start = [], 1
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        reader = csv.reader(stream)
        for record in reader:
            if record:
                records.append((start, record))
            start = reader.line_num + 1
    return records[1:]


def line_of(path: Path, row: int) -> int:
    """The line that a data row begins on."""
    return _records(path)[row][0]
