"""Predictions and labels of one target, by test sequence: what metrics, intervals and differences are computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import DataError
from pipeline.statistics.metrics import PROBE

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Predictions:
    """What a head predicted for one target on the test set, masked units left out.

    A unit is what has a label: a sequence, or a token. The units of a sequence stand one behind the other.

    Attributes:
        true: class indices or numbers, shape (units,).
        predicted: numbers, shape (units,), or probabilities or scores, shape (units, outputs).
        counts: units of each sequence, all at least 1, shape (sequences,).
        classes: the labels; None where the target is a number.
        rows: of each sequence, where in the data it is from (FILE:ROW); empty where nobody asks.
        further: what heads of further seeds predicted, each in the shape of `predicted`.
    """

    true: npt.NDArray[np.int64] | Floats
    predicted: Floats
    counts: npt.NDArray[np.int64]
    classes: Sequence[str] | None = None
    rows: tuple[str, ...] = ()
    further: tuple[Floats, ...] = ()

    @property
    def seeds(self) -> list[Predictions]:
        """Those of each head seed alone."""
        return [replace(self, predicted=one, further=()) for one in (self.predicted, *self.further)]

    def __len__(self) -> int:
        """The number of test sequences."""
        return len(self.counts)

    def by_sequence(self, columns: Floats) -> Floats:
        """Sums over the units of each sequence: (units, columns) to (sequences, columns)."""
        return np.add.reduceat(columns, np.cumsum(self.counts) - self.counts, axis=0, dtype=np.float64)

    def check_same_labels(self, other: Predictions) -> None:
        """Raises DataError unless two heads predicted the same units of the same sequences."""
        same = (
            self.rows == other.rows
            and np.array_equal(self.counts, other.counts)
            and np.array_equal(self.true, other.true)
        )
        if not same:
            raise DataError(
                f"two checkpoints can be compared on the same test sequences and labels only, not on {len(self)} and"
                f" {len(other)} that differ; measure both with the same configuration and data"
            )


def from_table(table: pa.Table, target: str, probe: bool = False) -> Predictions:
    """The predictions of one target from `Scores.table`, or from the Parquet file that is kept of it.

    Args:
        table: with a row per unit, or, where it has the column `seed`, per unit and seed of the head.
        target: the column of the labels.
        probe: the probe's predictions, the same in the rows of every seed, and not the head's; for ridge on classes
            they are scores.

    Raises:
        DataError: the table has no such target, no probe of it, or not the same units for each seed.
    """
    stem = f"{target}{PROBE}" if probe else target
    names = [f"{target}_target", f"{stem}_prediction", f"{target}_mask"]
    missing = [name for name in ("row", *names) if name not in table.column_names]
    if missing:
        raise DataError(
            f"a table of predictions of '{target}' must have the columns {', '.join(missing)}; found"
            f" {', '.join(table.column_names)}"
        )
    labelled = table.filter(pc.fill_null(table[names[2]], False))
    first, *others = [_of_seed(one, target, stem) for one in _by_seed(labelled)[: 1 if probe else None]]
    for other in others:
        first.check_same_labels(other)
    return replace(first, further=tuple(other.predicted for other in others))


def first_seed(table: pa.Table) -> pa.Table:
    """The rows of the first head in a table of predictions; all where no seed is told apart."""
    return _by_seed(table)[0]


def _by_seed(table: pa.Table) -> list[pa.Table]:
    """The rows of each seed, in the order in which the seeds come; all rows where there is no such column."""
    seeds = pc.unique(table["seed"]).to_pylist() if "seed" in table.column_names else []
    return [table.filter(pc.equal(table["seed"], seed)) for seed in seeds] if len(seeds) > 1 else [table]


def _of_seed(labelled: pa.Table, target: str, stem: str) -> Predictions:
    rows = labelled["row"].cast(pa.string()).to_numpy()
    starts = np.flatnonzero(np.r_[True, rows[1:] != rows[:-1]]) if len(rows) else np.zeros(0, np.int64)
    counts = np.diff(np.r_[starts, len(rows)]).astype(np.int64)
    of_sequence = tuple(str(row) for row in rows[starts])
    true = labelled[f"{target}_target"].combine_chunks()
    if f"{stem}_probabilities" not in labelled.column_names:
        predicted = labelled[f"{stem}_prediction"].to_numpy().astype(np.float64)
        return Predictions(true.to_numpy(zero_copy_only=False).astype(np.float64), predicted, counts, None, of_sequence)
    probabilities = labelled[f"{stem}_probabilities"].combine_chunks()
    width = probabilities.type.list_size
    predicted = probabilities.flatten().to_numpy(zero_copy_only=False).astype(np.float64).reshape(-1, width)
    indices = true.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    return Predictions(indices, predicted, counts, _learnt(true.dictionary.to_pylist(), indices), of_sequence)


def _learnt(names: list[str], indices: npt.NDArray[np.int64]) -> list[str]:
    """The classes without outputs behind them that no label uses; `pipeline.score` calls them `class 3` and so on."""
    used = int(indices.max(initial=-1)) + 1
    while len(names) > used and names[-1] == f"class {len(names) - 1}":
        names = names[:-1]
    return names
