"""What a reader looks at first: for each target its score, its interval, what it has changed by, a verdict."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.report.tables import (
    INTERVAL,
    Table,
    append,
    interval_text,
    number,
    pairs_of,
    score_table,
    score_text,
    score_title,
)
from pipeline.statistics.metrics import Since, metric_name

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.score import Scores
    from pipeline.statistics.metrics import Metric

HEAD, PROBE = False, True
IMPROVED, WORSE, TIED = "improved", "worse", "not told apart"
NAMED = 2  # most scores in the name of a run


class Reading(NamedTuple):
    """A metric at a step of a training, with the ends of its interval; without a value where it was not measured."""

    step: int
    value: float | None = None
    low: float | None = None
    high: float | None = None


Curve = Sequence[Reading]


@dataclass(frozen=True)
class Changes:
    """What metrics have changed by since a training began.

    Attributes:
        values: by the names that they are logged under; see `Change.named`.
        since: which of them.
        start: where the training began, in words.
        curves: in a training by metric, each measurement so far, with this one and with those that failed.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    since: Since = "start"
    start: str = "the start"
    curves: Mapping[str, Curve] = field(default_factory=dict)

    def of(self, metric: Metric | None, since: Since | None = None) -> tuple[float, float, float] | None:
        """The change and the ends of its interval; None where there is none. By default since the training began."""
        key = f"{metric.key}_delta_{since or self.since}" if metric else ""
        if key not in self.values:
            return None
        return self.values[key], self.values[f"{key}_ci_low"], self.values[f"{key}_ci_high"]

    def text(self, metric: Metric | None, since: Since | None = None) -> str:
        """`+0.125 (+0.050, +0.200)`; empty where there is no change."""
        found = self.of(metric, since)
        return "{:+.3f} ({:+.3f}, {:+.3f})".format(*found) if found else ""

    def verdict(self, pair: Mapping[bool, Metric]) -> list[str]:
        """Whose change is beyond chance, and in which direction."""
        found: dict[str, list[str]] = {}
        compared = {which: self.direction(metric) for which, metric in pair.items()}
        for which, word in compared.items():
            if word in (IMPROVED, WORSE):
                found.setdefault(word, []).append("probe" if which else "head")
        if TIED in compared.values() and not found:
            return [f"{TIED} from {self.start}"]
        return [f"{word} ({', '.join(who)})" for word, who in found.items()]

    def direction(self, metric: Metric, since: Since | None = None) -> str:
        """`improved`, `worse`, or `not told apart` where the interval holds 0; empty where there is no change."""
        found = self.of(metric, since)
        if found is None:
            return ""
        _, low, high = found
        if low <= 0 <= high:
            return TIED
        return IMPROVED if (high < 0) == metric.lower_is_better else WORSE


@dataclass(frozen=True)
class Headline:
    """The main metric of a target.

    Attributes:
        scores: of its task.
        pair: the head's metric (`HEAD`), and the probe's beside it (`PROBE`), as far as there are.
        changes: what they have changed by.
    """

    scores: Scores
    pair: Mapping[bool, Metric]
    changes: Changes

    @property
    def main(self) -> Metric:
        """The head's; the probe's where the head has none."""
        return next(iter(self.pair.values()))

    @property
    def baseline(self) -> str:
        """What the baseline reaches, `0.703 / 0.580` of head and probe; a dash for the one that it does not have."""
        found = [self.baseline_of(which) for which in (HEAD, PROBE) if which in self.pair or not which]
        known = any(value is not None for value in found)
        return " / ".join("-" if value is None else f"{value:z.3f}" for value in found) if known else ""

    def baseline_of(self, which: bool) -> float | None:
        """What the baseline reaches by the head, or by the probe, also where the checkpoint's is not defined."""
        return self.scores.baselines.get(replace(self.main, probe=which).key)

    @property
    def judgements(self) -> list[tuple[str, str]]:
        """What is wrong with the head, or that it learns; what has changed beyond chance. With each `good` or `bad`."""
        words = [one.short for one in self.scores.verdicts if one.target in ("", self.main.target)]
        words = words or ([] if HEAD in self.pair else ["no score of the head"])
        found = [(word, "bad") for word in words] or [("learns", "good")]
        tones = {IMPROVED: "good", WORSE: "bad"}
        return found + [(text, tones.get(text.split()[0], "")) for text in self.changes.verdict(self.pair)]

    @property
    def verdict(self) -> str:
        """The judgements in a line."""
        return "; ".join(text for text, _ in self.judgements)

    @property
    def markdown(self) -> str:
        """Score, interval, change and verdict, in a line."""
        interval = f" ({INTERVAL}: {interval_text(self.main)})" if self.main.interval else ""
        change = self.changes.text(self.main)
        since = f", {change} since {self.changes.start}" if change else ""
        return f"- `{self.main.key}`: **{score_text(self.main)}**{interval}{since}: {self.verdict}"


def headlines(scores: Sequence[Scores], changes: Changes = Changes()) -> list[Headline]:
    """Those of every target, in order."""
    found = [(one, pairs_of(metric for metric in one.results if metric.is_headline)) for one in scores]
    return [Headline(one, pair, changes) for one, pairs in found for pair in pairs.values()]


