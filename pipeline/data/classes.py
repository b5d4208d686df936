"""The classes that the labels of a target are, with their weights and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.data.defects import Defects
from pipeline.data.parts import UNKNOWN, Part, Target
from pipeline.errors import ConfigError, DataError, few_of

if TYPE_CHECKING:
    from pipeline.config.task import Task
    from pipeline.data.labels import Labels, RawPart


def target_of(task: Task, index: int, raw: Mapping[str, RawPart], notes: list[str], defects: Defects) -> Target:
    """The target with its vocabulary: the sorted unmasked train labels, then the labels of test and val alone.

    Args:
        task: names the target, and may declare the number of its classes.
        index: of the target in the task.
        raw: the parts.
        notes: gets warnings.
        defects: gets what is wrong with the labels that could be read, or with the class weights.
    """
    name = task.target_column[index]
    labels = {part: one.labels[index] for part, one in raw.items()}
    for part, one in raw.items():
        if labels[part].whole and not labels[part].mask.any():
            defects.add(DataError(f"{one.table.files[0]}: column '{name}': every position of {part} is masked out"))
    if task.task_type == "regression":
        return Target(name, None, 1)
    classes, fit = _vocabulary(task, index, raw, notes, defects)
    target = Target(name, tuple(classes), max(task.sizes[index] or 0, len(classes)))
    if fit and all(label.whole and label.mask.any() for label in labels.values()):
        defects.add(*_wrong_weights(task, target, index))
    return target


def _vocabulary(
    task: Task, index: int, raw: Mapping[str, RawPart], notes: list[str], defects: Defects
) -> tuple[list[str], bool]:
    """The labels in order, and whether they are no more than were declared."""
    name, declared = task.target_column[index], task.sizes[index]
    classes, fit = list[str](), True
    for part, one in raw.items():
        label = one.labels[index]
        new = [str(text) for text in np.unique(label.texts[label.mask]) if str(text) not in classes]
        many = declared is not None and len(classes) + len(new) > declared
        if part == "train":
            if many:
                found = f"expected at most {declared} classes, found {len(new)}: {few_of(new)}"
                defects.add(DataError(f"{one.table.files[0]}: column '{name}': {found}"))
            elif declared is not None and len(new) < declared:
                notes.append(f"{name}: {declared} classes declared, {len(new)} in the train part")
        elif many and fit and classes:
            expected = f"one of the {declared} classes {few_of(classes)}"
            _refuse(one, index, name, new, expected, defects)
        elif new and not many:
            notes.append(f"{name}: {part} has labels that train has not and that cannot be learnt: {few_of(new)}")
        classes += new if part == "train" or not many else []
        fit &= not many
    return classes, fit


def _refuse(raw: RawPart, index: int, name: str, new: list[str], expected: str, defects: Defects) -> None:
    """Adds the cells whose labels are too many."""
    label, bad = raw.labels[index], defects.cells(raw.table, name)
    units = np.flatnonzero(label.mask & np.isin(label.texts, new))
    rows = np.searchsorted(np.cumsum(raw.counts), units, side="right")
    for unit, row in zip(units.tolist(), rows.tolist(), strict=True):
        bad.add(row, expected, str(label.texts[unit]))


def _own_weights(task: Task, index: int) -> Any:
    weights = task.class_weights
    return weights[index] if len(task.target_column) > 1 and isinstance(weights, list) else weights


def _wrong_weights(task: Task, target: Target, index: int) -> list[ConfigError]:
    """What is wrong with the class weights of a target."""
    own = _own_weights(task, index)
    if task.class_weights in (None, "balanced"):
        return []
    numbers = isinstance(own, list) and all(isinstance(w, (int, float)) and w >= 0 for w in own)
    if numbers and len(own) in (len(target.classes or ()), target.outputs):
        return []
    expected = f"'balanced', or a weight for each of {few_of(target.classes or ())}"
    return [ConfigError(f"task '{task.task_name}': class_weights: expected {expected}, found {own!r}")]


def weighted(task: Task, target: Target, index: int, train: Part) -> Target:
    """The target with its class weights; `balanced` means n / (classes * n of the class), as in scikit-learn."""
    if task.class_weights is None or target.classes is None:
        return target
    if task.class_weights == "balanced":
        counts = np.bincount(train.values[index][train.masks[index]].astype(np.int64), minlength=target.outputs)
        seen = counts[counts > 0]
        shares = np.where(counts > 0, seen.sum() / (len(seen) * np.maximum(counts, 1)), 0.0)
        return replace(target, weights=tuple(float(share) for share in shares))
    own = _own_weights(task, index)
    return replace(target, weights=tuple([float(w) for w in own] + [0.0] * (target.outputs - len(own))))


def values_of(target: Target, label: Labels) -> npt.NDArray[np.int32] | npt.NDArray[np.float64]:
    """Class indices (`UNKNOWN` under the mask) or numbers, shape (units,)."""
    if target.classes is None:
        return np.asarray(label.texts, dtype=np.float64)
    texts, inverse = np.unique(label.texts, return_inverse=True)
    number = {name: index for index, name in enumerate(target.classes)}
    found = np.array([number.get(str(text), UNKNOWN) for text in texts])[inverse]
    return np.where(label.mask, found, UNKNOWN).astype(np.int32)
