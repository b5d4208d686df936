"""Metrics of predicted numbers, over the whole test set."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.statistics.metrics import TargetMetrics


def regression(true: npt.NDArray[np.float64], predicted: npt.NDArray[np.float64]) -> TargetMetrics:
    """MSE, RMSE, MAE, R2, Pearson's r and Spearman's rho of arrays of shape (n,)."""
    from scipy.stats import pearsonr, spearmanr

    error = predicted - true
    mse = float(np.mean(error**2))
    found = TargetMetrics({"mse": mse, "rmse": mse**0.5, "mae": float(np.mean(np.abs(error)))})
    if len(true) < 2 or np.ptp(true) == 0:
        reason = "the test values are all equal"
        found.omitted = {"r2": reason, "pearson": reason, "spearman": reason}
        return found
    found.values["r2"] = float(1 - np.sum(error**2) / np.sum((true - true.mean()) ** 2))
    if np.ptp(predicted) <= 1e-12 * max(1.0, float(np.abs(predicted).max())):
        found.omitted = dict.fromkeys(("pearson", "spearman"), "the predictions are all equal")
        return found
    found.values["pearson"] = float(pearsonr(true, predicted).statistic)
    found.values["spearman"] = float(spearmanr(true, predicted).statistic)
    return found
