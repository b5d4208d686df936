"""What the metrics of a training can see, as a table and in words."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import wrap

from pipeline.report.tables import Table, append
from pipeline.statistics.resolution import Points, Resolution, advice, resolutions, to_monitor

ABOUT = (
    "Gains are those of a straight line through all measurements, positive where a metric improves. Two checkpoints"
    " that differ by less than the smallest visible difference cannot be told apart from the noise of test sequences"
    " and head seeds. The ratio is the gain from the first measurement to the last, in such differences: beyond 1, or"
    " -1, it is no noise."
)


def resolution_text(points: Points, num_seeds: Mapping[str, int], markdown: bool = True) -> str:
    """A row per metric, and for each target what to monitor; empty before the third measurement.

    Args:
        points: the step and the metrics of each measurement.
        num_seeds: see `resolutions`.
        markdown: else it is for the terminal.
    """
    found = resolutions(points, num_seeds)
    if not found:
        return ""
    table = _table(found, points)
    drawn = [table.markdown(), "", ABOUT, ""] if markdown else [table.text().strip("\n"), *wrap(ABOUT, 120)]
    return "\n".join([*drawn, *(f"- {line}" for line in advice(found))])


def _table(found: list[Resolution], points: Points) -> Table:
    """At how many measurements metrics are known is said where one lacks some; a short training has no 1,000 steps."""
    columns, rows = ["metric"], [[one.metric.key] for one in found]
    lacking = any(one.measured < len(points) for one in found)
    first, last = points[0][0], points[-1][0]
    append(columns, rows, "known at measurements", [_known(one, points) if lacking else "" for one in found])
    append(columns, rows, "smallest visible difference", [f"{one.smallest:.4f}" for one in found])
    slopes = [f"{one.slope:+.4f}" if last - first >= 1000 else "" for one in found]
    append(columns, rows, "gain per 1,000 steps", slopes)
    whole = all(one.steps == (first, last) for one in found)
    append(
        columns,
        rows,
        f"gain, step {first} to {last}" if whole else "gain over them",
        [f"{one.change:+.4f}" for one in found],
    )
    append(columns, rows, "ratio", [f"{one.ratio:+.1f}" for one in found])
    chosen = [one for one in to_monitor(found) if abs(one.ratio) >= 1]
    words = [("this one" if one.ratio > 0 else "getting worse") if one in chosen else "" for one in found]
    append(columns, rows, "monitor", words)
    left = {0, columns.index("monitor")} if "monitor" in columns else {0}
    return Table(columns, rows, frozenset(left))


def _known(one: Resolution, points: Points) -> str:
    """`3 of 5`, and from where to where if not over the whole training."""
    count, (first, last) = f"{one.measured} of {len(points)}", one.steps
    return count if (first, last) == (points[0][0], points[-1][0]) else f"{count}, step {first} to {last}"
