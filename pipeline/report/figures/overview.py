"""The overview as a figure: where each headline metric lies, with its interval, and what it has to beat."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from pipeline.report.figures.canvas import GREY, drawable, figure_style, new_figure, shorten

if TYPE_CHECKING:
    from pipeline.report.overview import Headline


class NotebookFigure(Figure):
    """A figure that notebooks show though pyplot does not know it."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        with figure_style():
            self.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


def overview_figure(headlines: Sequence[Headline], title: str) -> Figure:
    """A line for each target: head and probe with their intervals, the baseline, and the constant guess.

    Args:
        headlines: of every target.
        title: the heading.
    """
    with figure_style():
        how = "bars are 95 % intervals over the test sequences"
        figure = new_figure(7.2, 1.5 + 0.5 * len(headlines), title, how, NotebookFigure)
        axes = figure.subplots()
        for place, one in enumerate(headlines):
            _line(axes, place, one)
        axes.set_yticks(range(len(headlines)), [shorten(_name(one), 40) for one in headlines])
        axes.set_ylim(len(headlines) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="#dddddd", linewidth=0.5)
        handles = {text: handle for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
        if handles:
            figure.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=4)
    return figure


def _line(axes: Any, place: int, one: Headline) -> None:
    baselines = one.scores.baselines
    for which, label, color, shift in ((False, "head", "C0", -0.12), (True, "probe", "C1", 0.12)):
        if metric := one.pair.get(which):
            ends = [drawable([metric.interval.low, metric.interval.high])] if metric.interval else []
            for low, high in ends:
                axes.plot([low, high], [place + shift] * 2, color=color, linewidth=2, alpha=0.5, solid_capstyle="butt")
            axes.plot(drawable([metric.value]), [place + shift], "o", color=color, label=label)
            if metric.key in baselines:
                value = drawable([baselines[metric.key]])
                axes.plot(value, [place + shift], "|", color="C2", markersize=10, markeredgewidth=2, label="baseline")
    if one.main.constant is not None:
        label = "constant guess"
        axes.plot(drawable([one.main.constant]), [place], "|", color=GREY, markersize=18, label=label, zorder=0)


def _name(one: Headline) -> str:
    return f"{one.scores.task_name}: {one.main.target} {one.main.name.replace('_', ' ')}"
