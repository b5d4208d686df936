"""Pictures of a measurement, and of the measurements of a training, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.load import Examples, Part, Target
from pipeline.report.figures.canvas import (
    BLUE,
    GREEN,
    GREY,
    HEAD,
    INK,
    MINUS,
    ORANGE,
    Sheet,
    drawable,
    fitting,
    label,
    line,
    span,
    ticks,
    write,
)
from pipeline.report.figures.classes import class_picture, confusion, confusion_picture
from pipeline.report.figures.examples import curve_picture, text_picture
from pipeline.score import Scores
from pipeline.statistics.metrics import metric_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 20_000  # of a scatter plot at most; a seeded sample of more
DENSE = 1500  # points from which their density is drawn instead
SKEWED = 20  # longest by median length from which lengths have a logarithmic axis
SHOWN = ("accuracy", "macro_f1", "spearman", "r2")  # in a picture's heading, where they are defined


def draw(scores: Scores, examples: Examples, folder: Path) -> list[Path]:
    """Draws a task's result; gives the PNG files in the order to show them.

    Args:
        scores: what `score` gave for the task.
        examples: the data that it was given.
        folder: where the files go; it is made where there is none.

    Raises:
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    predicted = [_predicted(scores, target) for target in examples.targets]
    stems = _stems([target.name for target in examples.targets])
    paths = []
    for index, stem in enumerate(stems):
        paths += _target(scores, examples, index, predicted[index], folder / stem)
    if examples.task.level == "token":
        classes = examples.task.task_type == "classification"
        how = (
            "wrong labels are on orange, masked positions are dots"
            if classes
            else "numbers along each sequence; gaps are masked positions"
        )
        heading = (f"{scores.task_name}: examples from the test set", how)
        picture = text_picture if classes else curve_picture
        paths.append(picture(heading, examples.test, examples.targets, predicted, folder / "examples.png"))
    if scores.losses:
        paths.append(_learning(scores, folder / "learning_curve.png"))
    return [*paths, _lengths(examples, folder / "lengths.png")]


def curves(points: Sequence[tuple[int, Mapping[str, float]]], folder: Path) -> list[Path]:
    """Draws every metric against the step of a training: a PNG file per task, which is what precedes the last `/`.

    Args:
        points: the step and the metrics of each measurement.
        folder: where the files go; it is made where there is none.

    Raises:
        OSError: a file cannot be written.
    """
    tasks: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for step, metrics in sorted(points, key=lambda point: point[0]):
        for name, value in metrics.items():
            task, _, metric = name.rpartition("/")
            if drawable(np.array(value)):
                tasks.setdefault(task, {}).setdefault(metric, []).append((step, value))
    folder.mkdir(parents=True, exist_ok=True)
    stems = _stems([f"curve_{task}" if task else "curve" for task in tasks])
    return [_training(task, tasks[task], folder / f"{stem}.png") for task, stem in zip(tasks, stems, strict=True)]


def _stems(names: Sequence[str]) -> list[str]:
    """A file name for each, all different where upper and lower case are one as well."""
    stems: list[str] = []
    for name in names:
        base = stem = metric_name(name).replace(" ", "_").lstrip(".") or "_"
        taken, copy = {other.casefold() for other in stems}, 1
        while stem.casefold() in taken:
            copy += 1
            stem = f"{base}_{copy}"
        stems.append(stem)
    return stems


def _predicted(scores: Scores, target: Target) -> npt.NDArray[Any]:
    """Class indices or numbers, shape (units,)."""
    column = scores.table[f"{target.name}_prediction"].combine_chunks()
    return np.asarray(column if target.classes is None else column.indices)


