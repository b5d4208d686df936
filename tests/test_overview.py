"""What a reader sees first: a line per target, with what it has changed by and a verdict in words."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from pipeline.heads.verdict import Verdict
from pipeline.report.overview import Changes, change_table, first_lines, headlines, overview
from pipeline.report.tables import FOOTNOTE, score_table
from pipeline.statistics.metrics import LOSS, Change, Interval, Metric

RESULTS = (
    Metric("t", "", LOSS, 2.0),
    Metric("t", "x", "mse", 1.5, 2.0),
    Metric("t", "x", "spearman", 0.5, interval=Interval(0.25, 0.625), seed_std=0.0625),
    Metric("t", "y", "spearman", 0.125),
    Metric("t", "x", "spearman", 0.75, interval=Interval(0.5, 0.875), probe=True),
)


def scores(*verdicts: Verdict, results: tuple[Metric, ...] = RESULTS, baselines: dict[str, float] | None = None) -> Any:
    return SimpleNamespace(results=results, verdicts=verdicts, baselines=baselines or {})


def change(low: float, high: float, key: str = "t/test_x_spearman") -> dict[str, float]:
    return Change((low + high) / 2, Interval(low, high), 0.5).named(key, "start")


def test_a_line_per_target_with_the_probe_beside_the_head() -> None:
    baselines = {"t/test_x_spearman": 0.25, "t/test_x_probe_spearman": 0.375}
    table = overview([scores(Verdict("y", "no better than a guess", "in full"), baselines=baselines)])
    assert list(table.columns) == [
        "metric",
        "score ± seeds",
        "95 %",
        "probe",
        "95 %",
        "baseline: head/probe",
        "verdict",
    ]
    assert table.rows == [
        [
            "t/test_x_spearman",
            "0.5000 ± 0.0625",
            "0.250, 0.625",
            "0.7500",
            "0.500, 0.875",
            "0.250 / 0.375",
            "learns",
        ],
        ["t/test_y_spearman", "0.1250", "", "", "", "", "no better than a guess"],
    ]


def test_a_classification_has_its_constant_guess() -> None:
    results = (Metric("", "c", "accuracy", 0.75, 0.5), Metric("", "c", "mcc", 0.25))
    table = overview([scores(Verdict("", "over-fitted", "in full"), results=results)])
    assert list(table.columns) == ["metric", "score", "constant guess", "verdict"]
    assert table.rows == [["test_c_accuracy", "0.7500", "0.5000", "over-fitted"]]


def test_whose_change_is_beyond_chance() -> None:
    head, probe = "t/test_x_spearman", "t/test_x_probe_spearman"
    cases = {
        "learns; improved (head, probe)": change(0.25, 0.5) | change(0.125, 0.25, probe),
        "learns; worse (head); improved (probe)": change(-0.5, -0.25) | change(0.125, 0.25, probe),
        "learns; not told apart from step 0": change(-0.25, 0.5) | change(0.0, 0.25, probe),
        "learns; worse (probe)": change(-0.25, 0.5) | change(-0.25, -0.125, probe),
        "learns": {},
    }
    for verdict, changes in cases.items():
        first = overview([scores()], Changes(changes, "start", "step 0")).rows[0]
        assert first[-1] == verdict
    table = overview([scores()], Changes(change(-0.5, -0.25, head), "start", "step 0"))
    assert list(table.columns)[:4] == ["metric", "score ± seeds", "95 %", "score since step 0"]
    assert table.rows[0][3] == "-0.375 (-0.500, -0.250)"


def test_a_score_that_hangs_on_its_seeds_is_marked() -> None:
    """The interval is 0.1 wide to a side."""
    for deviation, mark in ((0.09, ""), (0.11, " †")):
        sure = Metric("", "x", "accuracy", 0.5, interval=Interval(0.4, 0.6), seed_std=deviation)
        of_task = scores(results=(sure, replace(sure, name="mcc", seed_std=None)))
        table = overview([of_task])
        assert table.rows[0][1] == f"0.5000 ± {deviation:.4f}{mark}"
        assert first_lines([of_task]).startswith(f"- `test_x_accuracy`: **0.5000 ± {deviation:.4f}{mark}** (")
        for text in (table.text(), table.markdown(), score_table([of_task]).markdown()):
            assert text.count(FOOTNOTE) == len(mark) // 2


def test_a_head_without_a_score() -> None:
    table = overview([scores(results=(RESULTS[-1],))])
    assert table.rows == [["t/test_x_spearman", "0.7500", "0.500, 0.875", "no score of the head"]]


def test_the_first_lines_of_a_description() -> None:
    changes = Changes(change(-0.5, -0.25), "start", "step 0")
    assert first_lines([scores(Verdict("y", "no better than a guess", "in full"))], changes).splitlines() == [
        "- `t/test_x_spearman`: **0.5000 ± 0.0625** (95 %: 0.250, 0.625), -0.375 (-0.500, -0.250) since step 0: "
        "learns; worse (head)",
        "- `t/test_y_spearman`: **0.1250**: no better than a guess",
    ]


def test_each_judgement_is_good_or_bad_or_neither() -> None:
    changes = change(-0.5, -0.25) | change(0.125, 0.25, "t/test_x_probe_spearman")
    first, second = headlines([scores(Verdict("y", "over-fitted", "in full"))], Changes(changes))
    assert first.judgements == [("learns", "good"), ("worse (head)", "bad"), ("improved (probe)", "good")]
    assert second.judgements == [("over-fitted", "bad")]
    (tied, _) = headlines([scores()], Changes(change(-0.5, 0.25)))
    assert tied.judgements == [("learns", "good"), ("not told apart from the start", "")]


def test_changes_since_the_start_and_since_the_best() -> None:
    best = Change(-0.125, Interval(-0.25, 0.0), 0.5).named("t/test_x_spearman", "best")
    table = change_table(scores(), Changes(change(0.25, 0.5) | best, "start", "step 0"))
    assert table.rows == [
        ("t/test_x_spearman", "step 0", "+0.375", "+0.250, +0.500", "improved"),
        ("t/test_x_spearman", "the best before", "-0.125", "-0.250, +0.000", "not told apart"),
    ]
    assert change_table(scores(), Changes()).rows == []
