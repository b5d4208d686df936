"""What the metrics of a training can see, as a table and in words."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.report.tables import Table
from pipeline.statistics.resolution import Points, Resolution, advice, resolutions, to_monitor

COLUMNS = ("metric", "smallest visible difference", "per 1,000 steps", "over the training", "ratio", "monitor")


def resolution_text(points: Points, num_seeds: Mapping[str, int]) -> str:
    """In Markdown: a row per metric, and for each target what to monitor; empty before the third measurement.

    Args:
        points: the step and the metrics of each measurement.
        num_seeds: see `resolutions`.
    """
    found = resolutions(points, num_seeds)
    if not found:
        return ""
    chosen = [one for one in to_monitor(found) if abs(one.ratio) >= 1]
    table = Table(COLUMNS, [_row(one, one in chosen) for one in found], frozenset({0, 5}))
    about = "Changes are those of a straight line through all measurements, positive where a metric improves."
    return "\n".join([table.markdown(), "", about, "", *(f"- {line}" for line in advice(found))])


def _row(one: Resolution, chosen: bool) -> list[str]:
    numbers = [f"{one.smallest:.4f}", f"{one.slope:+.4f}", f"{one.change:+.4f}", f"{one.ratio:+.1f}"]
    word = "this one" if one.ratio > 0 else "getting worse"
    return [one.metric.key, *numbers, word if chosen else ""]
