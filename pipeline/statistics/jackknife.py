"""Every metric of one target, on all test sequences and with each of them left out in turn.

What an interval needs to know is how a metric varies from one draw of test sequences to another. The jackknife (Efron
and Stein 1981) reads that from the metric without sequence 1, without sequence 2, and so on: sums over the test set
minus those of one sequence, for all sequences and metrics at once. Ranks change a little with each sequence that is
left out; how much follows from sums too, as described at `_spearman`, `_auroc` and `_average_precision_of`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from pipeline.statistics.per_sequence import metric_of, per_sequence
from pipeline.statistics.predictions import Floats, Predictions


@dataclass(frozen=True)
class Jackknife:
    """Metrics by name, those that are defined.

    Attributes:
        values: on all sequences.
        without: with each sequence left out, shape (sequences,) each.
    """

    values: dict[str, float]
    without: dict[str, Floats]


def jackknife(predictions: Predictions, only: str | None = None) -> Jackknife:
    """Computes every metric, or one, on all sequences and without each. What is not defined is NaN or infinite.

    Of several head seeds it is the mean of their metrics: without a sequence, the mean of theirs without it.
    """
    each = [_metrics(one, only) for one in predictions.seeds]
    found = {name: np.mean([one[name] for one in each], axis=0) for name in each[0]}
    values = {name: float(both[0]) for name, both in found.items()}
    return Jackknife(values, {name: both[1:] for name, both in found.items()})


def _metrics(predictions: Predictions, only: str | None) -> dict[str, Floats]:
    numbers = predictions.classes is None
    sums, of_ranks = (_regression, {"spearman": _spearman}) if numbers else (_classification, OF_RANKS)
    later: dict[str, Callable[[Predictions], Floats]] = dict(of_ranks)
    if predictions.counts.max(initial=0) > 1:
        later[metric_of(predictions)] = _within_sequences
    with np.errstate(all="ignore"):
        found = {} if only in later else sums(predictions)
        found |= {name: compute(predictions) for name, compute in later.items() if only in (None, name)}
    return found if only is None else {name: both for name, both in found.items() if name == only}


def _within_sequences(predictions: Predictions) -> Floats:
    each = per_sequence(predictions)
    count, total = _all_and_without(np.stack([~np.isnan(each), np.nan_to_num(each)], 1))
    return np.asarray(total / count)


def _all_and_without(sums: Floats) -> Floats:
    """Totals of sums by sequence, first of all, then without each: (n, columns) to (columns, n + 1)."""
    total = sums.sum(0)
    return np.vstack([total, total - sums]).T


def _regression(predictions: Predictions) -> dict[str, Floats]:
    true, predicted = np.asarray(predictions.true, np.float64), predictions.predicted
    error = predicted - true
    y, x = true - true.mean(), predicted - predicted.mean()  # centred: differences of sums lose no digits
    columns = [np.ones_like(y), error**2, np.abs(error), y, x, y * y, x * x, x * y]
    n, squares, absolute, *moments = _all_and_without(predictions.by_sequence(np.stack(columns, 1)))
    sy, sx, syy, sxx, sxy = moments
    mse, total = squares / n, syy - sy**2 / n
    return {
        "mse": mse,
        "rmse": np.sqrt(mse),
        "mae": absolute / n,
        "r2": 1 - squares / total,
        "pearson": (sxy - sx * sy / n) / np.sqrt(total * (sxx - sx**2 / n)),
    }


def _spearman(predictions: Predictions) -> Floats:
    """The correlation of midranks u and v, centred and divided by the number of units.

    A unit takes part in a moment E[u v] in three places: its own product, and the ranks of the units above it in either
    order. So the influence of unit i on it is, but for a constant, u_i v_i + E_j[above_x(i, j) v_j] + E_j[above_y(i, j)
    u_j], with above = 1 where j is higher, 1/2 at ties (Croux and Dehon 2010, there without ties). Leaving a sequence
    out takes the influence of its units away.
    """
    size = len(predictions.true)
    u, v = ((rankdata(one) - (size + 1) / 2) / size for one in (predictions.predicted, predictions.true))
    pairs = ((u, u), (v, v), (u, v))
    columns = [a * b + _sum_above(a, b) + _sum_above(b, a) for a, b in pairs]
    moments = np.array([[np.mean(a * b)] for a, b in pairs])
    centred = np.stack(columns, 1) - np.mean(columns, 1)
    taken, counts = predictions.by_sequence(centred).T, predictions.counts
    uu, vv, uv = np.hstack([moments, moments - taken / (size - counts)])
    return np.asarray(uv / np.sqrt(uu * vv))


def _sum_above(ranked: Floats, other: Floats) -> Floats:
    """For each unit, the mean over all units of `other` where `ranked` is higher, half of it where it is equal."""
    _, place = np.unique(ranked, return_inverse=True)
    at = np.bincount(place, other)
    above = at[::-1].cumsum()[::-1] - at / 2
    return np.asarray(above[place] / len(ranked))


def _classification(predictions: Predictions) -> dict[str, Floats]:
    true, probabilities = np.asarray(predictions.true, np.int64), predictions.predicted
    predicted, outputs = probabilities.argmax(1), np.arange(probabilities.shape[1])
    t, p = true[:, None] == outputs, predicted[:, None] == outputs
    used = t.any(0) | p.any(0)
    t, p = t[:, used], p[:, used]
    columns = np.hstack([np.ones((len(true), 1)), t, p, t & p])
    sums = _all_and_without(predictions.by_sequence(columns))
    n, classes = sums[0], int(used.sum())
    st, sp, both = sums[1 : 1 + classes], sums[1 + classes : 1 + 2 * classes], sums[1 + 2 * classes :]
    right, chance = both.sum(0), (st * sp).sum(0)
    spread = (n**2 - (st**2).sum(0)) * (n**2 - (sp**2).sum(0))
    return {
        "accuracy": right / n,
        "balanced_accuracy": (both / np.maximum(st, 1)).sum(0) / (st > 0).sum(0),
        "macro_f1": (2 * both / np.maximum(st + sp, 1)).mean(0),
        "mcc": np.where(spread > 0, (right * n - chance) / np.sqrt(spread), 0.0),  # Gorodkin 2004
    }


def _auroc(predictions: Predictions) -> Floats:
    """Of two classes the second one's, of more the mean of each against the rest.

    It is the share of pairs (unit of the class, other unit) in the right order. Leaving a sequence out takes the pairs
    of its units away, which are sums of placements, counted from ranks (DeLong et al. 1988; Obuchowski 1997 for
    clusters). Pairs within the sequence are taken twice then; they are given back at the share of all pairs.
    """
    classes, true = len(predictions.classes or ()), np.asarray(predictions.true, np.int64)
    every = [
        _auroc_of(predictions, true == index, predictions.predicted[:, index])
        for index in ([1] if classes == 2 else range(classes))
    ]
    return np.asarray(np.mean(every, 0))


def _auroc_of(predictions: Predictions, positive: npt.NDArray[np.bool_], score: Floats) -> Floats:
    n1, n0 = int(positive.sum()), int((~positive).sum())
    ranks = rankdata(score)
    lower = np.empty(len(score))  # for positives: other units below; for others: positives above
    lower[positive] = ranks[positive] - rankdata(score[positive])
    lower[~positive] = n1 - (ranks[~positive] - rankdata(score[~positive]))
    pairs = lower[positive].sum()
    taken, a, b = predictions.by_sequence(np.stack([lower, positive, ~positive], 1)).T
    share = pairs / (n1 * np.float64(n0))
    without = (pairs - taken + share * a * b) / ((n1 - a) * (n0 - b))
    return np.concatenate([[share], without])


def _average_precision(predictions: Predictions) -> Floats:
    """Of two classes the second one's, of more the mean of each that has labels against the rest."""
    true = np.asarray(predictions.true, np.int64)
    present = [1] if len(predictions.classes or ()) == 2 else np.unique(true)
    every = [_average_precision_of(predictions, true == index, predictions.predicted[:, index]) for index in present]
    return np.asarray(np.mean(every, 0))


