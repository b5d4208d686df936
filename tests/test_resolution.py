"""The smallest difference that a metric can see: by hand, and how often such a difference is told apart."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean, stdev

import numpy as np
import pytest

from pipeline.report.resolution_table import resolution_text
from pipeline.statistics.intervals import changes
from pipeline.statistics.metrics import NORMAL
from pipeline.statistics.predictions import Predictions
from pipeline.statistics.resolution import Resolution, advice, resolutions, to_monitor

KEY = "test_x_accuracy"
PROBE = "test_x_probe_accuracy"
N, HEADS = 400, 3


def point(key: str, value: float, error: float | None = None, seed_std: float | None = None) -> dict[str, float]:
    """A measurement as it is logged; `error` is the standard error of the change since the start."""
    found = {key: value} | ({} if seed_std is None else {f"{key}_seed_std": seed_std})
    if error is None:
        return found
    return found | {f"{key}_delta_start_ci_low": -NORMAL * error, f"{key}_delta_start_ci_high": NORMAL * error}


def curve(key: str, values: list[float], error: float, seed_std: float | None = None) -> list[dict[str, float]]:
    return [point(key, value, error if place else None, seed_std) for place, value in enumerate(values)]


def test_by_hand() -> None:
    """Variance of a difference over seeds 2 * 0.03 ** 2 / 2, of the sampling 0.04 ** 2: 2 * sqrt(0.0009 + 0.0016)."""
    points = list(enumerate(curve(KEY, [0.5, 0.6, 0.7], error=0.04, seed_std=0.03)))
    (one,) = resolutions([(1000 * step, numbers) for step, numbers in points], {"": 2})
    assert one.metric.key == KEY
    assert one.seeds == pytest.approx(0.03)
    assert one.sampling == pytest.approx(0.04)
    assert one.smallest == pytest.approx(0.1)
    assert one.slope == pytest.approx(0.1)
    assert one.change == pytest.approx(0.2)
    assert one.ratio == pytest.approx(2)


def test_nothing_is_said_before_the_third_measurement() -> None:
    points = list(enumerate(curve(KEY, [0.5, 0.6], error=0.04)))
    assert resolutions(points, {"": 3}) == []
    assert resolution_text(points, {"": 3}) == ""


def test_an_error_that_falls_is_an_improvement() -> None:
    points = list(enumerate(curve("a task/test_x_mse", [3.0, 2.0, 1.0], error=0.5)))
    (one,) = resolutions(points, {"a task": 3})
    assert [one.change, one.ratio] == pytest.approx([2, 2])


def both(values: list[float], of_probe: list[float], seed_std: float = 0.0) -> list[Resolution]:
    head, probe = curve(KEY, values, 0.01, seed_std), curve(PROBE, of_probe, 0.01)
    return resolutions(
        [(step, one | other) for step, (one, other) in enumerate(zip(head, probe, strict=True))], {"": 1}
    )


def test_the_metric_to_monitor_is_the_one_that_changes_most_for_what_it_can_see() -> None:
    """The head changes more, and its seeds differ by more than that."""
    (chosen,) = to_monitor(both([0.5, 0.6, 0.7], [0.5, 0.55, 0.6], seed_std=0.2))
    assert chosen.metric.key == PROBE
    (said,) = advice(both([0.5, 0.6, 0.7], [0.5, 0.55, 0.6], seed_std=0.2))
    alike = "checkpoints that differ by less than 0.020 look alike to it"
    assert said.startswith(f"monitor {PROBE}: it improved by 0.100 on a straight line from step 0 to 2, and {alike}")


def test_what_would_help_where_checkpoints_cannot_be_told_apart() -> None:
    (few_rows,) = advice(resolutions(list(enumerate(curve(PROBE, [0.5, 0.51, 0.5], 0.1))), {}))
    assert "cannot tell these checkpoints apart" in few_rows
    assert few_rows.endswith("what would help: more test rows, averaging checkpoints")
    (noisy,) = advice(resolutions(list(enumerate(curve(KEY, [0.5, 0.51, 0.5], 0.01, seed_std=0.1))), {"": 1}))
    assert noisy.endswith("what would help: more seeds (num_seeds), the probe, averaging checkpoints")


def test_a_metric_that_gets_worse_is_not_one_to_monitor() -> None:
    falling = both([0.7, 0.6, 0.5], [0.6, 0.55, 0.5])
    (said,) = advice(falling)
    alike = "checkpoints that differ by less than 0.020 look alike to it"
    assert said == f"{KEY} is getting worse, beyond noise: by 0.200 on a straight line from step 0 to 2, and {alike}"
    head, probe = curve(KEY, [0.7, 0.6, 0.5], 0.01), curve(PROBE, [0.6, 0.55, 0.5], 0.01)
    points = [(step, one | other) for step, (one, other) in enumerate(zip(head, probe, strict=True))]
    assert resolution_text(points, {}).splitlines()[2].endswith("| -10.0 | getting worse |")


def test_a_head_that_gets_worse_where_its_probe_does_not_is_doubted() -> None:
    (said,) = advice(both([0.7, 0.6, 0.5], [0.5, 0.501, 0.5]))
    doubt = f"; {PROBE} is not: it may be the head that learns less, see its verdict"
    assert said.startswith(f"{KEY} is getting worse")
    assert said.endswith(doubt)
    assert "it may be" not in advice(both([0.7, 0.6, 0.5], [0.6, 0.55, 0.5]))[0]


def test_numbers_are_of_the_metric_that_is_named() -> None:
    (said,) = advice(both([0.5, 0.5, 0.5], [0.5, 0.505, 0.51], seed_std=0.2))
    assert said.startswith(
        f"{PROBE} cannot tell these checkpoints apart, nor can {KEY}: it changed by +0.010 on a straight line from step"
    )


def test_the_table_has_a_row_per_metric_and_says_which_to_monitor() -> None:
    head, probe = curve(KEY, [0.5, 0.6, 0.7], 0.2), curve(PROBE, [0.5, 0.55, 0.6], 0.01)
    points = [(1000 * step, one | other) for step, (one, other) in enumerate(zip(head, probe, strict=True))]
    lines = resolution_text(points, {"": 3}).splitlines()
    heading = "metric | smallest visible difference | gain per 1,000 steps | gain, step 0 to 2000 | ratio | monitor"
    assert lines[0] == f"| {heading} |"
    assert "1,000" not in resolution_text([(step // 3, numbers) for step, numbers in points], {})
    assert lines[2] == f"| {KEY} | 0.4000 | +0.1000 | +0.2000 | +0.5 |  |"
    assert lines[3] == f"| {PROBE} | 0.0200 | +0.0500 | +0.1000 | +5.0 | this one |"


def test_a_measurement_that_failed_is_counted() -> None:
    """Also where it is the last one."""
    points = list(enumerate(curve(KEY, [0.5, 0.6, 0.7], 0.2)))
    lacking = [*points, (3, curve(PROBE, [0.5, 0.6], 0.2)[1]), (4, dict[str, float]())]
    (one,) = resolutions(points, {})
    assert [replace(found, measured=3) for found in resolutions(lacking, {})] == [one]
    lines = resolution_text(lacking, {}).splitlines()
    assert lines[0].startswith("| metric | known at measurements | smallest visible difference |")
    assert lines[0].endswith("| gain over them | ratio |")
    assert lines[2].startswith(f"| {KEY} | 3 of 5, step 0 to 2 | ")
    assert "known at" not in resolution_text(points, {})


def test_on_a_terminal_it_is_no_markdown() -> None:
    text = resolution_text(list(enumerate(curve(KEY, [0.5, 0.6, 0.7], 0.2))), {}, markdown=False)
    assert "│ test_x_accuracy │" in text
    assert "---" not in text
    assert text.count("cannot tell these checkpoints apart") == 1


def checkpoint(rng: np.random.Generator, share: float, spread: float) -> tuple[Predictions, list[float]]:
    """Heads that are right on a share of the sequences that differs from head to head, the easy ones first."""
    difficulty, shares = rng.random(N), share + spread * rng.standard_normal(HEADS)
    right = [difficulty < one for one in shares]
    outputs = [np.stack([~each, each], 1).astype(np.float64) for each in right]
    ones = np.ones(N, np.int64)
    made = Predictions(ones, outputs[0], ones, ("a", "b"), further=tuple(outputs[1:]))
    return made, [float(each.mean()) for each in right]


def test_of_two_checkpoints_that_differ_by_the_resolution_half_are_told_apart() -> None:
    """A difference of 2 standard deviations is beyond 1.96 of them with probability 0.516."""
    rng, spread = np.random.default_rng(3), 0.03
    truth = 2 * (2 * 0.25 / N + 2 * spread**2 / HEADS) ** 0.5
    smallest, told = [], []
    for _ in range(400):
        found = [checkpoint(rng, share, spread) for share in (0.5, 0.5 + truth, 0.5 + truth)]
        points = []
        for step, (predictions, values) in enumerate(found):
            numbers = {KEY: fmean(values), f"{KEY}_seed_std": stdev(values)}
            if step:
                numbers |= changes(predictions, found[0][0]).values["accuracy"].named(KEY, "start")
            points.append((step, numbers))
        (one,) = resolutions(points, {"": HEADS})
        smallest.append(one.smallest)
        told.append(abs(points[1][1][KEY] - points[0][1][KEY]) > NORMAL * one.smallest / 2)
    assert np.mean(smallest) == pytest.approx(truth, rel=0.05)
    assert 0.44 < np.mean(told) < 0.59
