"""The lines that a training says of its measurements: the main metrics, and the share of its time that they take."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from pipeline.report.tables import footnote, number, score_text
from pipeline.statistics.metrics import Metric


class Lines:
    """Makes the lines, and keeps count of the time that the training has waited."""

    def __init__(self, headlines: Sequence[str]) -> None:
        """The main metrics of the tasks; the time of the training counts from here."""
        self._headlines = headlines
        self._waited = 0.0
        self._is_explained = False  # what the mark behind a score means
        self.start_clock()

    def start_clock(self) -> None:
        """The time of the training, of which measurements have a share, counts from here."""
        self._began = time.perf_counter()

    def waited(self, seconds: float) -> None:
        """Counts time that the training has waited."""
        self._waited += seconds

    def of_measurement(
        self, step: int, metrics: Mapping[str, float], seconds: float, elsewhere: float | None = None
    ) -> str:
        """The main metrics of a measurement, and what it took.

        Args:
            step: of the weights.
            metrics: by name.
            seconds: that the training waited.
            elsewhere: seconds of the worker, where there is one; those of the training are counted by `waited` then.
        """
        numbers = ", ".join(_with_change(name, metrics) for name in self._headlines if name in metrics)
        took = f"{seconds:.1f} s" if elsewhere is None else f"{elsewhere:.1f} s in the background, {seconds:.2f} s here"
        if elsewhere is None:
            self.waited(seconds)
        line = f"downstream validation at step {step}: {numbers} ({took}; {self._share} so far)"
        explained = "" if self._is_explained else footnote([numbers])
        self._is_explained |= bool(explained)
        return "\n".join(filter(None, [line, explained]))

    def of_the_end(self, seconds: float) -> str:
        """How long the training waited at its end for what was not measured yet."""
        self.waited(seconds)
        waited = f"the training waited {seconds:.1f} s at its end"
        return f"downstream validation: {waited}; {self._share} in all"

    @property
    def _share(self) -> str:
        share = 100 * self._waited / max(time.perf_counter() - self._began, 1e-9)
        return f"measurements took {share:.0f} % of the training's time"


def _with_change(name: str, metrics: Mapping[str, float]) -> str:
    """`test_x_mcc 0.7500 (+0.125 since the start, 95 %: +0.050 to +0.200)`; the change where it has an interval.

    Else the interval of the score. With the deviation over seeds where the score is marked, see `footnote`.
    """
    change, metric = f"{name}_delta_start", Metric.logged(name, metrics)
    said = f"{name} {score_text(metric) if metric and metric.hangs_on_seeds else number(metrics[name])}"
    if f"{change}_ci_low" not in metrics:
        ends = metric.interval if metric else None
        return f"{said} (95 %: {ends.low:z.3f} to {ends.high:z.3f})" if ends else said
    by, low, high = (metrics[key] for key in (change, f"{change}_ci_low", f"{change}_ci_high"))
    return f"{said} ({by:+z.3f} since the start, 95 %: {low:+z.3f} to {high:+z.3f})"
