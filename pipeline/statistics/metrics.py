"""Pure metric functions over the whole test set.

Each gives the metrics that are defined on the data, as fractions 0..1 where they are fractions, and for the others why
they are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

# What the names of metrics end with.
NAMES = tuple(f"_{name}" for name in "accuracy macro_f1 mcc auroc mse rmse mae r2 pearson spearman".split())


@dataclass
class Metrics:
    """`values` by name, and the reasons why others are `omitted`."""

    values: dict[str, float] = field(default_factory=dict)
    omitted: dict[str, str] = field(default_factory=dict)


def classification(
    true: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float64], classes: Sequence[str]
) -> Metrics:
    """Accuracy, macro F1, Matthews correlation and macro one-vs-rest AUROC (binary: of the second class).

    Args:
        true: class indices, shape (n,).
        probabilities: shape (n, outputs), outputs being at least the number of classes.
        classes: the labels.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    predicted = probabilities.argmax(1)
    metrics = Metrics()
    metrics.values["accuracy"] = float(accuracy_score(true, predicted))
    metrics.values["macro_f1"] = float(f1_score(true, predicted, average="macro", zero_division=0))
    if len(np.unique(true)) < 2:
        metrics.omitted["mcc"] = metrics.omitted["auroc"] = "the test labels are all of one class"
        return metrics
    metrics.values["mcc"] = float(matthews_corrcoef(true, predicted))
    absent = [name for index, name in enumerate(classes) if not (true == index).any()]
    if absent:
        metrics.omitted["auroc"] = f"no test label is {', '.join(absent)}"
    else:
        metrics.values["auroc"] = _auroc(true, probabilities, len(classes))
    return metrics


def regression(true: npt.NDArray[np.float64], predicted: npt.NDArray[np.float64]) -> Metrics:
    """MSE, RMSE, MAE, R2, Pearson's r and Spearman's rho of arrays of shape (n,)."""
    from scipy.stats import pearsonr, spearmanr

    error = predicted - true
    mse = float(np.mean(error**2))
    metrics = Metrics({"mse": mse, "rmse": mse**0.5, "mae": float(np.mean(np.abs(error)))})
    if len(true) < 2 or np.ptp(true) == 0:
        reason = "the test values are all equal"
        metrics.omitted = {"r2": reason, "pearson": reason, "spearman": reason}
        return metrics
    metrics.values["r2"] = float(1 - np.sum(error**2) / np.sum((true - true.mean()) ** 2))
    if np.ptp(predicted) <= 1e-12 * max(1.0, float(np.abs(predicted).max())):
        metrics.omitted = dict.fromkeys(("pearson", "spearman"), "the predictions are all equal")
        return metrics
    metrics.values["pearson"] = float(pearsonr(true, predicted).statistic)
    metrics.values["spearman"] = float(spearmanr(true, predicted).statistic)
    return metrics


def _auroc(true: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float64], classes: int) -> float:
    from sklearn.metrics import roc_auc_score

    if classes == 2:
        return float(roc_auc_score(true == 1, probabilities[:, 1]))
    return float(np.mean([roc_auc_score(true == index, probabilities[:, index]) for index in range(classes)]))
