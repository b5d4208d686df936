"""What kind of task the labels in a DataFrame make, where the user does not say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import DataError

if TYPE_CHECKING:
    import numpy.typing as npt
    import pandas as pd

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
    if len(labels) and all(isinstance(cell, (list, tuple, np.ndarray)) for cell in labels):
        return "token", "regression", "lists"
    if len(labels) and _one_each(labels, frame[sequence_column]).all():
        return "token", "classification", "texts with a character for each of the sequence"
    return "sequence", "classification", "texts"


def refuse_nearly_one_each(frame: pd.DataFrame, sequence_column: str, target_column: str, name: str) -> None:
    """Raises DataError where most texts have a character for each of their sequence, and some do not.

    Args:
        frame: has both columns.
        sequence_column: holds the sequences.
        target_column: holds texts.
        name: of the frame, in the error.
    """
    labels, sequences = frame[target_column], frame[sequence_column]
    one_each = _one_each(labels, sequences)
    if one_each.sum() > len(labels) / 2:
        row = int(np.argmin(one_each))
        lengths = f"{len(str(labels.iloc[row]))} for a sequence of {len(str(sequences.iloc[row]))}"
        found = f"{one_each.sum()} of {len(labels)} labels have a character for each of the sequence, row {row} has"
        remedy = "correct such rows, or set level to token or sequence"
        raise DataError(f"{name}: column '{target_column}': {found} {lengths}; {remedy}")


def refuse_unclear(frame: pd.DataFrame, target_column: str, name: str) -> None:
    """Raises DataError where texts can hardly be meant as classes: most are numbers, or most are different.

    Args:
        frame: has them in `target_column`.
        target_column: holds texts.
        name: of the frame, in the error.
    """
    import pandas as pd

    labels = frame[target_column]
    if isinstance(labels.dtype, pd.CategoricalDtype):
        return
    numbers = pd.to_numeric(labels.astype(object), errors="coerce")
    is_number = numbers.notna().to_numpy()
    odd = np.flatnonzero(~is_number)
    different = labels.map(str).nunique()
    remedy = "set task_type to regression or classification"
    could_be_classes = (numbers.dropna() % 1 == 0).all() and numbers.nunique() <= MOST_CLASSES
    if 0 < len(odd) < len(labels) / 2 and not could_be_classes:
        found = f"{is_number.sum()} of {len(labels)} labels are numbers, row {odd[0]} is {labels.iloc[odd[0]]!r:.60}"
        raise DataError(f"{name}: column '{target_column}': {found}; clean or leave out such rows, or {remedy}")
    if different > max(MOST_CLASSES, len(labels) / 2):
        found = f"{len(labels)} labels are {different} different texts, too many for classes"
        raise DataError(f"{name}: column '{target_column}': {found}; name another target_column, or {remedy}")


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
    pairs = zip(sequences.map(str), labels.map(str), strict=True)
    return np.array([len(sequence) == len(label) for sequence, label in pairs], dtype=bool)
