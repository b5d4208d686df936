"""Multinomial logistic regression by scikit-learn, with the penalty of the least cross-entropy on folds left out."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt

# Of the squared coefficients, against the sum of cross-entropies: half of it is added (scikit-learn's 1 / C).
PENALTIES = (0.1, 1.0, 10.0, 100.0, 1_000.0, 10_000.0)
MAX_STEPS = 1_000
LEAST = 1e-15  # no probability is taken to be smaller: a class that a fit has not seen costs the same everywhere
Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


def fit_logistic(features: Array, classes: Indices, folds: Indices, outputs: int) -> tuple[Array, float | None]:
    """Fits by the penalty with the least sum of cross-entropies over folds left out; of equals the smallest.

    Args:
        features: shape (units, features).
        classes: of each unit, shape (units,).
        folds: of each unit, shape (units,).
        outputs: the number of classes.

    Returns:
        Coefficients of the logits, shape (features + 1, outputs), the intercept last, and the penalty. A class that no
        unit has gets the intercept -inf. Where nothing can be left out, the largest penalty is taken, and given as
        None.
    """
    present = np.unique(folds)
    if len(present) < 2:
        return _fit(features, classes, PENALTIES[-1], outputs), None
    entropies = np.zeros(len(PENALTIES))
    for fold in present:
        inside = folds == fold
        for place, penalty in enumerate(PENALTIES):
            found = _fit(features[~inside], classes[~inside], penalty, outputs)
            chances = softmax(features[inside] @ found[:-1] + found[-1])
            of_true = chances[np.arange(len(chances)), classes[inside]]
            entropies[place] -= np.log(np.maximum(of_true, LEAST)).sum()
    penalty = PENALTIES[int(entropies.argmin())]
    return _fit(features, classes, penalty, outputs), penalty


def softmax(logits: Array) -> Array:
    """Probabilities, shape (units, outputs)."""
    powers = np.exp(logits - logits.max(1, keepdims=True))
    chances: Array = powers / powers.sum(1, keepdims=True)
    return chances


def _fit(features: Array, classes: Indices, penalty: float, outputs: int) -> Array:
    """The coefficients for one penalty."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    seen = np.unique(classes)
    found = np.zeros((features.shape[1] + 1, outputs))
    found[-1] = np.where(np.isin(np.arange(outputs), seen), 0.0, -np.inf)
    if len(seen) < 2:
        return found
    if features.shape[1] == 0:
        found[-1, seen] = np.log(np.bincount(classes)[seen] / len(classes))
        return found
    with warnings.catch_warnings():  # after so many steps it is near enough
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=1 / penalty, max_iter=MAX_STEPS, tol=1e-6).fit(features, classes)
    joined = np.concatenate([model.coef_, model.intercept_[:, None]], 1).T
    if len(seen) == 2:  # one logit: of the second class against the first
        found[:, seen[1]] += joined[:, 0]
    else:
        found[:, seen] += joined
    return found
