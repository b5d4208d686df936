"""A column of text to the labels of a target: one reader per kind of task.

Each gives one label per unit (a sequence, or a token) and checks every cell: those that are wrong go to the defects of
the data, and have no label.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline.data.defects import EMPTY, BadCells, Defects

if TYPE_CHECKING:
    from pipeline.data.tables import Table

LARGEST = float(np.finfo(np.float32).max)  # heads are trained in float32

Lengths = npt.NDArray[np.int64]  # of the sequences; 0 where a sequence is missing: then any label is long enough


@dataclass
class Labels:
    """Labels of a target in a part: text or numbers, and a mask of the labels that count, both of shape (units,).

    `whole` says that nothing is wrong with any of them.
    """

    texts: npt.NDArray[np.str_] | npt.NDArray[np.float64]
    mask: npt.NDArray[np.bool_]
    whole: bool = True


@dataclass
class RawPart:
    """What could be read of a part: n sequences, u units. `whole` says that nothing is wrong with its sequences."""

    table: Table
    lengths: Lengths
    counts: npt.NDArray[np.int64]
    labels: list[Labels]
    whole: bool


def _sequence_classes(table: Table, column: str, _mask: str | None, _lengths: Lengths, defects: Defects) -> Labels:
    texts, bad = table.columns[column], defects.cells(table, column)
    for row, text in enumerate(texts):
        if not text:
            bad.add(row, "a class name", text)
    return Labels(np.array(texts, dtype=np.str_), bad.good)


def _sequence_numbers(table: Table, column: str, _mask: str | None, _lengths: Lengths, defects: Defects) -> Labels:
    texts, bad = table.columns[column], defects.cells(table, column)
    numbers = np.array([_number(text) for text in texts], dtype=np.float64)
    for row in np.flatnonzero(np.isnan(numbers)).tolist():
        bad.add(row, "a number", texts[row])
    return Labels(numbers, bad.good)


def _token_classes(table: Table, column: str, mask: str | None, lengths: Lengths, defects: Defects) -> Labels:
    bad = defects.cells(table, column)
    characters = _characters(bad, lengths)
    return Labels(characters, _mask(table, mask, lengths, defects) & np.repeat(bad.good, lengths))


def _token_numbers(table: Table, column: str, mask: str | None, lengths: Lengths, defects: Defects) -> Labels:
    values, bad = list[float](), defects.cells(table, column)
    for row, (text, length) in enumerate(zip(table.columns[column], lengths.tolist(), strict=True)):
        cell = _number_list(text, length)
        if isinstance(cell, tuple):
            kind, found = cell
            bad.add(row, f"a JSON list of {f'{length} ' if length else ''}numbers or nulls", found, kind)
            cell = [math.nan] * length
        values += cell if length else []
    numbers = np.array(values, dtype=np.float64)
    measured = ~np.isnan(numbers)
    return Labels(np.where(measured, numbers, 0.0), _mask(table, mask, lengths, defects) & measured)


READERS: dict[tuple[str, str], Callable[[Table, str, str | None, Lengths, Defects], Labels]] = {
    ("sequence", "classification"): _sequence_classes,
    ("sequence", "regression"): _sequence_numbers,
    ("token", "classification"): _token_classes,
    ("token", "regression"): _token_numbers,
}


def _number(text: str) -> float:
    """The number that a text is; NaN for any other text."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if abs(value) <= LARGEST and "_" not in text else math.nan


def _number_list(text: str, length: int) -> list[float] | tuple[str, str]:
    """The numbers of a JSON list, NaN for null; or what is wrong, and what was found in place of such a list."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return "text", text
    if not isinstance(values, list):
        return "text", text
    if len(values) != length and length:
        return "length", f"a list of {len(values)}"
    for value in values:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and abs(value) <= LARGEST):
            return "value", str(value)
    return [math.nan if value is None else float(value) for value in values]


def _characters(bad: BadCells, lengths: Lengths) -> npt.NDArray[np.str_]:
    """The characters of all cells of a column, one per residue; blanks for cells of another length, which are bad."""
    cells = bad.table.columns[bad.column]
    for row, (cell, length) in enumerate(zip(cells, lengths.tolist(), strict=True)):
        if len(cell) != length and length:
            kind = "length" if cell else EMPTY
            bad.add(row, f"{length} characters, one per residue", f"{len(cell)}: {cell}", kind)
    if bad.rows or not lengths.all():
        pairs = zip(cells, lengths.tolist(), strict=True)
        cells = [cell if len(cell) == length else " " * length for cell, length in pairs]
    return np.frombuffer("".join(cells).encode("utf-32-le"), dtype="<U1")


def _mask(table: Table, column: str | None, lengths: Lengths, defects: Defects) -> npt.NDArray[np.bool_]:
    if column is None:
        return np.ones(int(lengths.sum()), dtype=np.bool_)
    bad = defects.cells(table, column)
    characters = _characters(bad, lengths)
    wrong = np.flatnonzero((characters != "0") & (characters != "1"))
    rows, first = np.unique(np.searchsorted(np.cumsum(lengths), wrong, side="right"), return_index=True)
    for row, place in zip(rows.tolist(), wrong[first], strict=True):
        bad.add(row, "a mask of 0 and 1", str(characters[place]), "mask")
    return np.asarray(characters == "1")
