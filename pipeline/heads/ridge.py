"""Ridge regression in closed form: solutions for every penalty, and their exact errors on labels left out.

With X and Y less their means, the coefficients are W = (XᵀX + aI)⁻¹ XᵀY, and the intercept, which is not penalised,
makes the means agree (Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, 3.4.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt

# What is added to the diagonal of XᵀX, where a standardised column has the number of units on it.
PENALTIES = tuple(10.0 ** (half / 2) for half in range(-2, 13))  # 0.1 to 1,000,000
Array = npt.NDArray[np.float64]


class Data(Protocol):
    """Features and labels, in chunks that are the same at each reading: (units, features) and (units, outputs)."""

    @property
    def features(self) -> int:
        """How many there are."""
        ...

    @property
    def outputs(self) -> int:
        """How many there are."""
        ...

    @property
    def count(self) -> int:
        """The units of all chunks."""
        ...

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        """The chunks in order."""
        ...


@dataclass(frozen=True)
class Choice:
    """The solutions for every penalty.

    Attributes:
        errors: for each of `PENALTIES` and each output, the sum of squared errors on labels left out, shape
            (penalties, outputs); NaN where none could be left out.
        solve: gives the coefficients for a penalty, shape (features + 1, outputs), the intercept last.
    """

    errors: Array
    solve: Callable[[float], Array]


def least(errors: Array) -> float | None:
    """The penalty with the least error over all outputs; of equals the smallest; None where there is no error."""
    total = errors.sum(1)
    return None if np.isnan(total).any() else PENALTIES[int(total.argmin())]


def by_leaving_one_out(data: Data) -> Choice:
    """Errors on each unit of a fit to all others.

    The fit is not repeated: e_i / (1 - h_i), the residual over one less the leverage, is the error of a fit without
    unit i, the intercept's included (Elements of Statistical Learning, equation 7.64; exact for ridge regression).
    """
    if data.count == 1:
        return by_folds(data, None)
    return _from_units(data) if data.count <= data.features else _from_columns(data)


def _from_columns(data: Data) -> Choice:
    """More units than features: eigenvectors of XᵀX, shape (features, features); the units are read twice."""
    moments = _moments(data, [None], 1)[0]
    width, mean = data.features, moments[data.features] / data.count
    centred = _centred(moments, width)
    values, vectors = np.linalg.eigh(centred[:width, :width])
    values = np.maximum(values, 0)  # the others are 0 but for rounding
    projected = vectors.T @ centred[:width, width + 1 :]
    inverses = 1 / (values[:, None] + np.array(PENALTIES))
    slopes = (projected[:, None, :] * inverses[:, :, None]).reshape(width, len(PENALTIES) * data.outputs)
    errors = np.zeros((len(PENALTIES), data.outputs))
    for features, labels in data:
        on_vectors = (features - mean[:width]) @ vectors
        leverage = 1 / data.count + on_vectors**2 @ inverses
        fitted = (on_vectors @ slopes).reshape(len(features), len(PENALTIES), data.outputs)
        residuals = (labels - mean[width + 1 :])[:, None, :] - fitted
        errors += ((residuals / (1 - leverage)[:, :, None]) ** 2).sum(0)

    def solve(penalty: float) -> Array:
        return _with_intercept(vectors @ (projected / (values[:, None] + penalty)), mean, width)

    return Choice(errors, solve)


def _from_units(data: Data) -> Choice:
    """At least as many features as units: eigenvectors of K = XXᵀ, shape (units, units), which takes no more memory.

    With C = (K + aI)⁻¹, e_i / (1 - h_i) = (CY)_i / C_ii. The vector of ones, along which centred labels do not lie,
    belongs to the intercept: it is given an eigenvalue above all others, and left out.
    """
    chunks = list(data)
    features, labels = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
    mean = np.concatenate([features.mean(0), [1.0], labels.mean(0)])
    features -= mean[: data.features]
    labels -= mean[data.features + 1 :]
    gram = features @ features.T
    gram += 2 * np.trace(gram) / len(gram) + 1
    values, vectors = np.linalg.eigh(gram)
    values, vectors = np.maximum(values[:-1], 0), vectors[:, :-1]
    projected = vectors.T @ labels
    errors = []
    for penalty in PENALTIES:
        inverse = 1 / (values + penalty)
        dual = vectors @ (projected * inverse[:, None])
        errors.append(((dual / (vectors**2 @ inverse)[:, None]) ** 2).sum(0))

    def solve(penalty: float) -> Array:
        dual = vectors @ (projected / (values[:, None] + penalty))
        return _with_intercept(features.T @ dual, mean, data.features)

    return Choice(np.array(errors), solve)


def by_folds(data: Data, folds: Sequence[npt.NDArray[np.int64]] | None) -> Choice:
    """Errors on each unit of a fit to all folds but its own.

    A fit needs no more than the sums of products of features, a one and labels; those without a fold are the sums over
    all less the fold's, and the fold's give its squared error too. Memory is that of one such matrix for each fold.

    Args:
        data: the units.
        folds: for each chunk the fold of its units, counted from 0; None where nothing can be left out.
    """
    from scipy.linalg import cho_factor, cho_solve

    number = 1 + max((int(fold.max()) for fold in folds or [] if len(fold)), default=0)
    moments = _moments(data, folds or [None], number)
    total, width = moments.sum(0), data.features

    def solve_from(matrix: Array) -> Callable[[float], Array]:
        centred, mean = _centred(matrix, width), matrix[width] / matrix[width, width]

        def solve(penalty: float) -> Array:
            slopes = centred[:width, width + 1 :]
            if width:
                gram = centred[:width, :width].copy()
                gram.flat[:: width + 1] += penalty
                factor = cho_factor(gram, overwrite_a=True, check_finite=False)
                slopes = cho_solve(factor, slopes, check_finite=False)
            return _with_intercept(slopes, mean, width)

        return solve

    errors = np.zeros((len(PENALTIES), data.outputs))
    left_out = 0
    for fold in moments:
        units = fold[width, width]
        if not 0 < units < total[width, width]:
            continue
        left_out += 1
        solve = solve_from(total - fold)
        for place, penalty in enumerate(PENALTIES):
            contrast = np.concatenate([solve(penalty), -np.eye(data.outputs)])
            errors[place] += np.einsum("ij,ij->j", contrast, fold @ contrast)
    return Choice(errors if left_out else np.full_like(errors, np.nan), solve_from(total))


def _moments(data: Data, folds: Sequence[npt.NDArray[np.int64] | None], number: int) -> Array:
    """Sums of products of features, a one and labels, for each fold, shape (folds, k, k), k = features + 1 + outputs.

    `folds` has an entry for each chunk, or [None] where all units are in one fold.
    """
    size = data.features + 1 + data.outputs
    found = np.zeros((number, size, size))
    for place, (features, labels) in enumerate(data):
        of_unit = folds[place] if folds[0] is not None else None
        order = slice(None) if of_unit is None else np.argsort(of_unit, kind="stable")
        joined = np.empty((len(features), size))
        joined[:, : data.features] = features[order]
        joined[:, data.features] = 1
        joined[:, data.features + 1 :] = labels[order]
        ends = [len(features)] if of_unit is None else np.cumsum(np.bincount(of_unit, minlength=number)).tolist()
        for fold, (begin, end) in enumerate(pairwise([0, *ends])):
            some = joined[begin:end]
            found[fold] += some.T @ some
    return found


def _centred(moments: Array, width: int) -> Array:
    """Sums of products of differences to the means."""
    sums = moments[width]
    centred: Array = moments - np.outer(sums, sums) / sums[width]
    return centred


def _with_intercept(slopes: Array, mean: Array, width: int) -> Array:
    """Coefficients with the intercept below; `mean` is of features, a one and labels."""
    return np.concatenate([slopes, (mean[width + 1 :] - mean[:width] @ slopes)[None]])
