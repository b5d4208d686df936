"""A metric as a value: of which task and target it is, its name, and whether higher is better.

The only place where the names under which metrics are logged are made and parsed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Literal, get_args

LOSS = "dwnstr_task_val_loss"  # the test loss of a task, over all its targets
OF_KIND = {
    "classification": ("accuracy", "balanced_accuracy", "macro_f1", "mcc", "auroc", "average_precision"),
    "regression": ("mse", "rmse", "mae", "r2", "pearson", "spearman"),
}
# Of token-level tasks: the mean over the test sequences with two labels or more of the metric within each.
PER_SEQUENCE = {"classification": "per_sequence_accuracy", "regression": "per_sequence_spearman"}
HEADLINE = {"classification": "accuracy", "regression": "spearman"}  # to show where there is room for one
LOWER_IS_BETTER = (LOSS, "mse", "rmse", "mae")
HAVE_CONSTANT = (
    "accuracy",
    "balanced_accuracy",
    "macro_f1",
    "average_precision",
    "per_sequence_accuracy",
    "mse",
    "rmse",
    "mae",
)  # a constant guess says something of these
PROBE = "_probe"  # stands between a target and a metric of the probe's
Since = Literal["start", "best", "random_init"]  # the first or the best measurement of a training; untrained weights
EVERY = (*(name for names in OF_KIND.values() for name in names), *PER_SEQUENCE.values())
BASELINE = "_baseline"  # between a target, and the probe if it is of a probe, and a metric of a baseline's
NORMAL = 1.959964  # the half width of a 95 % interval, in standard errors
P_IMPROVED = (
    "p_improved is 1 less the one-sided p-value of a paired t test of no improvement, 0.5 for no change: how far the"
    " change is outside of what chance makes. It is not the probability that the later checkpoint is better"
)
_KEY = re.compile(f"test_(.+?)({BASELINE})?({PROBE})?_({'|'.join(EVERY)})")
_CHANGE = re.compile(f"(_p_improved|_delta_({'|'.join(get_args(Since))})(_ci_(low|high))?)$")
_END = re.compile("(_seed_std|_ci_(low|high))$")


@dataclass(frozen=True)
class Interval:
    """Where 95 % of such intervals hold what a metric would be on all sequences that the test set is drawn from."""

    low: float
    high: float

    @property
    def error(self) -> float:
        """The standard error that an interval of this width has."""
        return (self.high - self.low) / 2 / NORMAL

    def named(self, key: str) -> dict[str, float]:
        """The two ends under the names that they are logged under.

        >>> Interval(0.5, 0.75).named("test_fitness_spearman")
        {'test_fitness_spearman_ci_low': 0.5, 'test_fitness_spearman_ci_high': 0.75}
        """
        return {f"{key}_ci_low": self.low, f"{key}_ci_high": self.high}


@dataclass(frozen=True)
class Metric:
    """A number on the test set.

    Attributes:
        task: the task's name; empty where the tasks are no list, and names carry no prefix.
        target: the column of the labels; empty for the loss, which is of all targets.
        name: `LOSS`, or a name in `EVERY`.
        value: the number; NaN where it is not measured yet.
        constant: what the best constant guess from the train labels reaches; None where that says nothing.
        interval: of `value`, 95 %; None where there is none.
        seed_std: standard deviation over the seeds of the head, of which `value` is the mean; None for a single one.
        probe: whether it is of the probe, not of the head.
        baseline: whether it is of a baseline's embeddings, not of the checkpoint's.
    """

    task: str
    target: str
    name: str
    value: float = math.nan
    constant: float | None = None
    interval: Interval | None = None
    probe: bool = False
    seed_std: float | None = None
    baseline: bool = False

    @classmethod
    def parse(cls, key: str, value: float = math.nan) -> Metric | None:
        """The metric that is logged as `key`; None where that is no downstream metric.

        >>> found = Metric.parse("structure/test_3state_probe_macro_f1")
        >>> (found.task, found.target, found.name, found.probe)
        ('structure', '3state', 'macro_f1', True)
        """
        task, _, last = key.rpartition("/")
        if last == LOSS:
            return cls(task, "", LOSS, value)
        parts = _KEY.fullmatch(last)
        return cls(task, parts[1], parts[4], value, probe=bool(parts[3]), baseline=bool(parts[2])) if parts else None

    @classmethod
    def logged(cls, key: str, numbers: Mapping[str, float]) -> Metric | None:
        """The metric `key` among numbers that were logged, with its interval and its deviation over seeds.

        >>> found = Metric.logged("test_x_mcc", {"test_x_mcc": 0.5, "test_x_mcc_ci_low": 0.25, "test_x_mcc_ci_high": 1})
        >>> (found.value, found.interval, found.seed_std)
        (0.5, Interval(low=0.25, high=1), None)
        """
        found = cls.parse(key, numbers[key])
        if found is None:
            return None
        ends = [numbers[end] for end in (f"{key}_ci_low", f"{key}_ci_high") if end in numbers]
        return replace(found, interval=Interval(*ends) if ends else None, seed_std=numbers.get(f"{key}_seed_std"))

    @property
    def hangs_on_seeds(self) -> bool:
        """Whether its heads differ by more than the interval is wide to a side: it does not say how sure the score is.

        >>> [Metric("", "x", "mcc", 0.5, None, Interval(0.4, 0.6), seed_std=std).hangs_on_seeds for std in (0.09, 0.11)]
        [False, True]
        """
        if self.seed_std is None or self.interval is None:
            return False
        return self.seed_std > (self.interval.high - self.interval.low) / 2

    @property
    def short(self) -> str:
        """The name under which it is logged, without the task's."""
        of = (BASELINE if self.baseline else "") + (PROBE if self.probe else "")
        return LOSS if self.name == LOSS else f"test_{metric_name(self.target)}{of}_{self.name}"

    @property
    def key(self) -> str:
        """The name under which it is logged: `<task>/test_<target>_<name>`, with `_probe` behind a probe's target.

        >>> Metric("my task", "log P (octanol)", "mse").key
        'my task/test_log P _octanol__mse'
        """
        return f"{metric_name(self.task)}/{self.short}" if self.task else self.short

    @property
    def stem(self) -> str:
        """What the names of all metrics of its target, and of its head or probe, begin with."""
        return self.key if self.name == LOSS else self.key.removesuffix(self.name)

    @property
    def named(self) -> dict[str, float]:
        """The value, the deviation over seeds and the ends of the interval, under the names that they are logged under.

        >>> Metric("", "x", "mcc", 0.5, interval=Interval(0.25, 0.75), seed_std=0.125).named
        {'test_x_mcc': 0.5, 'test_x_mcc_seed_std': 0.125, 'test_x_mcc_ci_low': 0.25, 'test_x_mcc_ci_high': 0.75}
        """
        deviation = {} if self.seed_std is None else {f"{self.key}_seed_std": self.seed_std}
        return {self.key: self.value, **deviation, **(self.interval.named(self.key) if self.interval else {})}

    @property
    def lower_is_better(self) -> bool:
        """Whether the better of two checkpoints has the lower value."""
        return self.name in LOWER_IS_BETTER

    @property
    def is_headline(self) -> bool:
        """Whether it is the one to show of its target: the head's, and the probe's beside it."""
        return self.name in HEADLINE.values() and not self.baseline

    @property
    def beside(self) -> Metric:
        """The head's metric that a metric of the probe or of a baseline stands beside; of a head's, itself."""
        return replace(self, probe=False, baseline=False)

    def of_baseline(self, value: float) -> Metric:
        """What a baseline reaches in it.

        >>> Metric("", "x", "mcc", 0.5, probe=True).of_baseline(0.25).named
        {'test_x_baseline_probe_mcc': 0.25}
        """
        return Metric(self.task, self.target, self.name, value, probe=self.probe, baseline=True)


