"""How often the intervals of metrics hold the truth: it should be 95 %, and is to be 92 to 98 %.

    python benchmarks/coverage.py [--sets 1000] [--sizes 50 200 1000] [--kinds KIND ...] [--json FILE]

Test sets are drawn from a population of labels and predictions that is known; the truth is the metric on a million
sequences of it (tokens: on 100,000), computed by `statistics.classification` and `statistics.regression`, which share
nothing with the intervals. Of each test set there are two checkpoints, of which the second is a little better or worse;
the intervals are those of the first, and of their difference. A cell has the share of intervals that hold the truth, in
per cent; with 1,000 sets its own standard error is 0.7. Behind a / is the share of test sets for which the interval is
refused.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pipeline.statistics.classification import classification
from pipeline.statistics.intervals import Changes, Intervals, changes, intervals
from pipeline.statistics.per_sequence import per_sequence_mean
from pipeline.statistics.predictions import Predictions
from pipeline.statistics.regression import regression

Floats = npt.NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], tuple[Predictions, Predictions]]
CLASSES = ("a", "b", "c")
WANTED = (92, 98)


def numbers(
    rng: np.random.Generator, sequences: int, errors: Callable[[np.random.Generator, int], Floats]
) -> tuple[Predictions, Predictions]:
    """Labels with errors of any distribution about what both checkpoints see; the second sees a little more."""
    seen, more = rng.standard_normal((2, sequences))
    true = seen + 0.5 * more + 0.8 * errors(rng, sequences)
    one = np.ones(sequences, np.int64)
    second = seen + 0.2 * more + 0.2 * rng.standard_normal(sequences)
    return Predictions(true, seen, one), Predictions(true, second, one)


def normal(rng: np.random.Generator, n: int) -> Floats:
    """Normal errors of variance 1."""
    return rng.standard_normal(n)


def laplace(rng: np.random.Generator, n: int) -> Floats:
    """Laplace errors of variance 1: now and then a large one."""
    return rng.laplace(scale=0.5**0.5, size=n)


def classes(rng: np.random.Generator, sequences: int, shares: tuple[float, ...]) -> tuple[Predictions, Predictions]:
    """Classes of unequal size, from logits about the true class, which both checkpoints see in part."""
    one = np.ones(sequences, np.int64)
    true = rng.choice(len(shares), sequences, p=shares)
    return _from_logits(rng, true, one, rng.standard_normal((sequences, len(shares))), 1.6)


def token_classes(rng: np.random.Generator, sequences: int) -> tuple[Predictions, Predictions]:
    """Labels in stretches, and errors that come in stretches too, in some sequences more than in others."""
    counts = rng.integers(10, 51, sequences)
    units = int(counts.sum())
    true = np.repeat(rng.choice(3, units, p=(0.5, 0.3, 0.2)), 5)[:units]
    hard = np.repeat(rng.standard_normal((sequences, 3)), counts, axis=0)
    noise = 0.6 * hard + 0.8 * np.repeat(rng.standard_normal((units, 3)), 3, axis=0)[:units]
    return _from_logits(rng, true, counts, noise, 1.2)


def token_numbers(rng: np.random.Generator, sequences: int) -> tuple[Predictions, Predictions]:
    """Labels and errors that a sequence shifts as a whole."""
    counts = rng.integers(10, 51, sequences)
    units = int(counts.sum())
    seen, error = (np.repeat(0.7 * rng.standard_normal(sequences), counts) for _ in range(2))
    seen = seen + 0.7 * rng.standard_normal(units)
    error = error + 0.7 * rng.standard_normal(units)
    second = seen + 0.15 * error + 0.15 * rng.standard_normal(units)
    return Predictions(seen + 0.8 * error, seen, counts), Predictions(seen + 0.8 * error, second, counts)


def _from_logits(
    rng: np.random.Generator, true: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], noise: Floats, signal: float
) -> tuple[Predictions, Predictions]:
    found = []
    for strength in (signal, signal + 0.1):
        logits = 0.9 * noise + 0.4 * rng.standard_normal(noise.shape)
        logits[np.arange(len(true)), true] += strength
        probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        found.append(Predictions(true, probabilities, counts, CLASSES[: noise.shape[1]]))
    return found[0], found[1]


KINDS: dict[str, Draw] = {
    "numbers, normal errors": partial(numbers, errors=normal),
    "numbers, Laplace errors": partial(numbers, errors=laplace),
    "two classes, 60 and 40 %": partial(classes, shares=(0.6, 0.4)),
    "three classes, 50, 30 and 20 %": partial(classes, shares=(0.5, 0.3, 0.2)),
    "classes of tokens": token_classes,
    "numbers of tokens": token_numbers,
}


def truth(draw: Draw, rng: np.random.Generator, sequences: int) -> tuple[dict[str, float], dict[str, float]]:
    """The metrics of the first checkpoint on the population, and how far the second one's differ."""
    first, second = (_metrics(one) for one in draw(rng, sequences))
    return first, {name: value - first[name] for name, value in second.items()}


