"""What scores have changed by in a training: since its first measurement, and since the best one before."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.config.schema import Config
from pipeline.errors import DataError
from pipeline.report.overview import Changes, Reading, first_lines, overview, verdicts_of
from pipeline.report.resolution_table import resolution_text
from pipeline.report.tables import Table, footnote, step_table
from pipeline.score import by_reason
from pipeline.statistics.intervals import changes
from pipeline.statistics.metrics import Change, Metric, Since
from pipeline.statistics.predictions import from_table
from pipeline.tracking.protocol import Several, Tracker

if TYPE_CHECKING:
    from pipeline.score import Scores


logger = logging.getLogger("pipeline.validation")  # whose warnings are said once in a training


@dataclass(frozen=True)
class Best:
    """The best measurement of a metric so far: at which step, and the metric there."""

    step: int
    value: float


class Progress:
    """Keeps the predictions of the first measurement of a training, and of the best one of each main metric.

    Attributes:
        start: the step of the first measurement; None before it.
        overview: the latest scores, and their change since the start; None before a measurement.
        verdicts: what is said of each task at the latest.
    """

    def __init__(self) -> None:
        """Before the first measurement."""
        self.start: int | None = None
        self.overview: Table | None = None
        self.verdicts: dict[str, str] = {}
        self._lines = ""  # the same in the first lines of a description
        self._curves: dict[str, list[Reading]] = {}  # of each main metric
        self._best: dict[str, Best] = {}
        self._tables: dict[tuple[str, int], pa.Table] = {}  # of predictions, by task and step

    def log(self, scores: Sequence[Scores], step: int, tracker: Tracker, mirrors: Tracker) -> Changes:
        """Follows a measurement, see `follow`; logs the changes, and why there are none. Returns the changes."""
        found, notes = self.follow(scores, step)
        since = Changes(
            found, "start", f"step {self.start}", {key: tuple(curve) for key, curve in self._curves.items()}
        )
        self._lines, self.verdicts = first_lines(scores, since), verdicts_of(scores, since)
        self.overview = overview(scores, since, f"Scores on the test set at step {step}")
        for note in notes:
            logger.warning("%s", note)
            tracker.note(note)
        if found:
            Several([tracker, mirrors]).metrics(found, step)
        return since

    def summary(self, points: Sequence[tuple[int, Mapping[str, float]]], config: Config) -> str:
        """The description of a training's run.

        Args:
            points: the step and the metrics of each measurement.
            config: says which metrics to show of each, and how many heads a score is the mean of.
        """
        latest = [self._lines, "", *(f"{text}\n" for text in [footnote([self._lines])] if text)] if self._lines else []
        since = f"Changes are since step {self.start}, the first measurement."
        seen = resolution_of(points, config)
        return "\n".join(
            [*latest, since, "", *([seen, ""] if seen else []), step_table(points, config.headlines).markdown()]
        )

    def follow(self, scores: Sequence[Scores], step: int) -> tuple[dict[str, float], list[str]]:
        """Compares a measurement with the first and the best, and keeps what the next one needs.

        Args:
            scores: of each task.
            step: of the training.

        Returns:
            `<metric>_delta_start`, `_delta_best`, their intervals, and `<metric>_p_improved`, of each main metric;
            and for those without them, why.
        """
        found: dict[str, float] = {}
        refused: dict[str, str] = {}
        if self.start is None:
            self.start = step
        for one in scores:
            for metric in filter(lambda metric: metric.is_headline, one.results):
                self._compare(one, metric, found, refused)
                ends = (metric.interval.low, metric.interval.high) if metric.interval else ()
                self._curves.setdefault(metric.key, []).append(Reading(step, metric.value, *ends))
                best = self._best.get(metric.key)
                sign = -1 if metric.lower_is_better else 1
                if best is None or sign * metric.value > sign * best.value:
                    self._best[metric.key] = Best(step, metric.value)
            self._tables.setdefault((one.task_name, step), one.table)
        self.missed(step)
        needed = {self.start, *(best.step for best in self._best.values())}
        self._tables = {key: table for key, table in self._tables.items() if key[1] in needed}
        return found, [f"{names}: {reason}" for reason, names in by_reason(refused).items()]

    def missed(self, step: int) -> None:
        """Leaves a gap in the curves that have come to a step, and have no value there."""
        for curve in self._curves.values():
            if curve[-1].step < step:
                curve.append(Reading(step))

    def _compare(self, one: Scores, metric: Metric, found: dict[str, float], refused: dict[str, str]) -> None:
        """Adds what a metric has changed by to `found`, or to `refused` why that cannot be said."""
        best = self._best.get(metric.key)
        start = self._tables.get((one.task_name, self.start or 0))
        if best is None or start is None or metric.interval is None:  # the score has said why there is no interval
            return
        try:
            since_start = self._change(one, metric, start)
            since_best = since_start
            if best.step != self.start:
                since_best = self._change(one, metric, self._tables[one.task_name, best.step])
        except DataError as error:
            refused[metric.key] = f"no change since step {self.start}: {error}"
            return
        compared: dict[Since, Change | str] = {"start": since_start, "best": since_best}
        reasons: dict[str, list[str]] = {}
        for since, change in compared.items():
            if isinstance(change, str):
                reasons.setdefault(change, []).append(since)
            else:
                found |= change.named(metric.key, since)
        if reasons:
            said = [f"no change since the {' and the '.join(which)}: {why}" for why, which in reasons.items()]
            refused[metric.key] = "; ".join(said)

    def _change(self, one: Scores, metric: Metric, before: pa.Table) -> Change | str:
        """The change since another measurement, or why there is none."""
        now, then = (from_table(table, metric.target, metric.probe) for table in (one.table, before))
        every = changes(now, then, only=metric.name)
        return every.values.get(metric.name) or every.refused.get(metric.name, "it is not defined in both")

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: numbers, names, and tensors that hold Parquet files."""
        tables = [(task, step, _packed(table)) for (task, step), table in self._tables.items()]
        best = {key: (one.step, one.value) for key, one in self._best.items()}
        curves = {key: [tuple(one) for one in curve] for key, curve in self._curves.items()}
        return {"start": self.start, "best": best, "tables": tables, "curves": curves, "lines": self._lines}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """Continues where `state` was taken."""
        made = cls()
        made.start = state["start"]
        made._best = {key: Best(*values) for key, values in state["best"].items()}
        made._curves = {key: [Reading(*one) for one in curve] for key, curve in state["curves"].items()}
        made._lines = state["lines"]
        made._tables = {(task, step): _unpacked(packed) for task, step, packed in state["tables"]}
        return made


def resolution_of(points: Sequence[tuple[int, Mapping[str, float]]], config: Config, *, markdown: bool = True) -> str:
    """What the metrics of a training can see, in words; empty before the third measurement."""
    heads = {task.task_name if config.is_list else "": task.num_seeds for task in config.dataset}
    return resolution_text(points, heads, markdown)


def _packed(table: pa.Table) -> torch.Tensor:
    """A table as bytes, in a tensor: Lightning may load checkpoints without anything but tensors and numbers."""
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd")
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def _unpacked(packed: torch.Tensor) -> pa.Table:
    return pq.read_table(pa.BufferReader(packed.cpu().numpy().tobytes()))
