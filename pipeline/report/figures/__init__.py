"""Figures of a measurement, and of the measurements of a training, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.data.parts import Target
from pipeline.report.figures.canvas import drawable, figure_style
from pipeline.report.figures.classification import class_figure, confusion, confusion_figure
from pipeline.report.figures.examples import curve_figure, text_figure
from pipeline.report.figures.numbers import Lines, length_figure, loss_figure, scatter_figure, training_figure
from pipeline.statistics.metrics import Metric, metric_name

if TYPE_CHECKING:
    from pipeline.score import Scores

SHOWN = ("accuracy", "macro_f1", "spearman", "r2")  # metrics in a heading, where they are defined


def draw(scores: Scores, folder: Path) -> list[Path]:
    """Draws a task's result; returns the PNG files in the order to show them.

    Args:
        scores: what `score` returned for the task.
        folder: where the files go; it is made if it does not exist.

    Raises:
        OSError: a file cannot be written.
    """
    examples = scores.examples
    folder.mkdir(parents=True, exist_ok=True)
    predicted = [predictions_of(scores, target) for target in examples.targets]
    paths = []
    with figure_style():
        for index, stem in enumerate(file_stems([target.name for target in examples.targets])):
            paths += _target(scores, index, predicted[index], folder / stem)
        if examples.task.level == "token":
            figure, how = curve_figure, "numbers along each sequence; gaps are masked positions"
            if examples.task.task_type == "classification":
                figure, how = text_figure, "wrong labels are on orange, masked positions are dots"
            heading = (f"{scores.task_name}: examples from the test set", how)
            paths.append(figure(heading, examples.test, examples.targets, predicted, folder / "examples.png"))
        if scores.losses:
            paths.append(loss_figure(scores, folder / "learning_curve.png"))
        return [*paths, length_figure(examples, folder / "lengths.png")]


def curves(points: Sequence[tuple[int, Mapping[str, float]]], folder: Path) -> list[Path]:
    """Draws every metric against the step of a training, the probe's beside the head's, baselines as level lines.

    The main metrics are the first. A line has a gap where its metric is not known, and others of the task are, or none.

    Returns a PNG file per task.

    Args:
        points: the step and the metrics of each measurement; none where it failed or was dropped.
        folder: where the files go; it is made if it does not exist.

    Raises:
        OSError: a file cannot be written.
    """
    tasks: dict[str, dict[str, Lines]] = {}
    for step, metrics in sorted(points, key=lambda point: point[0]):
        for metric in [Metric.parse(name, value) for name, value in metrics.items()]:
            if metric and np.isfinite(drawable(metric.value)):
                lines = tasks.setdefault(metric.task, {}).setdefault(metric.beside.short, {})
                low, high = (metrics.get(f"{metric.key}_ci_{end}", np.nan) for end in ("low", "high"))
                lines.setdefault((metric.baseline, metric.probe), []).append((step, metric.value, low, high))
    missed = {step for step, metrics in points if not metrics}
    for task, lines_of in tasks.items():
        _leave_gaps(lines_of, missed)
        tasks[task] = dict(sorted(lines_of.items(), key=lambda one: not _is_headline(one[0])))
    folder.mkdir(parents=True, exist_ok=True)
    stems = file_stems([f"curve_{task}" if task else "curve" for task in tasks])
    with figure_style():
        return [
            training_figure(task, tasks[task], folder / f"{stem}.png") for task, stem in zip(tasks, stems, strict=True)
        ]


def _leave_gaps(lines_of: Mapping[str, Lines], missed: set[int]) -> None:
    """Adds the steps without a value to the lines of a task: the `missed` ones, and those at which others have one."""
    every = missed | {step for lines in lines_of.values() for line in lines.values() for step, *_ in line}
    for lines in lines_of.values():
        for (baseline, probe), line in lines.items():
            gaps = set() if baseline else every - {step for step, *_ in line}
            empty = [(step, np.nan, np.nan, np.nan) for step in gaps]
            lines[baseline, probe] = sorted([*line, *empty], key=lambda one: one[0])


def _is_headline(name: str) -> bool:
    metric = Metric.parse(name)
    return metric is not None and metric.is_headline


def file_stems(names: Sequence[str]) -> list[str]:
    """A file name for each, all different even where a file system takes upper and lower case for the same."""
    stems: list[str] = []
    for name in names:
        base = stem = metric_name(name).replace(" ", "_").lstrip(".") or "_"
        taken, copy = {other.casefold() for other in stems}, 1
        while stem.casefold() in taken:
            copy += 1
            stem = f"{base}_{copy}"
        stems.append(stem)
    return stems


def predictions_of(scores: Scores, target: Target) -> npt.NDArray[Any]:
    """Class indices or numbers, shape (units,)."""
    column = scores.first_seed[f"{target.name}_prediction"].combine_chunks()  # the DataFrame would take all columns
    return np.asarray(column if target.classes is None else column.indices)


def _target(scores: Scores, index: int, predicted: npt.NDArray[Any], stem: Path) -> list[Path]:
    """The figures of one target, of its unmasked units."""
    target, test = scores.examples.targets[index], scores.examples.test
    mask = test.masks[index]
    true, predicted = test.values[index][mask], predicted[mask]
    units = "positions" if scores.examples.task.level == "token" else "sequences"
    heading = (f"{scores.task_name}: {target.name}", f"{_headline(scores, target)}{mask.sum():,} test {units}")
    if target.classes is None:
        return [
            scatter_figure(heading, true.astype(np.float64), predicted, stem.with_name(f"{stem.name}_predicted.png"))
        ]
    counts = confusion(true, predicted, target.outputs)
    names = target.labels
    shown = [i for i in range(target.outputs) if i < len(target.classes) or counts[:, i].any()]
    names, counts = [names[i] for i in shown], counts[np.ix_(shown, shown)]
    return [
        confusion_figure(heading, names, counts, stem.with_name(f"{stem.name}_confusion.png")),
        class_figure(heading, names, counts, units, stem.with_name(f"{stem.name}_per_class.png")),
    ]


def _headline(scores: Scores, target: Target) -> str:
    """The head's main metrics of a target, each beside what the probe, a baseline and a constant guess reach."""
    texts = []
    probes = {metric.beside.key: f"probe {metric.value:.3f}" for metric in scores.results if metric.probe}
    for metric in scores.results:
        if metric.target == target.name and metric.name in SHOWN and not metric.probe:
            guess = "" if metric.constant is None else f"constant guess {metric.constant:.3f}"
            line = f"baseline {scores.baselines[metric.key]:.3f}" if metric.key in scores.baselines else ""
            others = ", ".join(filter(None, (probes.get(metric.key), line, guess)))
            texts.append(f"{metric.name} {metric.value:.3f}{others and f' ({others})'}; ")
    return "".join(texts)
