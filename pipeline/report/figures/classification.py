"""Figures of predicted classes: the confusion matrix, and the precision and recall of each class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.report.figures.canvas import INK, Numbers, new_figure, save, shorten

FEW = 12  # classes up to which the numbers stand in the cells
MOST = 60  # classes up to which each is named


def confusion(true: npt.NDArray[Any], predicted: npt.NDArray[Any], classes: int) -> npt.NDArray[np.int64]:
    """How often each class (row) was predicted as each (column), shape (classes, classes)."""
    return np.bincount(true * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def precision_recall(counts: npt.NDArray[np.int64]) -> tuple[Numbers, Numbers]:
    """Precision and recall of each class, shape (classes,); 0 where a class was never predicted, or never true."""
    right = np.diag(counts)
    return right / counts.sum(0).clip(1), right / counts.sum(1).clip(1)


def confusion_figure(heading: tuple[str, str], names: Sequence[str], counts: Any, path: Path) -> Path:
    """The counts, and beside them the share of each true class."""
    from matplotlib.colors import PowerNorm

    labels = [shorten(name) for name in names] if len(names) <= MOST else []
    side = float(np.clip(0.6 * len(names), 3, 4.2) if len(names) <= FEW else np.clip(0.14 * len(names), 4.2, 7.8))
    room = 0.075 * max(map(len, labels), default=0)  # inches for the longest label
    turned = room > side / max(1, len(labels))
    figure = new_figure(2 * side + room + 1.0, side + 1.5 + room * turned, *heading)
    left, right = figure.subplots(1, 2, sharey=True)
    top = max(1, counts.max())
    _matrix(left, labels, turned, counts, PowerNorm(0.5, 0, top))  # so that rare classes show as well
    _matrix(right, labels, turned, counts / counts.sum(1, keepdims=True).clip(1), PowerNorm(1, 0, 1))
    left.set(title=f"counts (full colour: {top:,})", ylabel="true")
    right.set(title="share of each true class (full colour: 1)", ylabel="")
    return save(figure, path)


def _matrix(axes: Any, labels: Sequence[str], turned: bool, values: npt.NDArray[Any], norm: Any) -> None:
    from sklearn.metrics import ConfusionMatrixDisplay

    few, display = len(values) <= FEW, ConfusionMatrixDisplay(values, display_labels=labels or None)
    look = {"cmap": "Blues", "colorbar": False, "im_kw": {"norm": norm, "aspect": "auto"}}
    display.plot(ax=axes, include_values=few, xticks_rotation=90 if turned else 0, **look)
    axes.set(xlabel="predicted", **({} if labels else {"xticks": [], "yticks": []}))
    axes.tick_params(length=0, labelsize=8 if len(values) <= 35 else 6)
    axes.spines[:].set_visible(True)
    for text, value in zip(display.text_.flat, values.flat, strict=True) if few else ():
        number = f"{value:.2f}" if isinstance(value, np.floating) else f"{value}"
        text.set(
            text=number if value else "", color="white" if norm(value) > 0.6 else INK, size=9 if len(values) <= 6 else 7
        )


def class_figure(heading: tuple[str, str], names: Sequence[str], counts: Any, units: str, path: Path) -> Path:
    """Precision and recall of each class as bars; of the most frequent classes where there are many."""
    support = counts.sum(1)
    shown = np.sort(np.argsort(-support, kind="stable")[:MOST])
    places = np.arange(len(shown))
    some = f"; the {MOST} most frequent of {len(names)} classes" if len(names) > MOST else ""
    height = 1.4 + float(np.clip(0.3 * len(shown), 0.6, 3 + 0.12 * len(shown)))
    figure = new_figure(7.2, height, heading[0], heading[1] + some)
    axes = figure.subplots()
    for shift, name, values in zip((-0.18, 0.18), ("precision", "recall"), precision_recall(counts), strict=True):
        axes.barh(places + shift, values[shown], 0.36, label=name)
    axes.set(xlim=(0, 1), ylim=(len(shown) - 0.4, -0.6), axisbelow=True)
    axes.set_yticks(places, [f"{shorten(names[index])}  ({support[index]:,})" for index in shown])
    axes.grid(axis="x", color="#dddddd")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    axes.set_title(f"(number of test {units})", loc="right", size=8)
    return save(figure, path)
