"""Pictures of predicted classes: a confusion matrix, and the precision and recall of each class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.report.figures.canvas import (
    BLUE,
    HEAD,
    INK,
    ORANGE,
    PALE,
    Sheet,
    clean,
    extent,
    line,
    shorten,
    ticks,
    write,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Counts = npt.NDArray[np.int64]
Shares = npt.NDArray[np.float64]
FEW = 12  # classes up to which the numbers stand in the cells
MOST = 60  # classes up to which each is named
BAR = 0.36  # of a row's height


def confusion(true: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64], classes: int) -> Counts:
    """How often each class (row) was predicted as each (column), shape (classes, classes).

    >>> confusion(np.array([0, 0, 1]), np.array([0, 1, 1]), 2)
    array([[1, 1],
           [0, 1]])
    """
    return np.bincount(true * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def row_shares(counts: Counts) -> Shares:
    """Each row divided by its sum; zeros where that is 0."""
    return np.asarray(counts / np.maximum(counts.sum(1, keepdims=True), 1))


def precision_recall(counts: Counts) -> tuple[Shares, Shares]:
    """Precision and recall of each class, shape (classes,); 0 where a class was never predicted, or never there."""
    right = np.diag(counts)
    return right / np.maximum(counts.sum(0), 1), right / np.maximum(counts.sum(1), 1)


def confusion_picture(heading: tuple[str, str], names: Sequence[str], counts: Counts, path: Path) -> Path:
    """Counts, and beside them the share of each true class."""
    labels = [shorten(clean(name)) for name in names] if len(names) <= MOST else []
    side = float(np.clip(0.6 * len(names), 3.0, 4.2) if len(names) <= FEW else np.clip(0.14 * len(names), 4.2, 7.8))
    square = side / len(names)
    size = min(9.0, 58 * square)
    room = max([extent(text, size) for text in labels], default=0.0)
    flat = room < 0.9 * square
    left, below = room + 0.5, 0.5 if flat else room + 0.45
    sheet = Sheet(left + 2 * side + 0.5, below + side + 0.25 + HEAD, *heading)
    views: tuple[tuple[str, npt.NDArray[Any]], ...] = (
        (f"counts (full colour: {counts.max():,})", counts),
        ("share of each true class (full colour: 1)", row_shares(counts)),
    )
    for index, (title, values) in enumerate(views):
        axes = sheet.axes(left + index * (side + 0.3), below, side, side)
        _matrix(axes, values, title)
        _names(axes, labels, size, (index == 0, flat))
        x = left + index * (side + 0.3) + side / 2
        sheet.write(x, 0.15, "predicted", 9, ha="center")
    sheet.write(0.2, below + side / 2, "true", 9, va="center", ha="center", rotation=90)
    return sheet.save(path)


def _matrix(axes: Axes, values: npt.NDArray[Any], title: str) -> None:
    from matplotlib.colors import PowerNorm

    ticks(axes, 0, 0)
    n, top = len(values), float(values.max()) or 1.0
    shade = PowerNorm(0.5, 0, top) if values.dtype.kind == "i" else PowerNorm(1, 0, 1)  # rare classes show as well
    axes.imshow(values, cmap="Blues", norm=shade, interpolation="nearest", origin="upper", aspect="auto")
    axes.set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -0.5))
    for spine in axes.spines.values():
        spine.set_visible(True)
    write(axes, 0, 1.02, title, 9, INK, transform=axes.transAxes)
    if n > FEW:
        return
    for row, column in zip(*np.nonzero(values), strict=True):
        value = values[row, column]
        color = "white" if float(shade(value)) > 0.6 else INK
        write(axes, column, row, _short(value), 8 if n > 6 else 9, color, ha="center", va="center_baseline")


def _names(axes: Axes, names: Sequence[str], size: float, how: tuple[bool, bool]) -> None:
    """Class names below, and to the left where they belong; as plain text, which is drawn faster than ticks."""
    at_left, flat = how
    for index, name in enumerate(names):
        turned: dict[str, Any] = {} if flat else {"rotation": 90, "rotation_mode": "anchor"}
        place = {"ha": "center", "va": "top"} if flat else {"ha": "right", "va": "center"}
        below = axes.get_xaxis_transform()
        write(axes, index, -0.04 / (_inches(axes)), name, size, INK, transform=below, **place, **turned)
        if at_left:
            beside = axes.get_yaxis_transform()
            write(axes, -0.06 / _inches(axes), index, name, size, INK, transform=beside, ha="right", va="center")


def _inches(axes: Axes) -> float:
    """The height of (square) axes."""
    return float(axes.bbox.height) / axes.figure.dpi


def class_picture(heading: tuple[str, str], names: Sequence[str], counts: Counts, units: str, path: Path) -> Path:
    """Precision and recall of each class as bars; of the most frequent ones where there are many."""
    support = counts.sum(1)
    shown = np.arange(len(names)) if len(names) <= MOST else np.sort(np.argsort(-support, kind="stable")[:MOST])
    precision, recall = precision_recall(counts)
    labels = [f"{shorten(clean(names[index]))}  ({support[index]:,})" for index in shown]
    left = max(extent(text, 8) for text in labels) + 0.3
    height = float(np.clip(0.3 * len(shown), 0.6, max(4.5, 0.17 * len(shown))))
    some = f"; the {MOST} most frequent of {len(names)} classes" if len(names) > MOST else ""
    sheet = Sheet(left + 6.0, height + 0.75 + HEAD, heading[0], heading[1] + some)
    axes = sheet.axes(left, 0.45, 5.7, height)
    ticks(axes, 5, 0)
    axes.set(xlim=(0, 1), ylim=(len(shown) - 0.4, -0.6))
    for x in (0.2, 0.4, 0.6, 0.8, 1):
        line(axes, (x, x), (-1, len(shown)), PALE, 0.8, zorder=0)
    for color, values, shift in ((BLUE, precision, -BAR / 2), (ORANGE, recall, BAR / 2)):
        axes.barh(np.arange(len(shown)) + shift, values[shown], BAR, color=color, linewidth=0)
    for row, text in enumerate(labels):
        write(axes, -0.012, row, text, 8, INK, ha="right", va="center")
    place: dict[str, Any] = {"transform": axes.transAxes, "va": "bottom"}
    write(axes, 0, 1 + 0.05 / height, "■ precision", 9, BLUE, **place)
    write(axes, 0.22, 1 + 0.05 / height, "■ recall", 9, ORANGE, **place)
    write(axes, 1, 1 + 0.05 / height, f"(number of test {units})", 8, INK, ha="right", **place)
    return sheet.save(path)


def _short(value: float) -> str:
    """A share with two digits, a count with at most four characters.

    >>> [_short(np.float64(0.257)), _short(np.int64(912)), _short(np.int64(45_678))]
    ['0.26', '912', '46k']
    """
    if isinstance(value, np.floating):
        return f"{value:.2f}"
    return f"{value}" if value < 10_000 else f"{value / 1000:.0f}k" if value < 10**6 else f"{value / 10**6:.0f}M"
