"""Metrics of predicted classes, over the whole test set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline.errors import few_of
from pipeline.statistics.metrics import TargetMetrics


def classification(
    true: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float64], classes: Sequence[str]
) -> TargetMetrics:
    """Accuracy, balanced and not, macro F1, Matthews correlation, AUROC, and average precision.

    The last two are of the second of two classes; of more, the mean of each against the rest, average precision that
    of the classes which the labels have.

    Args:
        true: class indices, shape (n,).
        probabilities: shape (n, outputs), outputs being at least the number of classes.
        classes: the labels.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, recall_score

    predicted = probabilities.argmax(1)
    found = TargetMetrics()
    found.values["accuracy"] = float(accuracy_score(true, predicted))
    recall = recall_score(true, predicted, labels=np.unique(true), average="macro")  # of the classes that test has
    found.values["balanced_accuracy"] = float(recall)
    found.values["macro_f1"] = float(f1_score(true, predicted, average="macro", zero_division=0))
    if len(np.unique(true)) < 2:
        found.omitted = dict.fromkeys(("mcc", "auroc", "average_precision"), "the test labels are all of one class")
        return found
    found.values["mcc"] = float(matthews_corrcoef(true, predicted))
    found.values["average_precision"] = _average_precision(true, probabilities, len(classes))
    absent = [name for index, name in enumerate(classes) if not (true == index).any()]
    if absent:
        found.omitted["auroc"] = f"no test label is {few_of(absent)}"
    else:
        found.values["auroc"] = _auroc(true, probabilities, len(classes))
    return found


def _auroc(true: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float64], classes: int) -> float:
    from sklearn.metrics import roc_auc_score

    if classes == 2:
        return float(roc_auc_score(true == 1, probabilities[:, 1]))
    return float(np.mean([roc_auc_score(true == index, probabilities[:, index]) for index in range(classes)]))


def _average_precision(true: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float64], classes: int) -> float:
    from sklearn.metrics import average_precision_score

    present = [1] if classes == 2 else np.unique(true)
    return float(np.mean([average_precision_score(true == index, probabilities[:, index]) for index in present]))
