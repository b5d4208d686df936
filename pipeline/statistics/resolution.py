"""The smallest difference between checkpoints that a metric can see, beside its change over a training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from pipeline.statistics.metrics import Interval, Metric, metric_name

MEASUREMENTS = 3  # the fewest from which anything is said
Points = Sequence[tuple[int, Mapping[str, float]]]


@dataclass(frozen=True)
class Resolution:
    """What a metric can see in a training.

    Attributes:
        metric: which one, with its latest value.
        seeds: standard deviation over head seeds of a difference between two measurements; 0 for a probe.
        sampling: standard error of such a difference over draws of the test sequences, paired.
        slope: of the straight line through all measurements, for each 1,000 steps; positive where the metric improves.
        change: what that line changes by from the first measurement to the last; positive where the metric improves.
        measured: at how many of the training's measurements it is known.
        steps: the first and the last of these.
    """

    metric: Metric
    seeds: float
    sampling: float
    slope: float
    change: float
    measured: int = 0
    steps: tuple[int, int] = (0, 0)

    @property
    def smallest(self) -> float:
        """The smallest difference that it can see: two standard deviations of a difference.

        >>> Resolution(Metric("", "x", "mcc"), 0.03, 0.04, 0.0, 0.0).smallest
        0.1
        """
        return 2 * math.hypot(self.seeds, self.sampling)

    @property
    def ratio(self) -> float:
        """How many such differences it has changed by over the training; negative where it has become worse."""
        return self.change / self.smallest if self.smallest else 0.0


def resolutions(points: Points, num_seeds: Mapping[str, int]) -> list[Resolution]:
    """The resolution of every metric that has changes with intervals; none before the third measurement.

    Args:
        points: the step and the metrics of each measurement; intervals of changes are those since the start.
        num_seeds: by the task that names of metrics begin with, how many heads a score is the mean of.
    """
    if len(points) < MEASUREMENTS:
        return []
    ends = "_delta_start_ci_low"
    every = dict.fromkeys(key for _, numbers in reversed(points) for key in numbers if key.endswith(ends))
    heads = {metric_name(task): count for task, count in num_seeds.items()}
    found = []
    for key in (key.removesuffix(ends) for key in every):
        measured = [(step, numbers) for step, numbers in points if key in numbers]
        metric = Metric.parse(key, measured[-1][1][key])
        if metric is not None and len(measured) >= MEASUREMENTS:
            found.append(_resolution(metric, key, measured, heads.get(metric.task, 1)))
    return found


def _resolution(metric: Metric, key: str, measured: Points, heads: int) -> Resolution:
    """Of variances the mean over the measurements: each alone is from a few seeds."""
    one = fmean(numbers.get(f"{key}_seed_std", 0.0) ** 2 for _, numbers in measured) / heads
    low, high = f"{key}_delta_start_ci_low", f"{key}_delta_start_ci_high"
    errors = [Interval(numbers[low], numbers[high]).error for _, numbers in measured if low in numbers]
    steps, values = [step for step, _ in measured], [numbers[key] for _, numbers in measured]
    slope = _slope(steps, values) * (-1 if metric.lower_is_better else 1)
    sampling = fmean(error**2 for error in errors) ** 0.5
    change = slope * (steps[-1] - steps[0])
    return Resolution(metric, (2 * one) ** 0.5, sampling, 1000 * slope, change, len(measured), (steps[0], steps[-1]))


def _slope(steps: Sequence[int], values: Sequence[float]) -> float:
    """Of the least-squares line."""
    middle, mean = sum(steps) / len(steps), sum(values) / len(values)
    squares = sum((step - middle) ** 2 for step in steps)
    products = sum((step - middle) * (value - mean) for step, value in zip(steps, values, strict=True))
    return products / squares if squares else 0.0


def to_monitor(found: Sequence[Resolution]) -> list[Resolution]:
    """For each target the one of head and probe that has changed most, in either direction, for what it can see."""
    best: dict[str, Resolution] = {}
    for one in found:
        known = best.get(one.metric.beside.key)
        if known is None or abs(one.ratio) > abs(known.ratio):
            best[one.metric.beside.key] = one
    return list(best.values())


def advice(found: Sequence[Resolution]) -> list[str]:
    """A sentence for each target: what to monitor, or that checkpoints cannot be told apart, and what would help."""
    return [_advice(one, found) for one in to_monitor(found)]


def _advice(one: Resolution, found: Sequence[Resolution]) -> str:
    key, noise = one.metric.key, f"checkpoints that differ by less than {one.smallest:.3f} look alike to it"
    when = f"on a straight line from step {one.steps[0]} to {one.steps[1]}"
    pair = [each for each in found if each.metric.beside.key == one.metric.beside.key]
    if one.ratio >= 1:
        return f"monitor {key}: it improved by {one.change:.3f} {when}, and {noise}"
    if one.ratio <= -1:
        probes = [each.metric.key for each in pair if each.metric.probe and not one.metric.probe and each.ratio > -1]
        doubt = "".join(f"; {probe} is not: it may be the head that learns less, see its verdict" for probe in probes)
        return f"{key} is getting worse, beyond noise: by {-one.change:.3f} {when}, and {noise}{doubt}"
    remedies = []
    if one.sampling >= one.seeds:
        remedies.append("more test rows")
    if not one.metric.probe and one.seeds > 0.5 * one.sampling:
        remedies.append("more seeds (num_seeds)")
    if not any(each.metric.probe for each in pair):
        remedies.append("the probe")
    remedies.append("averaging checkpoints")
    others = "".join(f", nor can {each.metric.key}" for each in pair if each is not one)
    seen = f"it changed by {one.change:+.3f} {when}, and {noise}"
    return f"{key} cannot tell these checkpoints apart{others}: {seen}; what would help: {', '.join(remedies)}"
