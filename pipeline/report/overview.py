"""What a reader looks at first: a line per target with its score, its interval, what it has changed by, a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pipeline.report.tables import INTERVAL, Table, append, interval_text, number, pairs_of, score_table, score_text
from pipeline.statistics.metrics import Since

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.score import Scores
    from pipeline.statistics.metrics import Metric

HEAD, PROBE = False, True


@dataclass(frozen=True)
class Changes:
    """What metrics have changed by since a training began.

    Attributes:
        values: by the names that they are logged under; see `Change.named`.
        since: which of them.
        start: where the training began, in words.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    since: Since = "start"
    start: str = "the start"

    def of(self, metric: Metric | None) -> tuple[float, float, float] | None:
        """The change and the ends of its interval; None where there is none."""
        key = f"{metric.key}_delta_{self.since}" if metric else ""
        if key not in self.values:
            return None
        return self.values[key], self.values[f"{key}_ci_low"], self.values[f"{key}_ci_high"]

    def text(self, metric: Metric | None) -> str:
        """`+0.125 (+0.050, +0.200)`; empty where there is no change."""
        found = self.of(metric)
        return "{:+.3f} ({:+.3f}, {:+.3f})".format(*found) if found else ""

    def verdict(self, pair: Mapping[bool, Metric]) -> list[str]:
        """Whose change is beyond chance, and in which direction."""
        found: dict[str, list[str]] = {}
        compared = {which: change for which, metric in pair.items() if (change := self.of(metric))}
        for which, (_, low, high) in compared.items():
            if low <= 0 <= high:
                continue
            improved = (high < 0) == pair[which].lower_is_better
            found.setdefault("improved" if improved else "worse", []).append("probe" if which else "head")
        if compared and not found:
            return [f"not told apart from {self.start}"]
        return [f"{word} ({', '.join(who)})" for word, who in found.items()]


def overview(scores: Sequence[Scores], changes: Changes = Changes(), title: str = "Scores on the test set") -> Table:
    """The headline metric of each target, of the head and of the probe.

    Args:
        scores: of each task.
        changes: what the metrics have changed by since the training began.
        title: of the table, on the terminal.

    Returns:
        Columns that would be empty are left out. The baseline is the head's, then the probe's. The verdict says what is
        wrong with the head, or that it learns; where there is a start, whose change leaves 0 out of its 95 % interval.
    """
    pairs = headline_pairs(scores)
    columns, rows = ["metric"], [[next(iter(pair.values())).beside.key] for _, pair in pairs]
    for name, which in (("score", HEAD), ("probe", PROBE)):
        found = [pair.get(which) for _, pair in pairs]
        if any(found):
            append(columns, rows, name, [score_text(one) if one else "" for one in found])
            append(columns, rows, INTERVAL, [interval_text(one) for one in found])
            append(columns, rows, f"{name} since {changes.start}", [changes.text(one) for one in found])
    append(columns, rows, "baseline", [_baseline(pair, one.baselines) for one, pair in pairs])
    append(columns, rows, "constant guess", [number(next(iter(pair.values())).constant) for _, pair in pairs])
    append(columns, rows, "verdict", [_verdict(one, pair, changes) for one, pair in pairs])
    left = frozenset({0, len(columns) - 1})
    return Table(columns, rows, left, title)


def headline_pairs(scores: Sequence[Scores]) -> list[tuple[Scores, dict[bool, Metric]]]:
    """For each target its task's scores, and its headline metric: the head's (False) and the probe's (True)."""
    headlines = [(one, pairs_of(metric for metric in one.results if metric.is_headline)) for one in scores]
    return [(one, pair) for one, found in headlines for pair in found.values()]


def overview_frame(scores: Sequence[Scores], changes: Changes = Changes()) -> pd.DataFrame:
    """The overview as numbers: a row per target.

    Returns:
        Columns `task`, `metric`, `score`, `ci_low`, `ci_high` (the ends of its 95 % interval), the same of the probe
        (`probe`, ...), `baseline` (of the head, else of the probe), `constant` (a constant guess) and `verdict`. What
        is not defined is NaN.
    """
    import pandas as pd

    rows = []
    for one, pair in headline_pairs(scores):
        first = next(iter(pair.values()))
        row: dict[str, Any] = {"task": one.task_name, "metric": first.beside.short}
        for prefix, which in (("", HEAD), ("probe_", PROBE)):
            metric = pair.get(which)
            row["probe" if which else "score"] = metric.value if metric else math.nan
            ends = (metric.interval.low, metric.interval.high) if metric and metric.interval else (math.nan, math.nan)
            row |= dict(zip((f"{prefix}ci_low", f"{prefix}ci_high"), ends, strict=True))
        lines = [one.baselines[metric.key] for metric in pair.values() if metric.key in one.baselines]
        row |= {"baseline": lines[0] if lines else math.nan}
        row |= {"constant": math.nan if first.constant is None else first.constant}
        rows.append(row | {"verdict": _verdict(one, pair, changes)})
    return pd.DataFrame(rows)


def summary(facts: Mapping[str, str], scores: Sequence[Scores], changes: Changes = Changes()) -> str:
    """A run's description: the overview first, as MLflow shows the first lines alone; warnings; every metric; facts."""
    notes = [f"- {one.task_name}: {note}" for one in scores for note in (*one.earlier_notes, *one.notes)]
    about = [f"- {name}: `{value}`" for name, value in facts.items()]
    return "\n".join([overview(scores, changes).markdown(), "", *notes, "", score_table(scores).markdown(), "", *about])


def _baseline(pair: Mapping[bool, Metric], baselines: Mapping[str, float]) -> str:
    first = next(iter(pair.values()))
    keys = [replace(first, probe=which).key for which in (HEAD, PROBE)]
    return ", ".join(f"{baselines[key]:.3f}" for key in keys if key in baselines)


def _verdict(scores: Scores, pair: Mapping[bool, Metric], changes: Changes) -> str:
    target = next(iter(pair.values())).target
    words = [one.short for one in scores.verdicts if one.target in ("", target)]
    if HEAD not in pair:
        words = words or ["no score of the head"]
    return "; ".join([*(words or ["learns"]), *changes.verdict(pair)])
