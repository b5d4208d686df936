"""Figures of numbers: predictions, losses, lengths, and metrics over a training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.report.figures.canvas import GREY, Numbers, drawable, new_figure, save, shorten

if TYPE_CHECKING:
    from pipeline.load import Examples
    from pipeline.score import Scores

# Of a metric, step, value and ends of the interval (NaN where there is none) by whose they are: whether of a baseline,
# and whether of the probe, not of the head.
Lines = dict[tuple[bool, bool], list[tuple[int, float, float, float]]]
POINTS = 20_000  # of a scatter plot at most; a random sample with a fixed seed where there are more
DENSE = 1500  # number of points from which their density is drawn instead
SKEWED = 20  # longest by median length from which lengths have a logarithmic axis


def scatter_figure(heading: tuple[str, str], true: Numbers, predicted: Numbers, path: Path) -> Path:
    """Predicted against true, and the residuals beside."""
    true, predicted, notes = sample(true, predicted)
    figure = new_figure(9.6, 5.0, heading[0], heading[1] + notes)
    same, residuals = figure.subplots(1, 2)
    same.set(xlabel="true", ylabel="predicted", aspect="equal", adjustable="datalim")
    residuals.set(xlabel="predicted", ylabel="predicted \N{MINUS SIGN} true")
    for axes, x, y in ((same, true, predicted), (residuals, predicted, predicted - true)):
        if len(x) < DENSE:
            axes.scatter(x, y, 15, alpha=0.7, linewidths=0)
        else:
            axes.hexbin(x, y, gridsize=55, bins="log", mincnt=1, cmap="viridis_r", linewidths=0.2)
    if len(true):
        ends = min(true.min(), predicted.min()), max(true.max(), predicted.max())
        same.plot(ends, ends, GREY, linewidth=1)
    residuals.axhline(0, color=GREY, linewidth=1)
    return save(figure, path)


def sample(true: Numbers, predicted: Numbers) -> tuple[Numbers, Numbers, str]:
    """The pairs of numbers to draw, and what a reader must know of the choice."""
    fine = np.isfinite(drawable(true) + drawable(predicted))
    kept = np.flatnonzero(fine)
    notes = "" if fine.all() else f"; {(~fine).sum():,} that are not finite are left out"
    if len(kept) > POINTS:
        kept = np.sort(np.random.default_rng(0).choice(kept, POINTS, replace=False))
        notes = f"; a sample of {POINTS:,}{notes}"
    if len(kept) >= DENSE:
        notes += "; yellow where they are few"
    return true[kept], predicted[kept], notes


def loss_figure(scores: Scores, path: Path) -> Path:
    """The head's losses by epoch; with a held-out part, the epoch whose head was kept."""
    subtitle = f"{len(scores.losses)} epochs; train loss {scores.losses[-1]:.4g} in the last"
    best = int(np.argmin(np.nan_to_num(scores.val_losses, nan=np.inf))) if scores.val_losses else None
    if best is not None:
        subtitle += f"; held-out loss {scores.val_losses[best]:.4g} at its least, after epoch {best + 1}"
    figure = new_figure(7.2, 4.0, f"{scores.task_name}: training of the head", subtitle)
    axes = figure.subplots()
    axes.locator_params(axis="x", integer=True)
    axes.set(xlabel="epoch", ylabel="mean loss", xlim=(0.5, len(scores.losses) + 0.5))
    for name, losses in (("train", scores.losses), ("held out", scores.val_losses)):
        if losses:
            axes.plot(np.arange(len(losses)) + 1, drawable(losses), label=name, marker="o" if len(losses) <= 30 else "")
    if best is not None:
        axes.axvline(best + 1, color=GREY, linewidth=1, linestyle=":")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return save(figure, path)