@dataclass(frozen=True)
class Change:
    """What a metric has changed by from one checkpoint to another, on the same test sequences.

    Attributes:
        value: the later one less the earlier one, in the metric's own direction.
        interval: of that difference, paired.
        p_improved: see `P_IMPROVED`; above 0.975, or below 0.025, where the interval leaves 0 out.
    """

    value: float
    interval: Interval
    p_improved: float

    def named(self, key: str, since: Since) -> dict[str, float]:
        """The numbers under the names that they are logged under; `p_improved` is about where the training began.

        >>> Change(0.25, Interval(0.0, 0.5), 0.975).named("test_x_mcc", "best")
        {'test_x_mcc_delta_best': 0.25, 'test_x_mcc_delta_best_ci_low': 0.0, 'test_x_mcc_delta_best_ci_high': 0.5}
        """
        stem = f"{key}_delta_{since}"
        found = {stem: self.value, **self.interval.named(stem)}
        return found if since == "best" else found | {f"{key}_p_improved": self.p_improved}


@dataclass
class TargetMetrics:
    """The metrics of one target: those that are defined on the data, and why the others are not.

    Attributes:
        values: by name, as fractions 0..1 where they are fractions.
        omitted: for each other name, the reason.
    """

    values: dict[str, float] = field(default_factory=dict)
    omitted: dict[str, str] = field(default_factory=dict)


