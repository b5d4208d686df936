"""How far the rows of a leaderboard are from its first, on the same test sequences, with paired intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pipeline.errors import DataError
from pipeline.statistics.intervals import changes
from pipeline.statistics.metrics import Change, Metric, metric_name
from pipeline.statistics.predictions import Predictions, from_table

if TYPE_CHECKING:
    import pyarrow as pa

FIRST = "_delta_first"  # behind a metric's name: its difference to the first row
NOT_KEPT = "the predictions of some rows were not kept"


def differences(tables: Sequence[Mapping[str, pa.Table]], name: str) -> tuple[list[Change | None], list[str]]:
    """The difference of each row to the first.

    Args:
        tables: of each row the predictions by task, best row first; see `Scores.table`.
        name: the metric's.

    Returns:
        For each row the difference, None for the first and where there is none; and why there is none.
    """
    metric = Metric.parse(name)
    found: list[Change | None] = [None] * len(tables)
    reasons: dict[str, None] = {}
    if metric is None:
        return found, []
    first = _predictions(tables[0], metric) if tables else None
    for place, of_row in enumerate(tables[1:], 1):
        now = _predictions(of_row, metric)
        if now is None or first is None:
            if not all(tables):
                reasons[NOT_KEPT] = None
            continue
        try:
            every = changes(now, first)
        except DataError as error:
            reasons[str(error)] = None
            continue
        found[place] = every.values.get(metric.name)
        if found[place] is None and metric.name in every.refused:
            reasons[every.refused[metric.name]] = None
    return found, list(reasons)


def _predictions(tables: Mapping[str, pa.Table], metric: Metric) -> Predictions | None:
    """Of the head or the probe that a metric is of; None where they were not kept, as by earlier versions."""
    table = tables.get(metric.task) if metric.task else next(iter(tables.values()), None)
    for column in table.column_names if table is not None else []:
        target = column.removesuffix("_target")
        if column != target and metric_name(target) == metric.target:
            try:
                return from_table(table, target, metric.probe)
            except DataError:
                return None
    return None
