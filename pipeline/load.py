"""Stage 1: CSV files, or DataFrames, to `Examples`.

Labels of every kind of task have one form: flat arrays over *units*. A unit is a sequence in a sequence-level task and
a token in a token-level one; `Part.counts` says how many units each sequence has.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.config.task import Task
from pipeline.data.labels import READERS, Labels
from pipeline.data.parts import UNKNOWN, Part, Target
from pipeline.data.report import data_report
from pipeline.data.tables import BadCells, Table, of_frame, read
from pipeline.errors import ConfigError, DataError, few_of
from pipeline.statistics.metrics import metric_name

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Examples:
    """A task's labelled sequences.

    Attributes:
        task: whose they are.
        targets: what is predicted.
        train: to train heads on.
        test: to score them on.
        val: for early stopping.
        notes: warnings for whoever reads the result.
        limit: the most characters that a sequence may have; longer ones are left out.
        encoder_limit: the encoder's own limit, which `limit` never exceeds.
        found: shares that the report on the data gives, see `DataReport.metrics`.
        seconds: that reading them took.
    """

    task: Task
    targets: tuple[Target, ...]
    train: Part
    test: Part
    val: Part | None = None
    notes: tuple[str, ...] = ()
    limit: int | None = None
    encoder_limit: int | None = None
    found: Mapping[str, float] = field(default_factory=dict)
    seconds: float = field(default=0.0, compare=False)

    @property
    def parts(self) -> dict[str, Part]:
        """The parts there are, by name."""
        parts = {"train": self.train, "test": self.test}
        return parts if self.val is None else {**parts, "val": self.val}

    @property
    def metrics(self) -> dict[str, float]:
        """Sequences of each part that are used, and left out because they are too long; shares that were found."""
        name = metric_name(self.task.task_name)
        used = {f"{name}/{part}_rows": float(len(content)) for part, content in self.parts.items()}
        left_out = {f"{name}/{part}_left_out": float(content.left_out) for part, content in self.parts.items()}
        found = {f"{name}/{what}": share for what, share in self.found.items()}
        return {**used, **left_out, **found, f"{name}/read_seconds": self.seconds}


@dataclass
class _RawPart:
    table: Table
    counts: npt.NDArray[np.int64]
    labels: list[Labels]


def load(task: Task, max_seq_length: int | None = None, frames: Mapping[str, pd.DataFrame] | None = None) -> Examples:
    """Reads a task's CSV files, checks every cell, types the labels and leaves out what is too long.

    Args:
        task: where the files are and what their columns mean.
        max_seq_length: the encoder's own limit in characters, if it has one; the smaller of it and the task's holds.
        frames: the parts `train`, `test` and, for early stopping, `val` as DataFrames; then no file is read. Cells are
            as in files; token-level labels may be lists.

    Raises:
        DataError: names file, line and column, what was expected, what was found, and how often.
        ConfigError: a part is missing in `frames`.
    """
    began, notes = time.perf_counter(), list[str]()
    tables = _tables(task, frames, notes)
    raw = {part: _read_part(task, table) for part, table in tables.items()}
    targets = tuple(_target(task, index, raw, notes) for index in range(len(task.target_column)))
    limits = [limit for limit in (task.max_seq_length, max_seq_length) if limit is not None]
    limit = min(limits, default=None)
    parts = {part: _make_part(task, targets, raw[part], part, limit) for part in raw}
    targets = tuple(_weighted(task, target, index, parts["train"]) for index, target in enumerate(targets))
    for name, part in parts.items():
        fitting = len(raw[name].counts) - part.left_out
        if fitting > len(part):
            notes.append(f"{name}: max_rows takes {len(part)} of {fitting} sequences")
        if part.left_out:
            notes.append(f"{name}: {part.left_out} of {len(raw[name].counts)} sequences left out, over {limit}")
    report = data_report(targets, parts, raw["test"].table.where)
    notes += report.notes
    train, test, val = parts["train"], parts["test"], parts.get("val")
    found, seconds = report.metrics, time.perf_counter() - began
    return Examples(task, targets, train, test, val, tuple(notes), limit, max_seq_length, found, seconds)


def _tables(task: Task, frames: Mapping[str, pd.DataFrame] | None, notes: list[str]) -> dict[str, Table]:
    """The table of each part that is used."""
    columns = [task.sequence_column, *task.target_column, *(mask for mask in task.masks if mask)]
    columns = list(dict.fromkeys(columns))
    parts: dict[str, Any] = (
        {part: file for part, file in vars(task.dataset).items() if file} if frames is None else {**frames}
    )
    if not {"train", "test"} <= set(parts) <= {"train", "test", "val"}:
        raise ConfigError(
            f"frames: expected train, test and, for early stopping, val; found {', '.join(parts) or 'none'}"
        )
    if "val" in parts and task.patience is None:
        notes.append("dataset.val is not used; set patience for early stopping on it")
        del parts["val"]
    if frames is not None:
        return {part: of_frame(frame, f"frames['{part}']", columns) for part, frame in parts.items()}
    return {part: read(Path(task.dataset_path) / part, file, columns) for part, file in parts.items()}


def _read_part(task: Task, table: Table) -> _RawPart:
    sequences, bad = table.columns[task.sequence_column], BadCells(table, task.sequence_column)
    for row, sequence in enumerate(sequences):
        if not sequence:
            bad.add(row, "a sequence", sequence)
    bad.refuse()
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    read, pairs = READERS[task.level, task.task_type], zip(task.target_column, task.masks, strict=True)
    labels = [read(table, column, mask, lengths) for column, mask in pairs]
    return _RawPart(table, lengths if task.level == "token" else np.ones_like(lengths), labels)


def _target(task: Task, index: int, raw: dict[str, _RawPart], notes: list[str]) -> Target:
    """The target with its vocabulary: the sorted unmasked train labels, then the labels of test and val alone."""
    name, declared = task.target_column[index], task.sizes[index]
    labels = {part: raw[part].labels[index] for part in raw}
    for part, label in labels.items():
        if not label.mask.any():
            raise DataError(f"{raw[part].table.files[0]}: column '{name}': every position of {part} is masked out")
    if task.task_type == "regression":
        return Target(name, None, 1)
    seen = [str(text) for text in np.unique(labels["train"].texts[labels["train"].mask])]
    if declared is not None and len(seen) > declared:
        found = f"found {len(seen)}: {few_of(seen)}"
        raise DataError(f"{raw['train'].table.files[0]}: column '{name}': expected at most {declared} classes, {found}")
    if declared is not None and len(seen) < declared:
        notes.append(f"{name}: {declared} classes declared, {len(seen)} in the train part")
    classes = list(seen)
    for part, label in labels.items():
        new = [str(text) for text in np.unique(label.texts[label.mask]) if str(text) not in classes]
        if declared is not None and len(classes) + len(new) > declared:
            unit = int(np.flatnonzero(label.mask & (label.texts == new[0]))[0])
            row = int(np.searchsorted(np.cumsum(raw[part].counts), unit, side="right"))
            raise raw[part].table.error(row, name, f"one of the {declared} classes {few_of(classes)}", new[0])
        if new:
            notes.append(f"{name}: {part} has labels that train has not and that cannot be learnt: {few_of(new)}")
        classes += new
    return Target(name, tuple(classes), max(declared or 0, len(classes)))


def _weighted(task: Task, target: Target, index: int, train: Part) -> Target:
    """The target with its class weights; `balanced` means n / (classes * n of the class), as in scikit-learn."""
    weights = task.class_weights
    if weights is None or target.classes is None:
        return target
    classes = len(target.classes)
    if weights == "balanced":
        counts = np.bincount(train.values[index][train.masks[index]].astype(np.int64), minlength=target.outputs)
        seen = counts[counts > 0]
        shares = np.where(counts > 0, seen.sum() / (len(seen) * np.maximum(counts, 1)), 0.0)
        return replace(target, weights=tuple(float(share) for share in shares))
    own = weights[index] if len(task.target_column) > 1 and isinstance(weights, list) else weights
    numbers = isinstance(own, list) and all(isinstance(w, (int, float)) and w >= 0 for w in own)
    if not numbers or len(own) not in (classes, target.outputs):
        expected = f"'balanced', or a weight for each of {few_of(target.classes)}"
        raise ConfigError(f"task '{task.task_name}': class_weights: expected {expected}, found {own!r}")
    return replace(target, weights=tuple([float(w) for w in own] + [0.0] * (target.outputs - len(own))))


def _make_part(task: Task, targets: tuple[Target, ...], raw: _RawPart, part: str, limit: int | None) -> Part:
    """Drops sequences longer than `limit`, draws `max_rows` of the others, and encodes their labels."""
    table = raw.table
    sequences = table.columns[task.sequence_column]
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    fits = np.full(len(lengths), True) if limit is None else lengths <= limit
    keep = _some(fits, getattr(task.max_rows, part), f"{task.random_seed} {part}")
    if not keep.any():
        found = f"the shortest of {len(lengths)} has {lengths.min()}"
        own = limit == task.max_seq_length
        remedy = "raise max_seq_length" if own else "that is all the encoder takes: use another checkpoint"
        raise DataError(f"{table.files[0]}: expected sequences of at most {limit} in {part}, {found}; {remedy}")
    units = np.repeat(keep, raw.counts)
    values, masks = [], []
    for target, label in zip(targets, raw.labels, strict=True):
        masks.append(label.mask[units])
        values.append(_values(target, label)[units])
        if not masks[-1].any():
            raise DataError(f"{table.files[0]}: column '{target.name}': no label is left in {part} up to {limit}")
    names = [part if table.in_memory else file.name for file in table.files]
    rows = [f"{names[file]}:{row}" for file, row in zip(table.file_of, table.row_of, strict=True)]
    kept = list(compress(sequences, keep))
    return Part(kept, list(compress(rows, keep)), raw.counts[keep], values, masks, int((~fits).sum()), lengths)


def _some(fits: npt.NDArray[np.bool_], most: int | None, seed: str) -> npt.NDArray[np.bool_]:
    """Which rows are used, shape (rows,): all that fit, or `most` of them, drawn at random without replacement."""
    found = np.flatnonzero(fits)
    if most is None or most >= len(found):
        return fits
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big")
    keep = np.zeros_like(fits)
    keep[np.random.default_rng(number).choice(found, most, replace=False)] = True
    return keep


def _values(target: Target, label: Labels) -> npt.NDArray[np.int32] | npt.NDArray[np.float64]:
    if target.classes is None:
        return np.asarray(label.texts, dtype=np.float64)
    texts, inverse = np.unique(label.texts, return_inverse=True)
    number = {name: index for index, name in enumerate(target.classes)}
    found = np.array([number.get(str(text), UNKNOWN) for text in texts])[inverse]
    return np.where(label.mask, found, UNKNOWN).astype(np.int32)