def overview(scores: Sequence[Scores], changes: Changes = Changes(), title: str = "Scores on the test set") -> Table:
    """The headline metric of each target, of the head and of the probe.

    Args:
        scores: of each task.
        changes: what the metrics have changed by since the training began.
        title: of the table, on the terminal.

    Returns:
        Columns that would be empty are left out. The verdict says what is
        wrong with the head, or that it learns; where there is a start, whose change leaves 0 out of its 95 % interval.
    """
    every = headlines(scores, changes)
    columns, rows = ["metric"], [[one.main.beside.key] for one in every]
    for name, which in (("score", HEAD), ("probe", PROBE)):
        found = [one.pair.get(which) for one in every]
        if any(found):
            append(columns, rows, score_title(name, found), [score_text(one) if one else "" for one in found])
            append(columns, rows, INTERVAL, [interval_text(one) for one in found])
            append(columns, rows, f"{name} since {changes.start}", [changes.text(one) for one in found])
    both = ": head/probe" if any(PROBE in one.pair for one in every) else ""
    append(columns, rows, f"baseline{both}", [one.baseline for one in every])
    append(columns, rows, "constant guess", [number(one.main.constant) for one in every])
    append(columns, rows, "verdict", [one.verdict for one in every])
    left = frozenset({0, len(columns) - 1})
    return Table(columns, rows, left, title)


def overview_frame(scores: Sequence[Scores], changes: Changes = Changes()) -> pd.DataFrame:
    """The overview as numbers: a row per target.

    Returns:
        Columns `task`, `metric`, `score`, `ci_low`, `ci_high` (the ends of its 95 % interval), the same of the probe
        (`probe`, ...), `baseline` (what the baseline reaches by the head), `probe_baseline` (and by the probe),
        `constant` (a constant guess) and `verdict`. What is not defined is NaN.
    """
    import pandas as pd

    rows = []
    for one in headlines(scores, changes):
        row: dict[str, Any] = {"task": one.scores.task_name, "metric": one.main.beside.short}
        for prefix, which in (("", HEAD), ("probe_", PROBE)):
            metric = one.pair.get(which)
            row["probe" if which else "score"] = metric.value if metric else math.nan
            ends = (metric.interval.low, metric.interval.high) if metric and metric.interval else (math.nan, math.nan)
            row |= dict(zip((f"{prefix}ci_low", f"{prefix}ci_high"), ends, strict=True))
        levels = {"baseline": one.baseline_of(HEAD), "probe_baseline": one.baseline_of(PROBE)}
        levels["constant"] = one.main.constant
        row |= {name: math.nan if value is None else value for name, value in levels.items()}
        rows.append(row | {"verdict": one.verdict})
    return pd.DataFrame(rows)


def change_table(scores: Scores, changes: Changes) -> Table:
    """A row per comparison of a main metric with another checkpoint, on the same test sequences."""
    others: dict[Since, str] = {changes.since: changes.start, "best": "the best before"}
    rows = []
    for metric in (metric for metric in scores.results if metric.is_headline):
        for since, words in others.items():
            if found := changes.of(metric, since):
                value, low, high = (f"{one:+.3f}" for one in found)
                rows.append((metric.key, words, value, f"{low}, {high}", changes.direction(metric, since)))
    return Table(("metric", "against", "change", INTERVAL, "verdict"), rows, frozenset({0, 1, 4}))


def summary(facts: Mapping[str, str], scores: Sequence[Scores], changes: Changes = Changes()) -> str:
    """A run's description: a line per target, as MLflow shows the first lines alone; warnings; every metric; facts."""
    notes = [f"- {one.task_name}: {note}" for one in scores for note in (*one.earlier_notes, *one.notes)]
    about = [f"- {name}: `{value}`" for name, value in facts.items()]
    first = first_lines(scores, changes)
    return "\n".join([first, "", *notes, *([""] if notes else []), score_table(scores).markdown(), "", *about])


def run_name(label: str, scores: Sequence[Scores]) -> str:
    """What a measurement is called: `step=600: fitness 0.599 ± 0.012, stability 0.480`, of two targets at most.

    A single task is called by its target. Lists show the first 20 characters or so: what differs stands first.
    """
    parts = []
    for one in headlines(scores):
        several = len(one.scores.examples.targets) > 1
        task, target = one.main.task, one.main.target
        name = f"{task} {target}".strip() if several else task or target
        noise = "" if one.main.seed_std is None else f" ± {one.main.seed_std:.3f}"
        parts.append(f"{name} {one.main.value:.3f}{noise}")
    more = [f"and {len(parts) - NAMED} more"] if len(parts) > NAMED else []
    return f"{label}: {', '.join([*parts[:NAMED], *more])}" if parts else label


def verdicts_of(scores: Sequence[Scores], changes: Changes = Changes()) -> dict[str, str]:
    """By task what is said of it: `learns; improved (probe)`. Of several targets each is named, as in its metrics."""
    found = {}
    for one in scores:
        said = {line.main.target: line.verdict for line in headlines([one], changes)}
        named = [f"{metric_name(target)}: {verdict}" for target, verdict in said.items()]
        found[one.task_name] = ", ".join(named if len(said) > 1 else said.values())
    return {name: text for name, text in found.items() if text}


def verdict_of_target(text: str, target: str) -> str:
    """The part of a target, where what is said of a task names several; else all of it.

    >>> verdict_of_target("a: learns; improved (head, probe), b: still learning", "b")
    'still learning'
    """
    parts: list[tuple[str, str]] = re.findall(r"(?:^|, )([\w .-]+): (.*?)(?=, [\w .-]+: |$)", text)
    return dict(parts).get(metric_name(target), text)


def first_lines(scores: Sequence[Scores], changes: Changes = Changes()) -> str:
    """The first lines of a run's description, in Markdown."""
    return "\n".join(one.markdown for one in headlines(scores, changes))
