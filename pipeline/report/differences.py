"""How far checkpoints are from one another, on the same test sequences, with paired intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.errors import DataError
from pipeline.report.overview import Changes
from pipeline.statistics.intervals import changes
from pipeline.statistics.metrics import HEADLINE, Change, Metric, metric_name
from pipeline.statistics.predictions import Predictions, from_table

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from pipeline.score import Scores

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
            if not all(tables) and any(tables):
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


def headline_changes(scores: Scores, other: Scores) -> Iterator[tuple[Metric, Change | None, str]]:
    """What each headline metric of a task differs by from another checkpoint's, or why that is not known.

    Also where it is not defined for one of them, or for both; without a value then.

    Raises:
        DataError: the two were not measured on the same targets, sequences and labels.
    """
    named = [{metric.short: metric for metric in one.results} for one in (scores, other)]
    why = [{key.rpartition("/")[2]: reason for key, reason in one.omitted.items()} for one in (scores, other)]
    for metric in _headlines(scores):
        here, there = (metric.short in {**values, **reasons} for values, reasons in zip(named, why, strict=True))
        if metric.probe and not (here and there):
            if here or there:
                yield named[0].get(metric.short, metric), None, "one of the two has no probe"
            continue
        now, then = (from_table(one.table, metric.target, metric.probe) for one in (scores, other))
        found = changes(now, then, only=metric.name)
        whose = zip(("this one", "the other"), why, strict=True)
        undefined = [f"not defined for {who}: {own[metric.short]}" for who, own in whose if metric.short in own]
        reason = found.refused.get(metric.name) or "; ".join(undefined)
        yield named[0].get(metric.short, metric), found.values.get(metric.name), reason


def _headlines(scores: Scores) -> list[Metric]:
    """The main metric of the head for each target, then those of the probe; without their values."""
    kinds = {one.name: "regression" if one.classes is None else "classification" for one in scores.examples.targets}
    return [Metric("", name, HEADLINE[kind], probe=probe) for probe in (False, True) for name, kind in kinds.items()]


def difference_frame(scores: Sequence[Scores], others: Sequence[Scores]) -> pd.DataFrame:
    """How far each headline metric is from another checkpoint's; see `Measured.compare`."""
    import pandas as pd

    by_task = {one.task_name: one for one in others}
    names = [", ".join(sorted(one.task_name for one in of_one)) for of_one in (scores, others)]
    if names[0] != names[1]:
        same = "measure both with the same configuration and data"
        raise DataError(f"compare: expected the same tasks, found {names[0]} and {names[1]}; {same}")
    rows = []
    for one in scores:
        other = by_task[one.task_name]
        values = {metric.short: metric.value for metric in other.results}
        for metric, change, reason in headline_changes(one, other):
            value, before = metric.value, values.get(metric.short, math.nan)
            row: dict[str, Any] = {"task": one.task_name, "metric": metric.short, "score": value, "other": before}
            row |= {"change": value - before, "ci_low": math.nan, "ci_high": math.nan, "p_improved": math.nan}
            if change:
                row |= {"ci_low": change.interval.low, "ci_high": change.interval.high}
                row |= {"p_improved": change.p_improved}
                reason = Changes(change.named(metric.key, "start")).direction(metric)
            rows.append(row | {"verdict": reason or "not defined"})
    return pd.DataFrame(rows)


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
