"""Lines without axes, in a few words of SVG."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.report.overview import Curve

WIDTH, HEIGHT, ROOM = 240, 48, 4  # in pixels; the room is for dots at the edges


@dataclass(frozen=True)
class Sparkline:
    """A metric over a training.

    Attributes:
        lines: by name, the points of a polyline.
        dot: where the first line ends.
        level: the height of a level line; None where there is none.
        label: what is drawn, in words.
        steps: the first and the last.
    """

    lines: Mapping[str, str]
    dot: tuple[float, float]
    level: float | None
    label: str
    steps: tuple[int, int]


def sparkline(curves: Mapping[str, Curve], level: float | None = None) -> Sparkline | None:
    """Draws curves in one picture of `WIDTH` by `HEIGHT`.

    Args:
        curves: by name, steps and values; the first is the main one.
        level: a value to draw a level line at.

    Returns:
        None where the main one has less than two points.
    """
    main = next(iter(curves.values()), ())
    if len(main) < 2:
        return None
    points = [point for curve in curves.values() for point in curve]
    steps = [step for step, _ in points]
    values = [value for _, value in points] + ([] if level is None else [level])

    def place(step: float, value: float) -> tuple[float, float]:
        along = (step - min(steps)) / ((max(steps) - min(steps)) or 1)
        above = (value - min(values)) / ((max(values) - min(values)) or 1)
        return round(ROOM + along * (WIDTH - 2 * ROOM), 1), round(HEIGHT - ROOM - above * (HEIGHT - 2 * ROOM), 1)

    lines = {name: " ".join("{:g},{:g}".format(*place(*one)) for one in curve) for name, curve in curves.items()}
    height = None if level is None else place(min(steps), level)[1]
    span = f"from {main[0][1]:.3f} at step {main[0][0]} to {main[-1][1]:.3f} at step {main[-1][0]}"
    label = f"{len(main)} measurements, {span}, between {min(v for _, v in main):.3f} and {max(v for _, v in main):.3f}"
    return Sparkline(lines, place(*main[-1]), height, label, (min(steps), max(steps)))
