"""A column of text to the labels of a target: one reader per kind of task.

Each gives one label per unit (a sequence, or a token), checks every cell, and raises DataError naming file, line and
column for the first that is wrong.
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
    texts = table.columns[column]
    for row, text in enumerate(texts):
        if not text:
            raise table.error(row, column, "a class name", text)
    return Labels(np.array(texts, dtype=np.str_), np.ones(len(lengths), dtype=np.bool_))


def _sequence_numbers(table: tables.Table, column: str, _mask: str | None, lengths: npt.NDArray[np.int64]) -> Labels:
    numbers = np.array([_number(table, row, column, text) for row, text in enumerate(table.columns[column])])
    return Labels(numbers, np.ones(len(lengths), dtype=np.bool_))


def _token_classes(table: tables.Table, column: str, mask: str | None, lengths: npt.NDArray[np.int64]) -> Labels:
    return Labels(_characters(table, column, lengths), _mask(table, mask, lengths))


def _token_numbers(table: tables.Table, column: str, mask: str | None, lengths: npt.NDArray[np.int64]) -> Labels:
    cells = [_number_list(table, row, column, int(length)) for row, length in enumerate(lengths)]
    numbers = np.array([value for cell in cells for value in cell], dtype=np.float64)
    measured = ~np.isnan(numbers)
    return Labels(np.where(measured, numbers, 0.0), _mask(table, mask, lengths) & measured)


READERS: dict[tuple[str, str], Callable[[tables.Table, str, str | None, npt.NDArray[np.int64]], Labels]] = {
    ("sequence", "classification"): _sequence_classes,
    ("sequence", "regression"): _sequence_numbers,
    ("token", "classification"): _token_classes,
    ("token", "regression"): _token_numbers,
}


def _number(table: tables.Table, row: int, column: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= LARGEST or "_" in text:  # a NaN is not
        raise table.error(row, column, "a number", text)
    return value


def _number_list(table: tables.Table, row: int, column: str, length: int) -> list[float]:
    """The numbers of a JSON list, NaN for null."""
    text = table.columns[column][row]
    expected = f"a JSON list of {length} numbers or nulls"
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise table.error(row, column, expected, text) from None
    if not isinstance(values, list) or len(values) != length:
        found = f"a list of {len(values)}" if isinstance(values, list) else text
        raise table.error(row, column, expected, found)
    for value in values:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and abs(value) <= LARGEST):
            raise table.error(row, column, expected, str(value))
    return [math.nan if value is None else float(value) for value in values]


def _characters(table: tables.Table, column: str, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.str_]:
    """The characters of all cells, one per residue."""
    cells = table.columns[column]
    for row, (cell, length) in enumerate(zip(cells, lengths, strict=True)):
        if len(cell) != length:
            raise table.error(row, column, f"{length} characters, one per residue", f"{len(cell)}: {cell}")
    return np.frombuffer("".join(cells).encode("utf-32-le"), dtype="<U1")


def _mask(table: tables.Table, column: str | None, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    if column is None:
        return np.ones(int(lengths.sum()), dtype=np.bool_)
    characters = _characters(table, column, lengths)
    wrong = np.flatnonzero((characters != "0") & (characters != "1"))
    if wrong.size:
        row = int(np.searchsorted(np.cumsum(lengths), wrong[0], side="right"))
        raise table.error(row, column, "a mask of 0 and 1", str(characters[wrong[0]]))
    return np.asarray(characters == "1")
