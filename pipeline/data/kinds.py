"""What kind of task the labels in a DataFrame make, where the user does not say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

MOST_CLASSES = 20  # different whole numbers in a column that are still taken for classes


def kind_of(frame: pd.DataFrame, sequence_column: str, target_column: str) -> tuple[str, str, str]:
    """The level of a task, its kind, and why, in words.

    Lists are numbers per token. Texts as long as their sequences, in every row, are classes per token, other texts
    classes of sequences; so are truth values, and whole numbers with few different values. Other numbers are numbers.
    """
    from pandas.api.types import is_bool_dtype, is_integer_dtype, is_numeric_dtype

    labels = frame[target_column]
    if is_bool_dtype(labels.dtype):
        return "sequence", "classification", "truth values"
    if is_integer_dtype(labels.dtype) and (different := labels.nunique()) <= MOST_CLASSES:
        return "sequence", "classification", f"whole numbers with {different} different values"
    if is_numeric_dtype(labels.dtype):
        return "sequence", "regression", "numbers"
    if len(labels) and all(isinstance(cell, (list, tuple, np.ndarray)) for cell in labels):
        return "token", "regression", "lists"
    pairs = zip(frame[sequence_column].astype(str), labels.astype(str), strict=True)
    if len(labels) and all(len(sequence) == len(label) for sequence, label in pairs):
        return "token", "classification", "texts with a character for each of the sequence"
    return "sequence", "classification", "texts"