def over_seeds(found: Sequence[tuple[list[Metric], dict[str, str]]]) -> tuple[list[Metric], dict[str, str]]:
    """The mean of each metric over the heads of several seeds, with its deviation, and why others are left out.

    Args:
        found: of each head, the metrics, and by name the reasons why others are not defined. A metric that one head
            does not have is left out: the mean of the others would be of an easier question.
    """
    omitted = {name: reason for _, reasons in found for name, reason in reasons.items()}
    values = [{metric.key: metric.value for metric in metrics} for metrics, _ in found]
    first = [metric for metric in found[0][0] if metric.key not in omitted]
    if len(found) == 1:
        return first, omitted
    each = {metric.key: [of_seed[metric.key] for of_seed in values] for metric in first}
    return [replace(one, value=fmean(each[one.key]), seed_std=stdev(each[one.key])) for one in first], omitted


def metrics_of_kind(kind: str, level: str) -> tuple[str, ...]:
    """The names of the metrics of a target, in the order to show them.

    Args:
        kind: `classification` or `regression`.
        level: `sequence` or `token`.
    """
    return (*OF_KIND[kind], *([PER_SEQUENCE[kind]] if level == "token" else []))


def metric_name(column: str) -> str:
    """The name of a column or task with every character that a tracker may refuse turned into `_`.

    >>> metric_name("log P (octanol/water)")
    'log P _octanol_water_'
    """
    return re.sub(r"[^\w .-]", "_", column)


def lower_is_better(key: str) -> bool:
    """Whether the better of two checkpoints has the lower value of a metric, by the name under which it is logged."""
    metric = Metric.parse(key)
    return metric is not None and metric.lower_is_better


def is_shown_first(key: str) -> bool:
    """Whether a number that is logged belongs to what a reader looks at first of a target, see `shown_at`.

    >>> [is_shown_first(f"fitness/test_fitness_{end}") for end in ("spearman", "spearman_ci_low", "mse", "rmse")]
    [True, True, True, False]
    >>> [is_shown_first(key) for key in ("test_x_accuracy_seed_std", "test_x_mse_seed_std", "x/dwnstr_task_val_loss")]
    [True, False, True]
    >>> [is_shown_first(f"test_x_probe_accuracy{end}") for end in ("", "_ci_low", "_delta_start", "_p_improved")]
    [True, False, True, True]
    """
    return shown_at(key) < 2


def shown_at(key: str) -> int:
    """Where a number stands among those of a run.

    0 is the main metric with its interval and its deviation over seeds, the probe's, and what both have changed by; 1
    is what the reference of this tool logs of a head, the loss and the squared error; 2 is all else.

    >>> [shown_at(f"fitness/test_fitness_{end}") for end in ("spearman", "mse", "rmse")]
    [0, 1, 2]
    """
    changed = _CHANGE.sub("", key)
    metric = Metric.parse(_END.sub("", changed))
    if metric is None:
        return 2
    if not metric.is_headline:
        return 1 if key == metric.key and metric.name in (LOSS, "mse") and metric == metric.beside else 2
    return 0 if changed != key or key == metric.key or not metric.probe else 2
