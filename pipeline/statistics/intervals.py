"""95 % intervals of metrics, and of differences between two checkpoints on the same test sequences.

An interval says how far a metric of this fitted head may lie from what the head would reach on all sequences that the
test set is drawn from. What varies is which *sequences* are in the test set: tokens of one sequence resemble each
other. Everything comes from the metric with each sequence left out (`jackknife.py`), so nothing is random: the same
predictions give the same interval in a training, in a replay and in `compare`, in the order of any file.

The kind of interval belongs to the metric; `benchmarks/coverage.py` says how often each holds the truth. Studentised
bootstraps of 1,000 resamples were tried: they cover no better, and take thirty times as long.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
from scipy.special import stdtr, stdtrit

from pipeline.errors import few_of
from pipeline.statistics.jackknife import Jackknife, jackknife
from pipeline.statistics.metrics import EVERY, LOWER_IS_BETTER, PER_SEQUENCE, Change, Interval
from pipeline.statistics.per_sequence import counted
from pipeline.statistics.predictions import Floats, Predictions

MIN_SEQUENCES = 50
MIN_OF_CLASS = 10  # test sequences that have a label, for metrics in which each class counts alike
BY_CLASS = ("balanced_accuracy", "macro_f1", "mcc", "auroc", "average_precision")
ALONE = 0.9  # the share of a metric's variance that is too much for one sequence
UPPER = 0.975
SAME = 1e-9  # a metric that differs by less of its size does so by rounding


T = TypeVar("T")


@dataclass
class ByMetric(Generic[T]):
    """What is known of one target's metrics.

    Attributes:
        values: by metric.
        refused: for each other metric that has a value, why there is no interval.
    """

    values: dict[str, T] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


Intervals = ByMetric[Interval]
Changes = ByMetric[Change]  # how far two checkpoints differ


def intervals(predictions: Predictions) -> Intervals:
    """The 95 % interval of every metric."""
    found = Intervals()
    reasons = _reasons(predictions)
    measured = jackknife(predictions)
    for name, value in measured.values.items():
        if not np.isfinite(value):
            continue
        interval = None if name in reasons else _interval(name, value, measured.without[name])
        if interval is None:
            found.refused[name] = (
                reasons.get(name) or f"{_unsound(measured.without[name], abs(value))}, so without an interval"
            )
        else:
            found.values[name] = interval
    return found


def changes(now: Predictions, before: Predictions, *, only: str | None = None) -> Changes:
    """What each metric, or one, has changed by since another checkpoint, with the paired 95 % interval.

    Raises:
        DataError: the two were not measured on the same sequences and labels.
    """
    now.check_same_labels(before)
    found, reasons = Changes(), _reasons(now)
    first, second = jackknife(now, only), jackknife(before, only)
    same = len(now.seeds) == len(before.seeds) and all(
        np.array_equal(one.predicted, other.predicted) for one, other in zip(now.seeds, before.seeds, strict=True)
    )
    for name, value in first.values.items():
        if not np.isfinite(value - second.values[name]):
            continue
        change = None if name in reasons else _change(name, first, second, float(now.counts.mean()), same)
        if change is None:
            differences, size = first.without[name] - second.without[name], max(abs(value), abs(second.values[name]))
            found.refused[name] = reasons.get(name) or f"the difference is {_unsound(differences, size)}"
        else:
            found.values[name] = change
    return found


def _reasons(predictions: Predictions) -> dict[str, str]:
    """By metric, why it can have no interval on these test sequences."""
    if len(predictions) < MIN_SEQUENCES:
        few = f"an interval takes at least {MIN_SEQUENCES} test sequences with labels, and there are {len(predictions)}"
        return dict.fromkeys(EVERY, few)
    found, several = dict[str, str](), int(counted(predictions).sum())
    if several < MIN_SEQUENCES:
        differ = " that differ" if predictions.classes is None else ""
        few = f"an interval takes at least {MIN_SEQUENCES} test sequences with two labels{differ}"
        found = dict.fromkeys(PER_SEQUENCE.values(), f"{few}, and there are {several}")
    if predictions.classes is None:
        return found
    of_class = predictions.by_sequence(predictions.true[:, None] == np.arange(len(predictions.classes)))
    sequences = (of_class > 0).sum(0)
    rare = [f"{name} in {n}" for name, n in zip(predictions.classes, sequences, strict=True) if n < MIN_OF_CLASS]
    reason = f"an interval takes at least {MIN_OF_CLASS} test sequences of each class, and {few_of(rare)}"
    return found | (dict.fromkeys(BY_CLASS, reason) if rare else {})


def _unsound(without: Floats, size: float) -> str:
    """Why there is no interval, in the same words for every metric, so that those with one cause stand in one line.

    `size` is that of the metric, whose last digits differ.
    """
    same = np.allclose(without, without[0], rtol=0, atol=SAME * size)
    return "the same whichever test sequence is left out" if same else "decided by one test sequence"


def _influence(value: float, without: Floats) -> Floats:
    """What each sequence adds to a metric: the jackknife's pseudo-values less the metric, shape (n,)."""
    return (len(without) - 1) * (value - without)


