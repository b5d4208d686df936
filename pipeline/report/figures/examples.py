"""Pictures of a few test sequences, residue by residue: what is true, and what the head says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.load import Part, Target
from pipeline.report.figures.canvas import (
    BLUE,
    GREY,
    HEAD,
    MONO,
    ORANGE,
    Sheet,
    cell,
    drawable,
    extent,
    fitting,
    label,
    line,
    span,
    ticks,
    write,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SEQUENCES = 4  # at most
ENOUGH = 40  # labelled positions that make a sequence worth looking at
WRAP = 60  # residues in a line
RESIDUES = 240  # of a sequence at most
LINES = 30  # of text at most: a glyph takes time, so fewer sequences where there are many targets
PANELS = 8  # of curves at most
LINE, LEFT = 0.165, 1.35  # inches
MASKED = "·"
WRONG = "#f5b78a"  # behind a wrong label


@dataclass(frozen=True)
class Row:
    """A target on one sequence: true and predicted labels, one character each, and which are wrong, shape (length,)."""

    name: str
    true: str
    predicted: str
    wrong: npt.NDArray[np.bool_]


def choose(part: Part, most: int = SEQUENCES) -> list[int]:
    """The shortest sequences with enough labelled positions; where there are too few, those that have most of them."""
    labelled = np.logical_or.reduce(part.masks).astype(np.int64)
    found = np.add.reduceat(labelled, np.cumsum(part.counts) - part.counts)
    few = found < ENOUGH
    return [int(index) for index in np.lexsort((np.where(few, -found, part.counts), few))[:most]]


def row_of(target: Target, part: Part, index: int, predicted: npt.NDArray[np.int64], units: slice) -> Row:
    """The labels of target `index` at some units; `predicted` holds class indices, shape (all units,)."""
    names = [name if len(name) == 1 else "?" for name in target.classes or ()]
    names += ["?"] * (target.outputs - len(names))  # classes that were declared and never seen
    mask, true, said = part.masks[index][units], part.values[index][units], predicted[units]
    texts = ["".join(names[i] if m else MASKED for i, m in zip(v, mask, strict=True)) for v in (true, said)]
    return Row(target.name, texts[0], texts[1], mask & (true != said))


def text_picture(
    heading: tuple[str, str],
    part: Part,
    targets: Sequence[Target],
    predicted: Sequence[npt.NDArray[np.int64]],
    path: Path,
) -> Path:
    """Residues with the true and the predicted classes beneath; errors on orange, masked positions as dots."""
    blocks: list[tuple[str, str, list[Row]]] = []
    left = LINES
    for index in choose(part):
        start, length = int(part.counts[:index].sum()), int(part.counts[index])
        shown = min(length, RESIDUES)
        lines = -(-shown // WRAP) * (2 * len(targets) + 1)
        if blocks and lines > left:
            break
        left -= lines
        rows = [row_of(target, part, i, predicted[i], slice(start, start + shown)) for i, target in enumerate(targets)]
        cut = f", the first {shown}" if shown < length else ""
        blocks.append((f"{part.rows[index]}: {length} residues{cut}", part.sequences[index][:shown], rows))
    height = sum(0.4 + -(-len(text) // WRAP) * ((2 * len(rows) + 1) * LINE + 0.1) for _, text, rows in blocks)
    step = extent("M" * WRAP, 9, MONO) / WRAP
    sheet = Sheet(LEFT + WRAP * step + 0.6, height + HEAD + 0.1, *heading)
    canvas = sheet.axes(0, 0, sheet.width, sheet.height, frame=False)
    canvas.set(xlim=(0, sheet.width), ylim=(0, sheet.height))
    boxes: list[tuple[float, float]] = []
    y = sheet.height - HEAD - 0.1
    for title, text, rows in blocks:
        write(canvas, 0.15, y, fitting(title, 9, sheet.width - 0.3), 9, BLUE, va="baseline")
        y = _lines(canvas, y - 0.24, (text, rows), boxes, step) - 0.16
    _mark(canvas, boxes, step)
    return sheet.save(path)


def _lines(canvas: Axes, y: float, what: tuple[str, list[Row]], boxes: list[tuple[float, float]], step: float) -> float:
    """Writes a sequence from `y` down, and notes where its errors are; gives the `y` below."""
    text, rows = what
    for begin in range(0, len(text), WRAP):
        part = slice(begin, begin + WRAP)
        last = min(begin + WRAP, len(text))
        _line(canvas, y, "residues", text[part], GREY)
        write(canvas, LEFT + WRAP * step + 0.1, y, str(last), 8, GREY, va="baseline")
        for row in rows:
            _line(canvas, y - LINE, row.name, row.true[part], BLUE)
            _line(canvas, y - 2 * LINE, "predicted", row.predicted[part], ORANGE)
            y -= 2 * LINE
            boxes += [(LEFT + column * step, y) for column in np.flatnonzero(row.wrong[part])]
        y -= LINE + 0.1
    return y


def _line(canvas: Axes, y: float, name: str, text: str, color: str) -> None:
    write(canvas, LEFT - 0.12, y, fitting(name, 8, LEFT - 0.3), 8, color, va="baseline", ha="right")
    write(canvas, LEFT, y, "".join(cell(letter) for letter in text), 9, "#222222", MONO, va="baseline")


def _mark(canvas: Axes, boxes: list[tuple[float, float]], step: float) -> None:
    """Draws what stands behind wrong labels."""
    from matplotlib.collections import PolyCollection

    shape = np.array([[0, -0.04], [step, -0.04], [step, 0.12], [0, 0.12]])
    places = [shape + np.array(box) for box in boxes]
    canvas.add_collection(PolyCollection(places, facecolors=WRONG, linewidths=0, zorder=0), autolim=False)


def curve_picture(
    heading: tuple[str, str], part: Part, targets: Sequence[Target], predicted: Sequence[Any], path: Path
) -> Path:
    """True and predicted numbers along each sequence, with gaps where the truth is masked."""
    shown = list(enumerate(targets))[:PANELS]
    panels = [
        (index, *target) for index in choose(part, max(1, min(SEQUENCES, PANELS // len(shown)))) for target in shown
    ]
    sheet = Sheet(8.4, len(panels) * 1.6 + HEAD + 0.35, *heading)
    for place, (sequence, index, target) in enumerate(panels):
        start, length = int(part.counts[:sequence].sum()), int(part.counts[sequence])
        units = slice(start, start + length)
        axes = sheet.axes(0.75, sheet.height - HEAD - 0.2 - (place + 1) * 1.6 + 0.45, 7.45, 1.1)
        true = np.where(part.masks[index][units], part.values[index][units], np.nan)
        _curves(axes, true, np.asarray(predicted[index][units], dtype=np.float64))
        title = f"{target.name}, {part.rows[sequence]}: {length} positions"
        write(axes, 0, 1.04, fitting(title, 9, 7.4), 9, BLUE, transform=axes.transAxes)
    sheet.write(0.75, 0.12, "position, from 1", 9)
    sheet.write(8.2, 0.12, "predicted", 9, ORANGE, ha="right")
    sheet.write(7.45, 0.12, "true", 9, BLUE, ha="right")
    return sheet.save(path)


def _curves(axes: Axes, true: npt.NDArray[np.float64], predicted: npt.NDArray[np.float64]) -> None:
    ticks(axes, 8, 3, whole=True)
    label(axes, "", "")
    places = np.arange(1, len(true) + 1)
    limits = [0.0] if not (drawable(true) | drawable(predicted)).any() else []
    for color, values, zorder in ((ORANGE, predicted, 2), (BLUE, true, 3)):
        values = np.where(drawable(values), values, np.nan)
        limits += values[~np.isnan(values)].tolist()
        line(axes, places, values, color, 1.1, "o", markersize=2.5, zorder=zorder)
    axes.set(xlim=(0.5, len(true) + 0.5), ylim=span(limits))
