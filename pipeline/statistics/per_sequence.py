"""Metrics of each test sequence alone, in token-level tasks: how a head does within a sequence."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.statistics.metrics import PER_SEQUENCE, TargetMetrics
from pipeline.statistics.predictions import Floats, Predictions


def per_sequence(predictions: Predictions) -> Floats:
    """Accuracy of each sequence, or Spearman's rho, which is 0 where the predictions are all equal.

    Returns:
        Shape (sequences,); NaN for those that are not `counted`.
    """
    if predictions.classes is None:
        found = _spearman(predictions)
    else:
        right = predictions.predicted.argmax(1) == predictions.true
        found = predictions.by_sequence(right.astype(np.float64)) / predictions.counts
    return np.asarray(np.where(counted(predictions), found, np.nan))


def counted(predictions: Predictions) -> npt.NDArray[np.bool_]:
    """Which sequences have two labelled units or more; numbers that differ. Labels alone decide, not the head."""
    if predictions.classes is not None:
        return predictions.counts > 1
    first = np.repeat(np.cumsum(predictions.counts) - predictions.counts, predictions.counts)
    return predictions.by_sequence((predictions.true != predictions.true[first]).astype(np.float64)) > 0


def per_sequence_mean(predictions: Predictions) -> TargetMetrics:
    """The mean over the sequences, under its name in `PER_SEQUENCE`."""
    name, each = metric_of(predictions), per_sequence(predictions)
    if np.isnan(each).all():
        differ = "" if predictions.classes is not None else " that differ"
        return TargetMetrics({}, {name: f"no test sequence has two labels{differ}"})
    return TargetMetrics({name: float(np.nanmean(each))})


def metric_of(predictions: Predictions) -> str:
    """The name of the metric."""
    return PER_SEQUENCE["regression" if predictions.classes is None else "classification"]


def _spearman(predictions: Predictions) -> Floats:
    """The correlation of the midranks within each sequence."""
    u, v = (
        _centred_ranks(np.asarray(one, np.float64), predictions) for one in (predictions.predicted, predictions.true)
    )
    uu, vv, uv = predictions.by_sequence(np.stack([u * u, v * v, u * v], 1)).T
    with np.errstate(all="ignore"):
        return np.where(uu > 0, uv / np.sqrt(uu * vv), 0.0)


def _centred_ranks(values: Floats, predictions: Predictions) -> Floats:
    """Each unit's midrank within its sequence, less the mean of the sequence's."""
    counts = predictions.counts
    owner = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((values, owner))
    new = np.r_[True, np.diff(owner[order]) != 0] | np.r_[True, np.diff(values[order]) != 0]
    first = np.flatnonzero(new)
    last = np.r_[first[1:], len(values)] - 1
    ranks = np.empty(len(values))
    ranks[order] = ((first + last) / 2)[np.cumsum(new) - 1]
    middle = np.cumsum(counts) - counts + (counts - 1) / 2
    return np.asarray(ranks - middle[owner])