def _target(scores: Scores, examples: Examples, index: int, predicted: npt.NDArray[Any], stem: Path) -> list[Path]:
    """The pictures of one target; masked units count for nothing."""
    target, mask = examples.targets[index], examples.test.masks[index]
    true: npt.NDArray[Any] = examples.test.values[index][mask]
    said = predicted[mask]
    units = "positions" if examples.task.level == "token" else "sequences"
    heading = (f"{scores.task_name}: {target.name}", f"{_headline(scores, target)}{mask.sum():,} test {units}")
    if target.classes is None:
        return [_scatter(heading, true, said, stem.with_name(f"{stem.name}_predicted.png"))]
    counts = confusion(true, said, target.outputs)
    unused = [i for i in range(len(target.classes), target.outputs) if not counts[:, i].any()]
    counts = np.delete(np.delete(counts, unused, 0), unused, 1)
    names = [*target.classes, *(f"class {i}" for i in range(len(target.classes), target.outputs) if i not in unused)]
    return [
        confusion_picture(heading, names, counts, stem.with_name(f"{stem.name}_confusion.png")),
        class_picture(heading, names, counts, units, stem.with_name(f"{stem.name}_per_class.png")),
    ]


def _headline(scores: Scores, target: Target) -> str:
    """The target's main metrics, each beside what a constant guess would reach."""
    stem = f"test_{metric_name(target.name)}_"
    values, floors = [{name.rpartition("/")[2]: v for name, v in d.items()} for d in (scores.metrics, scores.constant)]
    texts = []
    for name in [name for name in SHOWN if stem + name in values]:
        floor = f" (constant guess {floors[stem + name]:.3f})" if stem + name in floors else ""
        texts.append(f"{name} {values[stem + name]:.3f}{floor}; ".replace("-", MINUS))
    return "".join(texts)


def _scatter(heading: tuple[str, str], true: npt.NDArray[Any], said: npt.NDArray[Any], path: Path) -> Path:
    """Predicted against true, and the residuals beside."""
    fine = drawable(true) & drawable(said)
    notes = "" if fine.all() else f"; {(~fine).sum():,} that are not finite are left out"
    true, said = true[fine], said[fine]
    if len(true) > POINTS:
        some = np.sort(np.random.default_rng(0).choice(len(true), POINTS, replace=False))
        true, said, notes = true[some], said[some], f"; a sample of {POINTS:,}{notes}"
    if len(true) >= DENSE:
        notes += "; yellow where they are few"
    sheet = Sheet(9.6, 4.1 + 0.55 + HEAD, heading[0], heading[1] + notes)
    same, beside = sheet.axes(0.8, 0.55, 4.0, 4.0), sheet.axes(5.6, 0.55, 3.8, 4.0)
    label(same, "true", "predicted")
    label(beside, "predicted", f"predicted {MINUS} true")
    if not len(true):
        return sheet.save(path)
    both = span(true, said)
    line(same, both, both, GREY, zorder=3)
    _points(same, true, said, (both, both))
    ends = span(said - true, [0.0])
    line(beside, span(said), (0, 0), GREY, zorder=3)
    _points(beside, said, said - true, (span(said), ends))
    return sheet.save(path)


def _points(axes: Axes, x: npt.NDArray[Any], y: npt.NDArray[Any], limits: tuple[tuple[float, float], ...]) -> None:
    """Points, or their density where there are many."""
    axes.set(xlim=limits[0], ylim=limits[1])
    if len(x) < DENSE:
        alpha = float(np.clip(30 / len(x) ** 0.6, 0.3, 0.8))
        line(axes, x, y, BLUE, 0, "o", alpha=alpha, zorder=2)
        return
    extent = (*limits[0], *limits[1])
    axes.hexbin(x, y, gridsize=55, extent=extent, bins="log", mincnt=1, cmap="viridis_r", linewidths=0.2, zorder=2)


def _learning(scores: Scores, path: Path) -> Path:
    """The head's losses by epoch; where one was held out, the epoch whose head was kept."""
    below = f"{len(scores.losses)} epochs; train loss {scores.losses[-1]:.4g} in the last"
    if scores.held_losses:
        best = int(np.nanargmin(np.nan_to_num(scores.held_losses, nan=np.inf)))
        below += f"; held-out loss {scores.held_losses[best]:.4g} at its least, after epoch {best + 1}"
    sheet = Sheet(7.2, 3.2 + HEAD, f"{scores.task_name}: training of the head", below)
    axes = sheet.axes(0.8, 0.5, 6.1, 2.45)
    ticks(axes, 8, 5, whole=True)
    label(axes, "epoch", "mean loss")
    limits: list[float] = []
    for place, (name, color, losses) in enumerate(
        (("train", BLUE, scores.losses), ("held out", ORANGE, scores.held_losses))
    ):
        values = np.array(losses)
        fine = np.flatnonzero(drawable(values))
        limits += values[fine].tolist()
        line(axes, fine + 1, values[fine], color, 1.5, "o" if len(values) <= 30 else "")
        if losses:
            write(axes, place * 0.12, 1.03, name, 9, color, transform=axes.transAxes)
    ends = span(limits or [0.0])
    if scores.held_losses:
        line(axes, (best + 1, best + 1), ends, GREY, linestyle=":")
    axes.set(xlim=(0.5, len(scores.losses) + 0.5), ylim=ends)
    return sheet.save(path)


