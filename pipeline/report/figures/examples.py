"""Figures of a few test sequences, residue by residue: true beside predicted labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.load import Part, Target
from pipeline.report.figures.canvas import GREY, INK, clean, drawable, new_figure, save, shorten

SEQUENCES = 4  # at most
ENOUGH = 40  # labelled positions that make a sequence worth looking at
WRAP = 60  # residues in a line
RESIDUES = 240  # of a sequence at most
LINES = 40  # of text at most: fewer sequences where there are many targets
PANELS = 8  # of curves at most
MASKED = "·"
WRONG = "#f5b78a"  # behind a wrong label


class Line(NamedTuple):
    """A line of the text figure; `wrong` has a full block behind each wrong label, and spaces elsewhere."""

    name: str
    text: str
    color: str = "C0"
    wrong: str = ""


def choose(part: Part, most: int = SEQUENCES) -> list[int]:
    """The shortest sequences with enough labelled positions; where these are too few, those that have most."""
    labelled = np.logical_or.reduce(part.masks).astype(np.int64)
    found = np.add.reduceat(labelled, np.cumsum(part.counts) - part.counts)
    few = found < ENOUGH
    return [int(index) for index in np.lexsort((np.where(few, -found, part.counts), few))[:most]]


def letters_of(
    target: Target, part: Part, index: int, predicted: npt.NDArray[np.int64], units: slice
) -> tuple[str, str, str]:
    """True and predicted labels of target `index` at some units, a character each, and a block at each wrong one.

    `predicted` holds class indices, shape (all units,).
    """
    names = [name if len(name) == 1 else "?" for name in target.classes or ()]
    names += ["?"] * (target.outputs - len(names))  # classes that were declared and never seen
    mask, true, found = part.masks[index][units], part.values[index][units], predicted[units]
    labels = ["".join(np.where(mask, np.array(names)[values], MASKED)) for values in (true, found)]
    return labels[0], labels[1], "".join(np.where(mask & (true != found), "█", " "))


def text_figure(
    heading: tuple[str, str], part: Part, targets: Sequence[Target], predicted: Sequence[Any], path: Path
) -> Path:
    """Residues with the true and the predicted classes beneath; errors on orange, masked positions as dots."""
    lines: list[Line] = []
    for index in choose(part):
        block = _block(part, index, targets, predicted)
        if lines and len(lines) + len(block) > LINES:
            break
        lines += block
    figure = new_figure(7.4, 0.165 * len(lines) + 0.75, *heading)
    axes = figure.subplots()
    axes.set(xlim=(-0.18, 1), ylim=(1 - len(lines), 1))
    axes.set_axis_off()
    for row, line in enumerate(lines):
        axes.text(-0.01, -row, line.name, color=line.color, size=8, ha="right")
        for text, color in ((line.wrong, WRONG), (line.text, INK)):
            axes.text(0, -row, clean(text), color=color, family="DejaVu Sans Mono")
    return save(figure, path)


def _block(part: Part, index: int, targets: Sequence[Target], predicted: Sequence[Any]) -> list[Line]:
    """The lines of a sequence."""
    start, length = int(part.counts[:index].sum()), int(part.counts[index])
    shown = min(length, RESIDUES)
    cut = f", the first {shown}" if shown < length else ""
    lines = [Line("", f"{part.rows[index]}: {length} residues{cut}")]
    for begin in range(0, shown, WRAP):
        end = min(begin + WRAP, shown)
        lines.append(Line("residues", f"{part.sequences[index][begin:end]}  {end}", GREY))
        for place, target in enumerate(targets):
            units = slice(start + begin, start + end)
            true, found, wrong = letters_of(target, part, place, predicted[place], units)
            lines += [Line(shorten(target.name, 18), true), Line("predicted", found, "C1", wrong)]
        lines.append(Line("", ""))
    return lines


def curve_figure(
    heading: tuple[str, str], part: Part, targets: Sequence[Target], predicted: Sequence[Any], path: Path
) -> Path:
    """True and predicted numbers along each sequence, with gaps where the truth is masked."""
    shown = list(enumerate(targets))[:PANELS]
    sequences = choose(part, max(1, min(SEQUENCES, PANELS // len(shown))))
    figure = new_figure(8.4, len(sequences) * len(shown) * 1.6 + 1.0, *heading)
    grid = figure.subplots(len(sequences) * len(shown), squeeze=False)
    panels = [(sequence, index, target) for sequence in sequences for index, target in shown]
    for axes, (sequence, index, target) in zip(grid.flat, panels, strict=True):
        start, length = int(part.counts[:sequence].sum()), int(part.counts[sequence])
        units, places = slice(start, start + length), np.arange(length) + 1
        true = np.where(part.masks[index][units], part.values[index][units], np.nan)
        for name, color, values in (("true", "C0", true), ("predicted", "C1", predicted[index][units])):
            axes.plot(places, drawable(values), color, label=name, linewidth=1.1, marker=".")
        axes.set(title=f"{shorten(target.name)}, {part.rows[sequence]}: {length} positions", xlim=(0.5, length + 0.5))
        axes.locator_params(axis="x", integer=True)
    grid[0, 0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    figure.supxlabel("position, from 1", size=9)
    return save(figure, path)
