"""A column of text to the labels of a target: one reader per kind of task.

Each gives one label per unit (a sequence, or a token), checks every cell, and raises DataError naming file, line and
column of the first that are wrong, and how many there are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.data import tables

LARGEST = float(np.finfo(np.float32).max)  # heads are trained in float32


@dataclass
class Labels:
    """Labels of a target in a part: text or numbers, and a mask of the labels that count, both of shape (units,)."""

    texts: npt.NDArray[np.str_] | npt.NDArray[np.float64]
    mask: npt.NDArray[np.bool_]


def _sequence_classes(table: tables.Table, column: str, _mask: str | None, lengths: npt.NDArray[np.int64]) -> Labels:
    texts, bad = table.columns[column], tables.BadCells(table, column)
    for row, text in enumerate(texts):
        if not text:
            bad.add(row, "a class name", text)
    bad.refuse()
    return Labels(np.array(texts, dtype=np.str_), np.ones(len(lengths), dtype=np.bool_))


def _sequence_numbers(table: tables.Table, column: str, _mask: str | None, lengths: npt.NDArray[np.int64]) -> Labels:
    texts, bad = table.columns[column], tables.BadCells(table, column)
    numbers = np.array([_number(text) for text in texts])
    for row in np.flatnonzero(np.isnan(numbers)).tolist():
        bad.add(row, "a number", texts[row])
    bad.refuse()
    return Labels(numbers, np.ones(len(lengths), dtype=np.bool_))


def _token_classes(table: tables.Table, column: str, mask: str | None, lengths: npt.NDArray[np.int64]) -> Labels:
    return Labels(_characters(table, column, lengths), _mask(table, mask, lengths))


def _token_numbers(table: tables.Table, column: str, mask: str | None, lengths: npt.NDArray[np.int64]) -> Labels:
    values, bad = list[float](), tables.BadCells(table, column)
    for row, length in enumerate(lengths):
        cell = _number_list(table.columns[column][row], int(length))
        if isinstance(cell, str):
            bad.add(row, f"a JSON list of {length} numbers or nulls", cell)
        else:
            values += cell
    bad.refuse()
    numbers = np.array(values, dtype=np.float64)
    measured = ~np.isnan(numbers)
    return Labels(np.where(measured, numbers, 0.0), _mask(table, mask, lengths) & measured)


READERS: dict[tuple[str, str], Callable[[tables.Table, str, str | None, npt.NDArray[np.int64]], Labels]] = {
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


def _number_list(text: str, length: int) -> list[float] | str:
    """The numbers of a JSON list, NaN for null; or what was found in place of such a list."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(values, list) or len(values) != length:
        return f"a list of {len(values)}" if isinstance(values, list) else text
    for value in values:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and abs(value) <= LARGEST):
            return str(value)
    return [math.nan if value is None else float(value) for value in values]


def _characters(table: tables.Table, column: str, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.str_]:
    """The characters of all cells, one per residue."""
    cells, bad = table.columns[column], tables.BadCells(table, column)
    for row, (cell, length) in enumerate(zip(cells, lengths, strict=True)):
        if len(cell) != length:
            bad.add(row, f"{length} characters, one per residue", f"{len(cell)}: {cell}")
    bad.refuse()
    return np.frombuffer("".join(cells).encode("utf-32-le"), dtype="<U1")


def _mask(table: tables.Table, column: str | None, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    if column is None:
        return np.ones(int(lengths.sum()), dtype=np.bool_)
    characters, bad = _characters(table, column, lengths), tables.BadCells(table, column)
    wrong = np.flatnonzero((characters != "0") & (characters != "1"))
    rows, first = np.unique(np.searchsorted(np.cumsum(lengths), wrong, side="right"), return_index=True)
    for row, place in zip(rows.tolist(), wrong[first], strict=True):
        bad.add(row, "a mask of 0 and 1", str(characters[place]))
    bad.refuse()
    return np.asarray(characters == "1")
