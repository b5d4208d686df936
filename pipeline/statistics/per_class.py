"""Metrics of each class alone: which classes a head tells apart, and how many test labels say so."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.statistics.predictions import Floats, Predictions, from_table

if TYPE_CHECKING:
    import pandas as pd

MEASURES = ("precision", "recall", "f1", "auroc", "average_precision")


def classes_of(table: pa.Table, targets: Sequence[str], probes: Container[str]) -> pd.DataFrame:
    """A row per target and class: `target`, the columns of `per_class`, and those of the probe as `probe_<measure>`.

    Args:
        table: of predictions, see `from_table`.
        targets: those whose labels are classes.
        probes: the targets that have a probe.
    """
    import pandas as pd

    found = []
    for target in targets:
        rows = per_class(from_table(table, target))
        rows.insert(0, "target", target)
        if target in probes:
            rows = rows.join(per_class(from_table(table, target, probe=True))[list(MEASURES)].add_prefix("probe_"))
        found.append(rows)
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def per_class(predictions: Predictions) -> pd.DataFrame:
    """A row per class, in the order of the labels; numbers are means over the seeds of the head.

    Args:
        predictions: of one target, whose labels are classes.

    Returns:
        The columns `class`, `labels` and `sequences` (how many test labels are of the class, and how many sequences
        have such), and those in `MEASURES`, fractions 0..1: precision is 0 where nothing is predicted to be of the
        class; what needs a label of the class, or one of another, is NaN where there is none.
    """
    import pandas as pd

    classes = list(predictions.classes or ())
    is_class = predictions.true[:, None] == np.arange(len(classes))
    table = pd.DataFrame({"class": classes, "labels": is_class.sum(0)})
    table["sequences"] = (predictions.by_sequence(is_class.astype(np.float64)) > 0).sum(0)
    each = np.mean([_measures(is_class, one.predicted) for one in predictions.seeds], axis=0)
    return table.join(pd.DataFrame(each, columns=list(MEASURES)))


def _measures(is_class: npt.NDArray[np.bool_], scores: Floats) -> Floats:
    """`MEASURES` of each class against the rest, shape (classes, measures)."""
    from sklearn.metrics import average_precision_score, precision_recall_fscore_support, roc_auc_score

    labels = np.arange(is_class.shape[1])
    true, predicted = is_class.argmax(1), scores.argmax(1)
    found = precision_recall_fscore_support(true, predicted, labels=labels, zero_division=0)[:3]
    precision, recall, f1 = (np.asarray(one, np.float64) for one in found)
    present = is_class.any(0)
    recall[~present] = f1[~present] = np.nan
    ranked = np.full((len(labels), 2), np.nan)
    for index in np.flatnonzero(present & ~is_class.all(0)):
        of_class = is_class[:, index], scores[:, index]
        ranked[index] = roc_auc_score(*of_class), average_precision_score(*of_class)
    return np.column_stack([precision, recall, f1, ranked])