def _metrics(one: Predictions) -> dict[str, float]:
    within = per_sequence_mean(one).values if one.counts.max() > 1 else {}
    if one.classes is None:
        return regression(np.asarray(one.true, np.float64), one.predicted).values | within
    return classification(np.asarray(one.true, np.int64), one.predicted, one.classes).values | within


def coverage(draw: Draw, seed: int, sequences: int, sets: int, known: dict[str, float]) -> dict[str, tuple[int, int]]:
    """For each metric, and each difference as `delta <metric>`: how many intervals there are, and how many hold."""
    given, held = Counter[str](), Counter[str]()
    for number in track(range(sets), f"{sequences} sequences", transient=True, console=Console(stderr=True)):
        first, second = draw(np.random.default_rng([seed, sequences, number]), sequences)
        for name, (low, high) in _ends(intervals(first), changes(second, first)).items():
            given[name] += 1
            held[name] += low <= known[name] <= high
    return {name: (given[name], held[name]) for name in known}


def _ends(alone: Intervals, paired: Changes) -> dict[str, tuple[float, float]]:
    found = {name: (one.low, one.high) for name, one in alone.values.items()}
    return found | {f"delta {name}": (one.interval.low, one.interval.high) for name, one in paired.values.items()}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=1000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[50, 200, 1000])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    view = Table(title=f"Coverage of 95 % intervals over {arguments.sets} test sets, per cent", box=MARKDOWN)
    for column in ("population", "metric", "truth", *(f"{size} sequences" for size in arguments.sizes)):
        view.add_column(column, justify="left" if column in ("population", "metric") else "right")
    results = []
    for kind in arguments.kinds:
        seed = list(KINDS).index(kind)
        first, difference = truth(KINDS[kind], np.random.default_rng(seed), 100_000 if "tokens" in kind else 1_000_000)
        known = first | {f"delta {name}": value for name, value in difference.items()}
        found = {size: coverage(KINDS[kind], seed, size, arguments.sets, known) for size in arguments.sizes}
        for name, value in known.items():
            cells = [_cell(*found[size][name], sets=arguments.sets) for size in arguments.sizes]
            view.add_row(kind, name, f"{value:.4f}", *cells)
            results.append({"kind": kind, "metric": name, "truth": value, "held": {s: found[s][name] for s in found}})
    Console(width=130).print(view)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"sets": arguments.sets, "results": results}, indent=1))


def _cell(given: int, held: int, *, sets: int) -> str:
    if not given:
        return "refused"
    share = 100 * held / given
    outside = "" if WANTED[0] <= share <= WANTED[1] else " !"
    return f"{share:.1f}{outside}" + (f" / {100 - 100 * given / sets:.0f}" if given < sets else "")


if __name__ == "__main__":
    main()
