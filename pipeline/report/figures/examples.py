"""Figures of a few test sequences, residue by residue: predicted beneath true labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.load import Part, Target
from pipeline.report.figures.canvas import GREY, INK, drawable, new_figure, save, shorten

SEQUENCES = 4  # at most
ENOUGH = 40  # labelled positions that make a sequence worth looking at
WRAP = 60  # residues in a line
RESIDUES = 240  # of a sequence at most
LINES = 40  # of text at most: fewer sequences where there are many targets
PANELS = 8  # of curves at most
MASKED = "·"
WRONG = "#f5b78a"  # behind a wrong label


def choose(part: Part, most: int = SEQUENCES) -> list[int]:
    """The shortest sequences with enough labelled positions; where these are too few, those that have most."""
    labelled = np.logical_or.reduce(part.masks).astype(np.int64)
    found = np.add.reduceat(labelled, np.cumsum(part.counts) - part.counts)
    few = found < ENOUGH
    return [int(index) for index in np.lexsort((np.where(few, -found, part.counts), few))[:most]]


def letters_of(
    target: Target, part: Part, index: int, predicted: npt.NDArray[Any], units: slice
) -> tuple[str, str, str]:
    """True and predicted labels of target `index` at some units, a character each, and a block at each wrong label.

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
    lines: list[tuple[str, str, str, str]] = []
    for index in choose(part):
        block = _lines(part, index, targets, predicted)
        if lines and len(lines) + len(block) > LINES:
            break
        lines += block
    figure = new_figure(7.6, 0.165 * len(lines) + 0.9, *heading)
    axes = figure.subplots()
    axes.set(xlim=(-0.18, 1), ylim=(1 - len(lines), 1))
    axes.set_axis_off()
    for row, (name, color, text, wrong) in enumerate(lines):
        axes.text(-0.01, -row, name, color=color, size=8, ha="right")
        axes.text(0, -row, wrong, color=WRONG, family="DejaVu Sans Mono")  # the same font, so the same columns
        axes.text(0, -row, text, color=INK, family="DejaVu Sans Mono")
    return save(figure, path)


def _lines(
    part: Part, index: int, targets: Sequence[Target], predicted: Sequence[Any]
) -> list[tuple[str, str, str, str]]:
    """The lines of a sequence: name, its colour, text, and the blocks behind it."""
    start, length = int(part.counts[:index].sum()), int(part.counts[index])
    shown = min(length, RESIDUES)
    cut = f", the first {shown}" if shown < length else ""
    lines = [("", INK, f"{part.rows[index]}: {length} residues{cut}", "")]
    for begin in range(0, shown, WRAP):
        end = min(begin + WRAP, shown)
        lines.append(("residues", GREY, f"{part.sequences[index][begin:end]}  {end}", ""))
        for place, target in enumerate(targets):
            units = slice(start + begin, start + end)
            true, found, wrong = letters_of(target, part, place, predicted[place], units)
            lines += [(shorten(target.name, 18), "C0", true, ""), ("predicted", "C1", found, wrong)]
        lines.append(("", INK, "", ""))
    return lines


def curve_figure(
    heading: tuple[str, str], part: Part, targets: Sequence[Target], predicted: Sequence[Any], path: Path
) -> Path:
    """True and predicted numbers along each sequence, with gaps where the truth is masked."""
    shown = list(enumerate(targets))[:PANELS]
    sequences = choose(part, max(1, min(SEQUENCES, PANELS // len(shown))))
    panels = [(sequence, index, target) for sequence in sequences for index, target in shown]
    figure = new_figure(8.4, len(panels) * 1.6 + 1.0, *heading)
    for place, (sequence, index, target) in enumerate(panels, 1):
        start, length = int(part.counts[:sequence].sum()), int(part.counts[sequence])
        units, positions = slice(start, start + length), np.arange(length) + 1
        axes = figure.add_subplot(len(panels), 1, place)
        axes.set(title=f"{shorten(target.name)}, {part.rows[sequence]}: {length} positions", xlim=(0.5, length + 0.5))
        axes.locator_params(axis="x", integer=True)
        true = np.where(part.masks[index][units], part.values[index][units], np.nan)
        for name, values in (("true", true), ("predicted", predicted[index][units])):
            axes.plot(positions, drawable(values), label=name, linewidth=1.1, marker=".")
        if place == 1:
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    figure.supxlabel("position, from 1", size=9)
    return save(figure, path)
