"""Scores as tables: for the terminal, and in Markdown for the run's description."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pipeline.score import Scores

if TYPE_CHECKING:
    from rich.table import Table


def table(scores: Sequence[Scores]) -> Table:
    """A row per metric, beside what a constant guess would reach."""
    from rich.table import Table

    view = Table(title="Scores on the test set", title_justify="left")
    view.add_column("metric")
    view.add_column("score", justify="right")
    view.add_column("constant guess", justify="right", style="dim")
    for one in scores:
        for name, value, floor in rows(one):
            view.add_row(name, value, floor)
        view.add_section()
    return view


def curve(points: Sequence[tuple[int, Mapping[str, float]]], names: Sequence[str]) -> Table:
    """A row per measurement of a training: the step, and some of its metrics."""
    from rich.table import Table

    view = Table(title="Scores on the test set, over the training", title_justify="left")
    for name in ("step", *names):
        view.add_column(name, justify="right", overflow="fold")
    for step, metrics in points:
        view.add_row(str(step), *cells(metrics, names))
    return view


def curve_markdown(points: Sequence[tuple[int, Mapping[str, float]]], names: Sequence[str]) -> str:
    """The same in Markdown."""
    lines = [f"| step | {' | '.join(names)} |", f"|---:|{'---:|' * len(names)}"]
    for step, metrics in points:
        lines.append(f"| {step} | {' | '.join(cells(metrics, names))} |")
    return "\n".join(lines)


def cells(metrics: Mapping[str, float], names: Sequence[str]) -> list[str]:
    """The values of some metrics as text; empty where there is none."""
    return [f"{metrics[name]:.4f}" if name in metrics else "" for name in names]


def markdown(facts: Mapping[str, str], scores: Sequence[Scores]) -> str:
    """The result, which MLflow shows the first lines of; the warnings; what was measured, on what."""
    lines = ["| metric | score | constant guess |", "|---|---:|---:|"]
    for one in scores:
        lines += [f"| {name} | {value} | {floor} |" for name, value, floor in rows(one)]
    about = [f"- {name}: `{value}`" for name, value in facts.items()]
    notes = [f"- {one.task_name}: {note}" for one in scores for note in (*one.earlier_notes, *one.notes)]
    return "\n".join([*lines, "", *notes, *about])


def rows(scores: Scores) -> list[tuple[str, str, str]]:
    """Each metric's name, its value and, where it says something, that of a constant guess; as text."""
    floors = scores.constant
    return [
        (name, f"{value:.4f}", f"{floors[name]:.4f}" if name in floors else "")
        for name, value in scores.metrics.items()
    ]
