"""What a reader looks at first: a line per target with its score, its interval, what it has changed by, a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.report.tables import INTERVAL, Table, append, interval_text, number, pairs_of, score_table, score_text

if TYPE_CHECKING:
    from pipeline.score import Scores
    from pipeline.statistics.metrics import Metric

HEAD, PROBE = False, True
SAME = "not told apart from the start"


def overview(
    scores: Sequence[Scores], changes: Mapping[str, float] | None = None, start: str = "the start", title: str = ""
) -> Table:
    """The headline metric of each target, of the head and of the probe.

    Args:
        scores: of each task.
        changes: by name, what the metrics have changed by since the start; see `Progress.follow`.
        start: the start in words, such as `step 0`.
        title: of the table, on the terminal.

    Returns:
        Columns that would be empty are left out. The baseline is the head's, then the probe's. The verdict says what is
        wrong with the head, or that it learns; where there is a start, whose change leaves 0 out of its 95 % interval.
    """
    changes = changes or {}
    headlines = [(one, pairs_of(metric for metric in one.results if metric.is_headline)) for one in scores]
    pairs = [(one, pair) for one, found in headlines for pair in found.values()]
    columns, rows = ["metric"], [[next(iter(pair.values())).beside.key] for _, pair in pairs]
    for name, which in (("score", HEAD), ("probe", PROBE)):
        found = [pair.get(which) for _, pair in pairs]
        if any(found):
            append(columns, rows, name, [score_text(one) if one else "" for one in found])
            append(columns, rows, INTERVAL, [interval_text(one) for one in found])
            append(columns, rows, f"{name} since {start}", [_change(one, changes) for one in found])
    append(columns, rows, "baseline", [_baseline(pair, one.baselines) for one, pair in pairs])
    append(columns, rows, "constant guess", [number(next(iter(pair.values())).constant) for _, pair in pairs])
    append(columns, rows, "verdict", [_verdict(one, pair, changes) for one, pair in pairs])
    left = frozenset({0, len(columns) - 1})
    return Table(columns, rows, left, title or "Scores on the test set")


def summary(facts: Mapping[str, str], scores: Sequence[Scores]) -> str:
    """A run's description: the overview first, as MLflow shows the first lines alone; warnings; every metric; facts."""
    notes = [f"- {one.task_name}: {note}" for one in scores for note in (*one.earlier_notes, *one.notes)]
    about = [f"- {name}: `{value}`" for name, value in facts.items()]
    return "\n".join([overview(scores).markdown(), "", *notes, "", score_table(scores).markdown(), "", *about])


def _baseline(pair: Mapping[bool, Metric], baselines: Mapping[str, float]) -> str:
    first = next(iter(pair.values()))
    keys = [replace(first, probe=which).key for which in (HEAD, PROBE)]
    return ", ".join(f"{baselines[key]:.3f}" for key in keys if key in baselines)


def _change(metric: Metric | None, changes: Mapping[str, float]) -> str:
    key = f"{metric.key}_delta_start" if metric else ""
    if key not in changes:
        return ""
    return f"{changes[key]:+.3f} ({changes[f'{key}_ci_low']:+.3f}, {changes[f'{key}_ci_high']:+.3f})"


def _verdict(scores: Scores, pair: Mapping[bool, Metric], changes: Mapping[str, float]) -> str:
    target = next(iter(pair.values())).target
    words = [one.short for one in scores.verdicts if one.target in ("", target)]
    if HEAD not in pair:
        words = words or ["no score of the head"]
    return "; ".join([*(words or ["learns"]), *_since_start(pair, changes)])


def _since_start(pair: Mapping[bool, Metric], changes: Mapping[str, float]) -> list[str]:
    """Whose change is beyond chance, and in which direction."""
    found: dict[str, list[str]] = {}
    compared = {which: f"{one.key}_delta_start" for which, one in pair.items() if f"{one.key}_delta_start" in changes}
    for which, key in compared.items():
        low, high = changes[f"{key}_ci_low"], changes[f"{key}_ci_high"]
        if low <= 0 <= high:
            continue
        improved = (high < 0) == pair[which].lower_is_better
        found.setdefault("improved" if improved else "worse", []).append("probe" if which else "head")
    if compared and not found:
        return [SAME]
    return [f"{word} ({', '.join(who)})" for word, who in found.items()]