def _lengths(examples: Examples, path: Path) -> Path:
    """The share of sequences by length in each part, with those that are left out because they are too long."""
    parts, limit = {"train": (examples.train, BLUE), "test": (examples.test, ORANGE)}, examples.limit
    everything = np.concatenate([part.lengths for part, _ in parts.values()])
    low, high = int(everything.min()), int(everything.max())
    skewed = high > SKEWED * np.median(everything)
    bins: npt.NDArray[Any]
    if skewed or high - low > 60:
        bins = np.geomspace(low - 0.5, high + 0.5, 50) if skewed else np.linspace(low - 0.5, high + 0.5, 50)
    else:
        bins = np.arange(low, high + 2) - 0.5
    texts = [_told(name, part, limit) for name, (part, _) in parts.items()]
    sheet = Sheet(7.2, 3.2 + HEAD, f"{examples.task.task_name}: lengths of the sequences", "; ".join(texts))
    axes = sheet.axes(0.8, 0.5, 6.1, 2.45)
    if skewed:
        axes.set_xscale("log")
    ticks(axes, 8, 4, whole=not skewed)
    if skewed:
        _powers(axes)
    label(axes, "characters", "% of the part")
    for place, (name, (part, color)) in enumerate(parts.items()):
        shares = 100 * np.histogram(part.lengths, bins)[0] / len(part.lengths)
        axes.stairs(shares, bins, color=color, linewidth=1.5, fill=False, zorder=3 + place)
        axes.stairs(shares, bins, color=color, alpha=0.2, linewidth=0, fill=True)
        write(axes, place * 0.1, 1.03, name, 9, color, transform=axes.transAxes)
    ends = (bins[0], bins[-1])
    if limit is not None and limit < 2 * high:
        axes.axvline(limit + 0.5, color=GREEN, linewidth=1.5, linestyle="--", marker="")
        write(
            axes, 1, 1.03, f"at most {limit:,} are used (dashed line)", 9, GREEN, ha="right", transform=axes.transAxes
        )
        ends = (ends[0], max(ends[1], limit + 1))
    axes.set(xlim=ends, ylim=(0, None))
    return sheet.save(path)


def _told(name: str, part: Part, limit: int | None) -> str:
    long = f", {part.left_out:,} of them too long" if limit is not None else ""
    return f"{name}: {len(part.lengths):,} sequences{long}"


def _powers(axes: Axes) -> None:
    """Ticks of a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())


def _training(task: str, metrics: Mapping[str, Sequence[tuple[int, float]]], path: Path) -> Path:
    """One axis for each metric, the measured steps marked."""
    columns = min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    steps = [step for points in metrics.values() for step, _ in points]
    below = f"metrics by training step; {len(set(steps))} measurements"
    sheet = Sheet(max(3.1 * columns, 5) + 0.2, 1.95 * rows + HEAD, task or "Downstream validation", below)
    for place, (name, points) in enumerate(metrics.items()):
        row, column = divmod(place, columns)
        axes = sheet.axes(0.7 + 3.1 * column, sheet.height - HEAD - 1.95 * (row + 1) + 0.3, 2.35, 1.3)
        ticks(axes, 4, 3, whole=True)
        values = [value for _, value in points]
        line(axes, [step for step, _ in points], values, BLUE, 1.5, "o")
        axes.set(xlim=span(steps), ylim=span(values))
        title = fitting(f"{name}: {points[-1][1]:.4g}", 9, 2.6)
        write(axes, -0.1, 1.06, title, 9, INK, transform=axes.transAxes)
    return sheet.save(path)