def _average_precision_of(predictions: Predictions, positive: npt.NDArray[np.bool_], score: Floats) -> Floats:
    """The mean, over the units of the class, of the precision among the units that score as high and higher.

    A unit that is left out takes its own precision away, and changes that of each unit of the class below it: both are
    exact, and sums of cumulative sums. Those of a sequence's units are added up, less what they do to one another.
    """
    _, place = np.unique(score, return_inverse=True)
    above, hits = (_at_or_above(place, one.astype(np.float64)) for one in (np.ones_like(positive), positive))
    precision = positive * hits / above
    # What the precision at a unit of the class loses with another, of the class or not, that scores as high.
    with_hit, with_miss = (positive * (precision - (hits - one) / np.maximum(above - 1, 1)) for one in (1, 0))
    below = [np.bincount(place, loss).cumsum()[place] for loss in (with_hit, with_miss)]
    removed = np.where(positive, precision + below[0] - with_hit, below[1])
    if predictions.counts.max() > 1:
        owner = np.repeat(np.arange(len(predictions)), predictions.counts)
        ours, hit = (_at_or_above(place, one, owner) for one in (np.ones_like(score), positive.astype(np.float64)))
        removed -= (hit - 1) * with_hit + (ours - hit) * with_miss
    taken, a = predictions.by_sequence(np.stack([removed, positive], 1)).T
    total, n1 = precision.sum(), np.float64(positive.sum())
    return np.concatenate([[total / n1], (total - taken) / (n1 - a)])


def _at_or_above(place: npt.NDArray[np.int64], weights: Floats, owner: npt.NDArray[np.int64] | int = 0) -> Floats:
    """For each unit, the sum of the weights of the units of the same owner that are at its place or above."""
    keys, at = np.unique(owner * (place.max() + 1) + place, return_inverse=True)
    summed = np.bincount(at, weights)
    ends = np.searchsorted(keys // (place.max() + 1), keys // (place.max() + 1), side="right") - 1
    cumulated = summed.cumsum()
    return np.asarray((cumulated[ends] - cumulated + summed)[at])


# Metrics of classes that are not sums over the test set: they take most of the time.
OF_RANKS = {"auroc": _auroc, "average_precision": _average_precision}
