"""Lines without axes, in a few words of SVG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from pipeline.report.overview import Curve, Reading

WIDTH, HEIGHT, ROOM = 240, 48, 4  # in pixels; the room is for dots at the edges
Place = Callable[[float, float], tuple[float, float]]


@dataclass(frozen=True)
class Sparkline:
    """A metric over a training.

    Attributes:
        lines: by name, the points of polylines: a new one behind each gap.
        bands: by name, the points of polygons, where the metric has intervals.
        dot: where the first line ends.
        level: the height of a level line; None where there is none.
        label: what is drawn, in words.
        steps: the first and the last.
        gaps: how many steps of the first line have no value.
    """

    lines: Mapping[str, Sequence[str]]
    bands: Mapping[str, Sequence[str]]
    dot: tuple[float, float]
    level: float | None
    label: str
    steps: tuple[int, int]
    gaps: int


def sparkline(curves: Mapping[str, Curve], level: float | None = None) -> Sparkline | None:
    """Draws curves in one picture of `WIDTH` by `HEIGHT`.

    Args:
        curves: by name, the main one first.
        level: a value to draw a level line at.

    Returns:
        None where the main one has less than two values.
    """
    first = next(iter(curves.values()), ())
    main = [(one.step, one.value) for one in first if one.value is not None]
    if len(main) < 2:
        return None
    every = [one for curve in curves.values() for one in curve]
    steps = [one.step for one in every]
    heights = [level, *(end for one in every for end in (one.value, one.low, one.high))]
    values = [value for value in heights if value is not None]

    def place(step: float, value: float) -> tuple[float, float]:
        along = (step - min(steps)) / ((max(steps) - min(steps)) or 1)
        above = (value - min(values)) / ((max(values) - min(values)) or 1)
        return round(ROOM + along * (WIDTH - 2 * ROOM), 1), round(HEIGHT - ROOM - above * (HEIGHT - 2 * ROOM), 1)

    height = None if level is None else place(min(steps), level)[1]
    span = f"from {main[0][1]:.3f} at step {main[0][0]} to {main[-1][1]:.3f} at step {main[-1][0]}"
    label = f"{len(main)} measurements, {span}, between {min(v for _, v in main):.3f} and {max(v for _, v in main):.3f}"
    lines = {name: _lines(curve, place) for name, curve in curves.items()}
    bands = {name: _bands(curve, place) for name, curve in curves.items()}
    return Sparkline(lines, bands, place(*main[-1]), height, label, (min(steps), max(steps)), len(first) - len(main))


def _lines(curve: Curve, place: Place) -> list[str]:
    """Between gaps; a value on its own is a dash two pixels long."""
    found = []
    for known, run in groupby(curve, lambda one: one.value is not None):
        points = [place(one.step, one.value) for one in run if one.value is not None]
        if len(points) == 1:
            points = [(points[0][0] - 1, points[0][1]), (points[0][0] + 1, points[0][1])]
        found += [_text(points)] if known else []
    return found


def _bands(curve: Curve, place: Place) -> list[str]:
    """Along the upper ends and back along the lower ones, between what has no interval."""
    found = []
    for known, run in groupby(curve, _has_interval):
        points = [(one.step, one.low, one.high) for one in run]
        upper = [place(step, high) for step, _, high in points if high is not None]
        lower = [place(step, low) for step, low, _ in points if low is not None]
        found += [_text([*upper, *reversed(lower)])] if known and len(points) > 1 else []
    return found


def _has_interval(one: Reading) -> bool:
    return one.value is not None and one.low is not None and one.high is not None


def _text(points: Sequence[tuple[float, float]]) -> str:
    return " ".join("{:g},{:g}".format(*point) for point in points)
