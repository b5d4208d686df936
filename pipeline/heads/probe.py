"""The probe: a head in closed form, beside the trained one, without a seed.

Ridge regression on standardised embeddings, in float64; for classes on one-hot targets. One penalty of `PENALTIES` for
all outputs of a target: the one with the least squared error on labels left out, one at a time in sequence-level tasks,
in five folds of sequences in token-level ones. Embeddings are read in chunks, and added up in their order, so that the
result has the same bits whether they are in memory or on disk, and memory does not grow with their number. All of it is
computed on the CPU, in one thread: the bits depend neither on the device nor on how many threads there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController

from pipeline.config.task import Task
from pipeline.data.parts import Part, Target
from pipeline.embed import Embeddings
from pipeline.heads import ridge
from pipeline.heads.logistic import fit_logistic, softmax
from pipeline.store.embedding_table import sequence_key
from pipeline.store.reading import Rows

CHUNK = 4_096  # units that are read at a time
FOLDS = 5
MOST_FEATURES = 4_096  # of a window: the Gram matrices of the folds are then 0.7 GB
RESOLUTION = 1e-6  # a column that deviates less, relative to its mean, is constant but for the rounding of float32
Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Features:
    """How embeddings become the features of a probe.

    Attributes:
        columns: those that vary in the train part, shape (columns,).
        mean: of each over all units of the train part.
        deviation: likewise.
        window: positions around a token whose embeddings are its features, one after another; 0 beyond the ends.
    """

    columns: Indices
    mean: Array
    deviation: Array
    window: int

    @property
    def count(self) -> int:
        """How many features a unit has."""
        return len(self.columns) * self.window

    def chunks(self, rows: Rows, part: Part) -> Iterator[tuple[slice, Array]]:
        """Units of a part, and their features, shape (units, features)."""
        for units, sequences in _chunks(part.counts):
            found = rows.gather(sequences).numpy()
            values = (found if len(self.columns) == found.shape[1] else found[:, self.columns]).astype(np.float64)
            values -= self.mean  # in place: these are the largest arrays
            values /= self.deviation
            yield units, _windows(values, part.counts[sequences], self.window)


@dataclass(frozen=True)
class Probe:
    """A fitted probe.

    Attributes:
        features: what it looks at.
        coefficients: per target, shape (features + 1, outputs); the last row is the intercept.
        penalties: of each target, by its name, the chosen one; None where there was nothing to choose.
        logistic: whether its outputs are probabilities; else they are numbers, or scores of which the highest counts.
        notes: warnings for whoever reads the result.
    """

    features: Features
    coefficients: list[Array]
    penalties: dict[str, float | None]
    logistic: bool
    notes: tuple[str, ...] = ()

    def predict(self, rows: Rows, part: Part) -> list[Array]:
        """For each target, the outputs on a part with these embeddings, shape (units, outputs)."""
        outputs = [np.empty((int(part.counts.sum()), target.shape[1])) for target in self.coefficients]
        with _one_thread():
            for units, features in self.features.chunks(rows, part):
                for output, target in zip(outputs, self.coefficients, strict=True):
                    output[units] = features @ target[:-1] + target[-1]
        return [softmax(output) for output in outputs] if self.logistic else outputs


def fit_probe(embeddings: Embeddings) -> Probe:
    """Fits the probe that the task asks for to the train part.

    Class weights do not count: the outputs of a weighted fit would no longer be what the squared errors choose by.
    """
    examples, rows, notes = embeddings.examples, embeddings.rows("train"), list[str]()
    task, part, targets = examples.task, examples.train, examples.targets
    window = _window(task, embeddings.table.hidden_size, notes)
    with _one_thread():
        features = standardise(rows, part, window)
        if task.probe == "logistic":
            coefficients, penalties = _fit_logistic(features, rows, part, targets)
        else:
            coefficients, penalties = _fit_ridge(features, rows, part, targets, task.level)
    if features.count == 0:
        notes.append("probe: the embeddings of the train part are all equal, so it guesses one value")
    if any(target.weights for target in targets):
        notes.append("probe: class_weights count for the head alone")
    chosen = {target.name: penalty for target, penalty in zip(targets, penalties, strict=True)}
    unknown = [name for name, penalty in chosen.items() if penalty is None]
    notes += [f"probe: {name} has too few train labels to choose a penalty: the largest is taken" for name in unknown]
    return Probe(features, coefficients, chosen, task.probe == "logistic", tuple(notes))


def _one_thread() -> AbstractContextManager[object]:
    """Within, matrix products run in one thread: with more, their last bits depend on how many."""
    limited: AbstractContextManager[object] = _libraries().limit(limits=1, user_api="blas")
    return limited


@cache
def _libraries() -> ThreadpoolController:
    """The libraries of matrix products; to look for them takes as long as a small fit."""
    import scipy.linalg  # noqa: F401  (has one of its own, which must be loaded by now)

    return ThreadpoolController()


def standardise(rows: Rows, part: Part, window: int = 1) -> Features:
    """The mean and deviation of each embedding column over all units of a part, masked ones too.

    Sums are of differences to the first row: a column of equal values has a deviation of exactly 0.
    """
    first, total, squares = None, np.zeros(0), np.zeros(0)
    for _, sequences in _chunks(part.counts):
        values = rows.gather(sequences).numpy().astype(np.float64)
        if first is None:
            first = values[0].copy()
            total, squares = np.zeros_like(first), np.zeros_like(first)
        values -= first
        total += values.sum(0)
        squares += np.einsum("ij,ij->j", values, values)
    assert first is not None
    shift = total / part.counts.sum()
    mean, deviation = first + shift, np.sqrt(np.maximum(squares / part.counts.sum() - shift**2, 0))
    columns = np.flatnonzero(deviation > RESOLUTION * np.abs(mean))
    return Features(columns, mean[columns], deviation[columns], window)


def folds_of(part: Part) -> Indices:
    """The fold of each sequence, shape (n,): its rank among the distinct ones by digest, modulo 5.

    Equal sequences are in one fold, and the order of the rows does not matter.
    """
    keys = np.array([sequence_key(text).hex() for text in part.sequences])
    rank: Indices = np.unique(keys, return_inverse=True)[1].reshape(-1) % FOLDS
    return rank


def _window(task: Task, hidden_size: int, notes: list[str]) -> int:
    """The window that fits; says where it is not the one asked for."""
    features = task.probe_window * hidden_size
    if task.probe_window == 1 or features <= MOST_FEATURES:
        return task.probe_window
    over = f"{features} features, more than {MOST_FEATURES}"
    notes.append(f"probe: probe_window {task.probe_window} of {hidden_size} columns would be {over}; it takes 1")
    return 1


def _chunks(counts: Indices) -> Iterator[tuple[slice, Indices]]:
    """Slices of units and the sequences that they are of: whole ones, in order, that begin in the same `CHUNK` units.

    It depends on `counts` alone.
    """
    ends = np.cumsum(counts)
    number = (ends - counts) // CHUNK
    for sequences in np.split(np.arange(len(counts)), np.flatnonzero(np.diff(number)) + 1):
        yield slice(int(ends[sequences[0]] - counts[sequences[0]]), int(ends[sequences[-1]])), sequences


def _windows(values: Array, counts: Indices, window: int) -> Array:
    """Rows of some sequences, shape (units, columns), to those around each, shape (units, window * columns)."""
    if window == 1:
        return values
    index, length = np.arange(len(values)), np.repeat(counts, counts)
    position = index - np.repeat(np.cumsum(counts) - counts, counts)
    found = np.zeros((len(values), window, values.shape[1]))
    for place, offset in enumerate(range(-(window // 2), window // 2 + 1)):
        inside = (position + offset >= 0) & (position + offset < length)
        found[inside, place] = values[index[inside] + offset]
    return found.reshape(len(values), -1)


def _fit_ridge(
    features: Features, rows: Rows, part: Part, targets: Sequence[Target], level: str
) -> tuple[list[Array], list[float | None]]:
    """Coefficients and penalty of each target; targets with the same mask share their Gram matrices."""
    coefficients = [np.zeros(0)] * len(targets)
    penalties: list[float | None] = [None] * len(targets)
    left = list(range(len(targets)))
    while left:
        mask = part.masks[left[0]]
        same = [index for index in left if np.array_equal(part.masks[index], mask)]
        left = [index for index in left if index not in same]
        labels = _Labels(part, targets, same)
        data = _Data(features, rows, part, labels, mask)
        choice = ridge.by_folds(data, data.folds()) if level == "token" else ridge.by_leaving_one_out(data)
        for index, columns in zip(same, labels.columns, strict=True):
            penalties[index] = ridge.least(choice.errors[:, columns])
            found = choice.solve(penalties[index] or ridge.PENALTIES[-1])[:, columns]
            found[-1] += labels.offsets[columns]
            coefficients[index] = found
    return coefficients, penalties


def _fit_logistic(
    features: Features, rows: Rows, part: Part, targets: Sequence[Target]
) -> tuple[list[Array], list[float | None]]:
    """Coefficients and penalty of each target, by folds at either level; all features are in memory at once."""
    everything = np.concatenate([values for _, values in features.chunks(rows, part)])
    folds = np.repeat(folds_of(part), part.counts)
    found = [
        fit_logistic(everything[mask], values[mask].astype(np.int64), folds[mask], target.outputs)
        for target, values, mask in zip(targets, part.values, part.masks, strict=True)
    ]
    return [coefficients for coefficients, _ in found], [penalty for _, penalty in found]


class _Labels:
    """The labels of some targets as numbers.

    Attributes:
        columns: of each target, its outputs among those of all, as a slice.
        offsets: what is subtracted from each output, so that large numbers do not cost digits, shape (outputs,).
    """

    def __init__(self, part: Part, targets: Sequence[Target], chosen: Sequence[int]) -> None:
        self._values = [part.values[index] for index in chosen]
        self._targets = [targets[index] for index in chosen]
        ends = np.cumsum([target.outputs for target in self._targets]).tolist()
        self.columns = [slice(end - one.outputs, end) for end, one in zip(ends, self._targets, strict=True)]
        self.offsets = np.zeros(ends[-1])
        for target, index, columns in zip(self._targets, chosen, self.columns, strict=True):
            if target.classes is None:
                self.offsets[columns] = part.values[index][part.masks[index]].mean()

    def of(self, units: Indices) -> Array:
        """The labels of some unmasked units, one-hot for classes, shape (units, outputs)."""
        blocks = [
            values[units, None] if target.classes is None else values[units, None] == np.arange(target.outputs)
            for values, target in zip(self._values, self._targets, strict=True)
        ]
        return np.concatenate(blocks, 1, dtype=np.float64) - self.offsets


class _Data:
    """Features and labels of the unmasked units, in chunks; see `ridge.Data`."""

    def __init__(
        self, features: Features, rows: Rows, part: Part, labels: _Labels, mask: npt.NDArray[np.bool_]
    ) -> None:
        self._features, self._rows, self._part, self._labels, self._mask = features, rows, part, labels, mask
        self.features, self.outputs, self.count = features.count, len(labels.offsets), int(mask.sum())

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        for units, values in self._features.chunks(self._rows, self._part):
            inside = self._mask[units]
            found = np.flatnonzero(inside)
            yield values if inside.all() else values[found], self._labels.of(found + units.start)

    def folds(self) -> list[Indices]:
        """The fold of each unit, chunk by chunk."""
        of_unit = np.repeat(folds_of(self._part), self._part.counts)
        return [of_unit[units][self._mask[units]] for units, _ in _chunks(self._part.counts)]
