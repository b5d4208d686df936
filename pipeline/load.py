"""Stage 1: CSV files, or DataFrames, to `Examples`.

Labels of every kind of task have one form: flat arrays over *units*. A unit is a sequence in a sequence-level task and
a token in a token-level one; `Part.counts` says how many units each sequence has.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.config.task import Task
from pipeline.data.classes import target_of, values_of, weighted
from pipeline.data.defects import Defects
from pipeline.data.labels import READERS, Labels, RawPart
from pipeline.data.parts import Part, Target
from pipeline.data.report import data_report
from pipeline.data.tables import Table, of_frame, read
from pipeline.errors import ConfigError, DataError, PipelineError, raise_all
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


def load_all(
    tasks: Sequence[Task], max_seq_length: int | None = None, frames: Mapping[str, pd.DataFrame] | None = None
) -> list[Examples]:
    """Loads each task, see `load`. Raises what is wrong with any of them as `raise_all`."""
    examples, errors = list[Examples](), list[PipelineError]()
    for task in tasks:
        try:
            examples.append(load(task, max_seq_length, frames))
        except PipelineError as error:
            errors.append(error)
    raise_all(errors)
    return examples


def load(
    task: Task,
    max_seq_length: int | None = None,
    frames: Mapping[str, pd.DataFrame] | None = None,
    unclear: Mapping[str, Sequence[DataError]] | None = None,
) -> Examples:
    """Reads a task's CSV files, checks every cell, types the labels and leaves out what is too long.

    Args:
        task: where the files are and what their columns mean.
        max_seq_length: the encoder's own limit in characters, if it has one; the smaller of it and the task's holds.
        frames: the parts `train`, `test` and, for early stopping, `val` as DataFrames; then no file is read. Cells are
            as in files; token-level labels may be lists.
        unclear: parts whose labels are not read, as it is not clear what they are, and the errors that say so.

    Raises:
        DataError: names file, line and column, what was expected, what was found, and how often; everything that is
            wrong and can be found, whatever else is.
        ConfigError: a part is missing in `frames`, or class weights are not those of the classes.
    """
    began, notes, defects, unclear = time.perf_counter(), list[str](), Defects(), unclear or {}
    tables = _tables(task, frames, notes, defects)
    raw = {part: _read_part(task, table, defects, unclear.get(part)) for part, table in tables.items()}
    targets = tuple(target_of(task, index, raw, notes, defects) for index in range(len(task.target_column)))
    limits = [limit for limit in (task.max_seq_length, max_seq_length) if limit is not None]
    limit = min(limits, default=None)
    kept = {part: _kept(task, raw[part], part, limit, defects) for part in raw}
    defects.refuse()
    parts = {part: _make_part(task, targets, raw[part], part, kept[part], limit) for part in raw}
    targets = tuple(weighted(task, target, index, parts["train"]) for index, target in enumerate(targets))
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


def _tables(
    task: Task, frames: Mapping[str, pd.DataFrame] | None, notes: list[str], defects: Defects
) -> dict[str, Table]:
    """The table of each part that is used and whose files can be named."""
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
    parts = {part: parts[part] for part in ("train", "test", "val") if part in parts}
    if frames is not None:
        return {part: of_frame(frame, f"frames['{part}']", columns, defects) for part, frame in parts.items()}
    tables = {}
    for part, file in parts.items():
        try:
            tables[part] = read(Path(task.dataset_path) / part, file, columns, defects)
        except ConfigError as error:
            defects.add(error)
    return tables


def _read_part(task: Task, table: Table, defects: Defects, unclear: Sequence[DataError] | None) -> RawPart:
    sequences, bad = table.columns[task.sequence_column], defects.cells(table, task.sequence_column)
    for row, sequence in enumerate(sequences):
        if not sequence:
            bad.add(row, "a sequence", sequence)
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    counts = lengths if task.level == "token" else np.ones_like(lengths)
    whole = table.whole and not bad.rows
    if unclear is not None:
        defects.add(*unclear)
        none = Labels(np.zeros(counts.sum()), np.zeros(counts.sum(), dtype=np.bool_), whole=False)
        return RawPart(table, lengths, counts, [none] * len(task.target_column), whole)
    labels = list[Labels]()
    for column, mask in zip(task.target_column, task.masks, strict=True):
        before = defects.bad_cells
        found = READERS[task.level, task.task_type](table, column, mask, lengths, defects)
        labels.append(replace(found, whole=whole and defects.bad_cells == before))
    return RawPart(table, lengths, counts, labels, whole)


def _kept(task: Task, raw: RawPart, part: str, limit: int | None, defects: Defects) -> npt.NDArray[np.bool_]:
    """Which sequences are used, shape (rows,): those no longer than `limit`, and `max_rows` of them."""
    fits = np.full(len(raw.lengths), True) if limit is None else raw.lengths <= limit
    keep = _some(fits, getattr(task.max_rows, part), f"{task.random_seed} {part}")
    file = raw.table.files[0]
    if raw.whole and not keep.any():
        found = f"the shortest of {len(raw.lengths)} has {raw.lengths.min()}"
        own = limit == task.max_seq_length
        remedy = "raise max_seq_length" if own else "that is all the encoder takes: use another checkpoint"
        defects.add(DataError(f"{file}: expected sequences of at most {limit} in {part}, {found}; {remedy}"))
        return keep
    units = np.repeat(keep, raw.counts)
    for column, label in zip(task.target_column, raw.labels, strict=True):
        if label.whole and label.mask.any() and not label.mask[units].any():
            defects.add(DataError(f"{file}: column '{column}': no label is left in {part} up to {limit}"))
    return keep


def _make_part(
    task: Task, targets: tuple[Target, ...], raw: RawPart, part: str, keep: npt.NDArray[np.bool_], limit: int | None
) -> Part:
    """The sequences that are used, with their labels encoded."""
    table, units = raw.table, np.repeat(keep, raw.counts)
    values = [values_of(target, label)[units] for target, label in zip(targets, raw.labels, strict=True)]
    masks = [label.mask[units] for label in raw.labels]
    names = [part if table.in_memory else file.name for file in table.files]
    rows = [f"{names[file]}:{row}" for file, row in zip(table.file_of, table.row_of, strict=True)]
    kept = list(compress(table.columns[task.sequence_column], keep))
    left_out = 0 if limit is None else int((raw.lengths > limit).sum())
    return Part(kept, list(compress(rows, keep)), raw.counts[keep], values, masks, left_out, raw.lengths)


def _some(fits: npt.NDArray[np.bool_], most: int | None, seed: str) -> npt.NDArray[np.bool_]:
    """Which rows are used, shape (rows,): all that fit, or `most` of them, drawn at random without replacement."""
    found = np.flatnonzero(fits)
    if most is None or most >= len(found):
        return fits
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big")
    keep = np.zeros_like(fits)
    keep[np.random.default_rng(number).choice(found, most, replace=False)] = True
    return keep