def length_figure(examples: Examples, path: Path) -> Path:
    """The share of sequences by length in each part, with those that are left out because they are too long."""
    parts, limit = {"train": examples.train, "test": examples.test}, examples.limit
    lengths = np.concatenate([part.lengths for part in parts.values()])
    low, high = int(lengths.min()), int(lengths.max())
    skewed = high > SKEWED * np.median(lengths)
    width = 1 + (high - low) // 60
    bins = np.arange(low, high + width + 1, width) - 0.5
    texts = []
    for name, part in parts.items():
        too_long = f", {part.left_out:,} of them too long" if limit is not None else ""
        texts.append(f"{name}: {len(part.lengths):,} sequences{too_long}")
    figure = new_figure(7.2, 4.0, f"{examples.task.task_name}: lengths of the sequences", "; ".join(texts))
    axes = figure.subplots()
    if skewed:
        bins, ticks = np.geomspace(low - 0.5, high + 0.5, 50), np.geomspace(low, high, 6).astype(int)
        axes.set_xscale("log")
        axes.set_xticks(ticks, ticks.tolist())
        axes.minorticks_off()
    for color, (name, part) in zip(("C0", "C1"), parts.items(), strict=True):
        shares = 100 * np.histogram(part.lengths, bins)[0] / len(part.lengths)
        axes.stairs(shares, bins, color=color, linewidth=1.5, label=name)
        axes.stairs(shares, bins, color=color, alpha=0.2, fill=True)
    axes.set(xlabel="characters", ylabel="% of the part", xlim=(bins[0], bins[-1]), ylim=(0, None))
    if limit is not None and limit < 2 * high:
        axes.axvline(limit + 0.5, color="C2", linestyle="--", label=f"at most {limit:,} are used")
        axes.set_xlim(right=max(bins[-1], limit + 1))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    return save(figure, path)


def training_figure(task: str, metrics: Mapping[str, Lines], path: Path) -> Path:
    """Axes of their own for each metric, with a marker at each measured step.

    The probe's line is dashed, and bands are intervals. What a baseline reaches, which is the same at each step, is a
    level line.
    """
    columns = min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    steps = sorted({step for lines in metrics.values() for points in lines.values() for step, *_ in points})
    room = 0.05 * (steps[-1] - steps[0]) or 0.5
    every = {whose for lines in metrics.values() for whose in lines}
    beside = "; dashed: the probe" if (False, True) in every else ""
    beside += "; dotted: the baseline" if any(baseline for baseline, _ in every) else ""
    lows = [low for lines in metrics.values() for points in lines.values() for _, _, low, _ in points]
    beside += "; bands: 95 % intervals" if np.isfinite(lows).any() else ""
    known = [(step, value) for lines in metrics.values() for points in lines.values() for step, value, *_ in points]
    measured = len({step for step, value in known if np.isfinite(value)})
    beside += "; gaps: no value" if any(np.isnan(value) for _, value in known) else ""
    subtitle = f"metrics by training step; {measured} measurements{beside}"
    figure = new_figure(max(3.1 * columns, 5), 1.9 * rows + 0.7, task or "Downstream validation", subtitle)
    for place, (name, lines) in enumerate(metrics.items(), 1):
        axes = figure.add_subplot(rows, columns, place)
        for (baseline, probe), points in sorted(lines.items()):
            look = ("D", "--", "C1") if probe else ("o", "-", "C0")
            if baseline:
                axes.axhline(points[-1][1], linestyle=":", linewidth=1.2, color=look[2])
            else:
                along, values, low, high = map(drawable, zip(*points, strict=True))
                axes.plot(along, values, marker=look[0], linestyle=look[1], color=look[2])
                axes.fill_between(along, low, high, color=look[2], alpha=0.15, linewidth=0)
        axes.set(title=f"{shorten(name, 34)}\n{_last(lines)}", xlim=(steps[0] - room, steps[-1] + room))
        axes.locator_params(axis="x", integer=True, nbins=4)
    return save(figure, path)


def _last(lines: Lines) -> str:
    """The last values, `head 0.933, probe 0.951`."""
    kept = {
        probe: [value for _, value, *_ in points if np.isfinite(value)][-1]
        for (baseline, probe), points in sorted(lines.items())
        if not baseline
    }
    return ", ".join(f"{'probe' if probe else 'head'} {value:.4g}" for probe, value in kept.items())
