"""What kind of task the labels in a DataFrame make, where the user does not say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.defects import SHOWN
from pipeline.data.tables import cell_text
from pipeline.errors import DataError

if TYPE_CHECKING:
    import numpy.typing as npt
    import pandas as pd

LISTS = (list, tuple, np.ndarray)
MOST_CLASSES = 20  # different whole numbers in a column that are still taken for classes


def kind_of(frame: pd.DataFrame, sequence_column: str, target_column: str) -> tuple[str, str, str]:
    """The level of a task, its kind, and why, in words.

    Lists are numbers per token. Texts as long as their sequences, in every row, are classes per token, other texts
    classes of sequences; so are truth values, and whole numbers with few different values. Other numbers are numbers,
    also where all are written as text.
    """
    from pandas.api.types import is_bool_dtype, is_integer_dtype, is_numeric_dtype

    labels = _as_numbers(frame[target_column], frame[sequence_column])
    if is_bool_dtype(labels.dtype):
        return "sequence", "classification", "truth values"
    if is_integer_dtype(labels.dtype) and (different := labels.nunique()) <= MOST_CLASSES:
        return "sequence", "classification", f"whole numbers with {different} different values"
    if is_numeric_dtype(labels.dtype):
        return "sequence", "regression", "numbers"
    if len(labels) and all(isinstance(cell, LISTS) for cell in labels):
        return "token", "regression", "lists"
    if len(labels) and _one_each(labels, frame[sequence_column]).all():
        return "token", "classification", "texts with a character for each of the sequence"
    return "sequence", "classification", "texts"


def doubt(
    frame: pd.DataFrame, sequence_column: str, target_column: str, name: str, given: Mapping[str, Any]
) -> tuple[str, str, DataError] | None:
    """Whether labels that `kind_of` calls texts can hardly be meant as classes of sequences; None where they can.

    Args:
        frame: has both columns; its index numbers the rows.
        sequence_column: holds the sequences.
        target_column: holds the labels.
        name: of the frame, in the error.
        given: `class` and `task_type`, where the user says them.

    Returns:
        The level and the kind that most labels are of, and the error that names those that are not.
    """
    labels, sequences = frame[target_column], frame[sequence_column]
    where, level = f"{name}: column '{target_column}': ", given.get("class")
    is_list = np.array([isinstance(cell, LISTS) for cell in labels], dtype=bool)
    if level != "sequence" and is_list.sum() > len(labels) / 2:
        found = f"{is_list.sum()} of {len(labels)} labels are lists, {_rows(labels[~is_list])}"
        remedy = "correct or leave out such rows, or set level and task_type"
        return "token", "regression", DataError(f"{where}{found}; {remedy}")
    one_each = _one_each(labels, sequences)
    if level is None and one_each.sum() > len(labels) / 2:
        found = f"{one_each.sum()} of {len(labels)} labels have a character for each of the sequence"
        odd = _rows_of_lengths(labels[~one_each], sequences[~one_each])
        remedy = "correct such rows, or set level to token or sequence"
        return "token", "classification", DataError(f"{where}{found}, {odd}; {remedy}")
    return _hardly_classes(labels, where) if level != "token" and "task_type" not in given else None


def _hardly_classes(labels: pd.Series[Any], where: str) -> tuple[str, str, DataError] | None:
    """As `doubt`, for texts of which most are numbers, or most are different."""
    import pandas as pd

    if isinstance(labels.dtype, pd.CategoricalDtype):
        return None
    numbers = pd.to_numeric(labels.astype(object), errors="coerce")
    is_number = numbers.notna().to_numpy()
    different = labels.map(str).nunique()
    remedy = "set task_type to regression or classification"
    could_be_classes = (numbers.dropna() % 1 == 0).all() and numbers.nunique() <= MOST_CLASSES
    if 0 < len(labels) - is_number.sum() < len(labels) / 2 and not could_be_classes:
        found = f"{is_number.sum()} of {len(labels)} labels are numbers, {_rows(labels[~is_number])}"
        error = DataError(f"{where}{found}; clean or leave out such rows, or {remedy}")
        return "sequence", "regression", error
    if different > max(MOST_CLASSES, len(labels) / 2):
        found = f"{len(labels)} labels are {different} different texts, too many for classes"
        error = DataError(f"{where}{found}; name another target_column, or {remedy}")
        return "sequence", "classification", error
    return None


def _rows(labels: pd.Series[Any]) -> str:
    """The first of the rows that are not like the others."""
    first, *others = [(row, f"{label!r:.60}") for row, label in labels.iloc[:SHOWN].items()]
    also = [f"row {row} {label}" for row, label in others] + ["..."] * (len(labels) > SHOWN)
    return f"row {first[0]} is {first[1]}" + (f", also {', '.join(also)}" if also else "")


def _rows_of_lengths(labels: pd.Series[Any], sequences: pd.Series[Any]) -> str:
    """As `_rows`, with the lengths of label and sequence."""
    pairs = zip(labels.iloc[:SHOWN].items(), sequences, strict=False)
    first, *others = [(row, _length(label), _length(sequence)) for (row, label), sequence in pairs]
    also = [f"row {row} {found} for {length}" for row, found, length in others] + ["..."] * (len(labels) > SHOWN)
    row, found, length = first
    return f"row {row} has {found} for a sequence of {length}" + (f", also {', '.join(also)}" if also else "")


def _as_numbers(labels: pd.Series[Any], sequences: pd.Series[Any]) -> pd.Series[Any]:
    """The numbers that all of the labels are; else the labels as they are, such as `0110` for a sequence of four.

    Whoever made a column categorical has said what it is.
    """
    import pandas as pd

    if isinstance(labels.dtype, pd.CategoricalDtype) or pd.api.types.is_numeric_dtype(labels.dtype):
        return labels
    are_texts = all(isinstance(label, str) and label.isalnum() for label in labels)
    if are_texts and _one_each(labels, sequences).all():
        return labels
    numbers = pd.to_numeric(labels.astype(object), errors="coerce")
    return labels if numbers.isna().any() else numbers


def _one_each(labels: pd.Series[Any], sequences: pd.Series[Any]) -> npt.NDArray[np.bool_]:
    """Of each label whether it is as long as its sequence, shape (labels,)."""
    pairs = zip(sequences, labels, strict=True)
    return np.array([_length(sequence) == _length(label) for sequence, label in pairs], dtype=bool)


def _length(cell: Any) -> int:
    return len(cell if isinstance(cell, str) else cell_text(cell))
