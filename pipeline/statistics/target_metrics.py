"""The metrics of one target from its predictions: over all units, and within each sequence."""

from __future__ import annotations

import numpy as np

from pipeline.statistics.classification import classification
from pipeline.statistics.metrics import TargetMetrics
from pipeline.statistics.per_sequence import per_sequence_mean
from pipeline.statistics.predictions import Predictions
from pipeline.statistics.regression import regression


def target_metrics(predictions: Predictions, level: str) -> TargetMetrics:
    """The metrics of a target, as `metrics_of_kind` names them.

    Args:
        predictions: of one head.
        level: `sequence`, or `token`, where metrics within each sequence are among them.
    """
    true, predicted = predictions.true, predictions.predicted
    if predictions.classes is None:
        found = regression(np.asarray(true, np.float64), predicted)
    else:
        found = classification(np.asarray(true, np.int64), predicted, predictions.classes)
    if level == "token":
        each = per_sequence_mean(predictions)
        found.values |= each.values
        found.omitted |= each.omitted
    return found