def _error(influence: Floats) -> float:
    """The standard error of a metric."""
    return float(influence.std(ddof=1) / len(influence) ** 0.5)


def _sound_error(influence: Floats) -> float | None:
    """The same; None where nothing varies, a sequence left out leaves nothing, or one decides alone."""
    squares = (influence - influence.mean()) ** 2
    sound = 0 < squares.sum() < np.inf and squares.max() < ALONE * squares.sum()
    return _error(influence) if sound else None


def _interval(name: str, value: float, without: Floats) -> Interval | None:
    if name == "accuracy":
        return _wilson(value, without)
    if name == "rmse":
        squares = _hall(value**2, without**2)
        return squares and Interval(max(squares.low, 0) ** 0.5, squares.high**0.5)
    if name in ("mse", "mae"):
        return _hall(value, without)
    return _transformed(value, without, *SCALES[name])


def _wilson(value: float, without: Floats) -> Interval:
    """Wilson's interval of a proportion, with as many independent draws as its standard error is worth.

    With tokens that is fewer than there are tokens (Korn and Graubard 1998; Dean and Pagano 2015). Where all is right,
    or nothing, each sequence counts as one draw.
    """
    error, n = _error(_influence(value, without)), len(without)
    draws = value * (1 - value) / error**2 if error > 0 else n
    z = stdtrit(n - 1, UPPER)
    middle = (value + z**2 / (2 * draws)) / (1 + z**2 / draws)
    half = z / (1 + z**2 / draws) * (value * (1 - value) / draws + z**2 / (4 * draws**2)) ** 0.5
    return Interval(float(max(middle - half, 0)), float(min(middle + half, 1)))


def _hall(value: float, without: Floats) -> Interval | None:
    """A t interval of a mean, corrected for the skewness of what the mean is of (Hall 1992, transformation g_2)."""
    influence = _influence(value, without)
    error, n = _sound_error(influence), len(influence)
    if error is None:
        return None
    centred = influence - influence.mean()
    skewness = float(np.mean(centred**3) / np.mean(centred**2) ** 1.5) / n**0.5
    t = stdtrit(n - 1, np.array([UPPER, 1 - UPPER]))
    if abs(skewness) > 1e-9:
        t = 3 / skewness * (np.cbrt(1 + skewness * (t - skewness / 6)) - 1)
    low, high = value - t * error
    return Interval(float(max(low, 0)), float(high))


def _transformed(
    value: float, without: Floats, there: Callable[[Floats], Floats], back: Callable[[Floats], Floats]
) -> Interval | None:
    """A t interval on a scale on which the metric is nearly normal, such as Fisher's of a correlation."""
    with np.errstate(all="ignore"):
        scaled, others = there(np.array(value)), there(without)
        error = _sound_error(_influence(float(scaled), others))
    if error is None:
        return None
    ends = back(scaled + np.array([-1, 1]) * stdtrit(len(without) - 1, UPPER) * error)
    return Interval(float(ends.min()), float(ends.max()))


def _change(name: str, now: Jackknife, before: Jackknife, units: float, same: bool) -> Change | None:
    """A paired t interval. `units` is the mean number in a sequence, `same` that the predictions are the same."""
    difference = now.values[name] - before.values[name]
    if same:
        return Change(0.0, Interval(0.0, 0.0), 0.5)
    influence = _influence(difference, now.without[name] - before.without[name])
    n, error = len(influence), _error(influence) if name == "accuracy" else _sound_error(influence)
    if name == "accuracy" and not influence.any():
        # Right and wrong on the same units, which does not mean everywhere. Bonett and Price (2012) add two sequences
        # to the test set: in each, one unit is right in one of the two alone.
        error = 2**0.5 / units / (n + 2)
    if error is None:
        return None
    half = float(stdtrit(n - 1, UPPER)) * error
    better = -difference if name in LOWER_IS_BETTER else difference
    return Change(difference, Interval(difference - half, difference + half), float(stdtr(n - 1, better / error)))


def _logit(share: Floats) -> Floats:
    return np.log(share) - np.log1p(-share)


def _expit(value: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-value)))


def _as_it_is(value: Floats) -> Floats:
    return np.asarray(value)


def _share(value: Floats) -> Floats:
    return np.clip(value, 0, 1)


def _correlation(value: Floats) -> Floats:
    return np.clip(value, -1, 1)


def _log_unexplained(r2: Floats) -> Floats:
    return np.log1p(-r2)


def _explained(value: Floats) -> Floats:
    return -np.expm1(value)


SCALES: dict[str, tuple[Callable[[Floats], Floats], Callable[[Floats], Floats]]] = {
    "balanced_accuracy": (_logit, _expit),
    "macro_f1": (_logit, _expit),
    "auroc": (_logit, _expit),
    "average_precision": (_logit, _expit),
    "per_sequence_accuracy": (_as_it_is, _share),
    "per_sequence_spearman": (_as_it_is, _correlation),
    "mcc": (np.arctanh, np.tanh),
    "pearson": (np.arctanh, np.tanh),
    "spearman": (np.arctanh, np.tanh),
    "r2": (_log_unexplained, _explained),
}
