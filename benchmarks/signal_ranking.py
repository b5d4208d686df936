"""Which way to measure ranks the checkpoints of a training as much data would: Kendall's tau, for `signal_noise.py`.

Of the variants of GB1, 1,000 make the ranking by much data: the mean rank correlation over four folds, of two heads
and, apart from them, of the probe. The other 500 are what small tasks are drawn from: 200 variants to train on and 100
to test on, several draws. Each way measures every checkpoint on each draw. Its tau is the mean over the draws (and over
head seeds, three to a group for three heads); its interval is a bootstrap over checkpoints. The reference's procedure
is one head that goes on from checkpoint to checkpoint, with a new optimizer at each. It takes part a second time with
the checkpoints in reverse order: a head that ages ranks checkpoints by when it met them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from signal_gains import REFERENCE, by_head, by_probe, settings_of, with_task
from signal_models import encoder_of

from pipeline import Store, Task
from pipeline.embed import Embeddings, embed
from pipeline.heads.batches import Data
from pipeline.heads.fit import fit, predict
from pipeline.load import Examples, load
from pipeline.report.tables import Table
from pipeline.statistics.predictions import from_table
from pipeline.statistics.regression import regression
from pipeline.train_head import make_head

CPU = torch.device("cpu")
MUCH, FOLDS, TRAIN, TEST = 1000, 4, 200, 100
MUCH_SEEDS = 2  # of heads
AGEING = 3  # heads that go on, each by itself
RESAMPLES = 2000
Floats = npt.NDArray[np.float64]


def rank(paths: Sequence[Path], options: argparse.Namespace, store: Store) -> tuple[dict[str, Any], Table]:
    """Measures the checkpoints in every way; the numbers, and the table of tau."""
    folds, draws = _data(options)
    embedded = [embed([*folds, *draws], encoder_of(path), store) for path in paths]
    much = [checkpoint[: len(folds)] for checkpoint in embedded]
    small = [[checkpoint[len(folds) + draw] for checkpoint in embedded] for draw in range(len(draws))]
    truths = {
        "head": np.mean([[_head(one, store, MUCH_SEEDS)[0].mean() for one in of] for of in much], 1),
        "ridge": np.mean([[_probe(one, store)[0][0] for one in of] for of in much], 1),
    }
    ways, seconds = _ways(small, store, options.seeds)
    steps = [int(path.name.partition("=")[2]) for path in paths]
    ways["the step itself"] = np.array(steps, float)[None]
    found = {
        "steps": steps,
        "much data": {name: list(truth) for name, truth in truths.items()},
        "agreement of the two": tau(truths["head"][None], truths["ridge"]),
        "ways": {
            name: {truth: tau(values, of) for truth, of in truths.items()} | {"scores": values.tolist()}
            for name, values in ways.items()
        },
        "seconds": seconds,
    }
    return found, _table(found)


def _data(options: argparse.Namespace) -> tuple[list[Examples], list[Examples]]:
    """The folds of much data, and the draws of small tasks, of rows that are not in the folds."""
    files = sorted((options.data / "gb1_fitness").glob("*/x*.csv"))
    rows = pd.concat([pd.read_csv(file, dtype=str) for file in files], ignore_index=True)
    rng = np.random.default_rng(1234)
    rows = rows.iloc[rng.permutation(len(rows))]
    much, rest = rows[:MUCH], rows[MUCH:]
    fold = np.arange(len(much)) % FOLDS
    folds = [_load(f"much {index}", much[fold != index], much[fold == index]) for index in range(FOLDS)]
    draws = []
    for index in range(options.draws):
        order = rng.permutation(len(rest))
        parts = rest.iloc[order[:TRAIN]], rest.iloc[order[TRAIN : TRAIN + TEST]]
        draws.append(_load(f"small {index}", *parts))
    return folds, draws


def _load(name: str, train: pd.DataFrame, test: pd.DataFrame) -> Examples:
    return load(Task(task_name=name, target_column=["target"]), frames={"train": train, "test": test})


def _ways(
    small: Sequence[Sequence[Embeddings]], store: Store, seeds: int
) -> tuple[dict[str, Floats], dict[str, float]]:
    """By way the scores, shape (draws and groups of seeds, checkpoints), and the seconds of a measurement."""
    fresh = _each(small, lambda one: _head(one, store, seeds))
    plain = _each(small, lambda one: _head(one, store, seeds, reference=True))
    probe = _each(small, lambda one: _probe(one, store))
    goes_on, began = [_ageing(draw) for draw in small], time.process_time()
    back = [_ageing(draw[::-1])[:, ::-1] for draw in small]
    ageing = (time.process_time() - began) / (AGEING * len(small) * len(small[0]))
    name = "a fresh head, the reference's settings"
    ways = {
        "the reference's procedure": np.concatenate(goes_on),
        "the same, checkpoints in reverse": np.concatenate(back),
        name: np.concatenate(plain[0]),
        "1 fresh head": np.concatenate(fresh[0]),
    }
    for count in (3, 5, 10):
        if count <= seeds:
            groups = [draw[: seeds // count * count].reshape(-1, count, draw.shape[1]).mean(1) for draw in fresh[0]]
            ways[f"{count} fresh heads"] = np.concatenate(groups)
    ways["probe"] = np.concatenate(probe[0])
    seconds = {"the reference's procedure": ageing, "probe": probe[1]}
    return ways, seconds | {name: plain[1] / seeds, f"{seeds} fresh heads": fresh[1]}


def _each(small: Sequence[Sequence[Embeddings]], way: Any) -> tuple[list[Floats], float]:
    """For each draw the scores, shape (seeds, checkpoints), and the mean seconds."""
    found = [[way(one) for one in draw] for draw in small]
    return [np.stack([values for values, _ in draw], 1) for draw in found], float(
        np.mean([seconds for draw in found for _, seconds in draw])
    )


def _head(embeddings: Embeddings, store: Store, seeds: int, reference: bool = False) -> tuple[Floats, float]:
    """The rank correlation of each fresh head."""
    way = by_head(embeddings, store, num_seeds=seeds, **settings_of(embeddings, reference))
    heads = from_table(way.scores.table, "target").seeds
    return np.array([_correlation(one.true, one.predicted) for one in heads]), way.seconds


def _probe(embeddings: Embeddings, store: Store) -> tuple[Floats, float]:
    way = by_probe(embeddings, store)
    return np.nan_to_num([way.metric.value]), way.seconds


def _ageing(draw: Sequence[Embeddings]) -> Floats:
    """The rank correlations of heads that go on from checkpoint to checkpoint, shape (heads, checkpoints)."""
    first, seeds = draw[0].examples, range(AGEING)
    tasks = [with_task(draw[0], **REFERENCE, random_seed=seed).examples.task for seed in seeds]
    heads = [make_head(task, draw[0].table.hidden_size, first.targets, CPU) for task in tasks]
    scores = np.empty((len(heads), len(draw)))
    for place, each in enumerate(draw):
        one = with_task(each, **REFERENCE)
        fit(heads, seeds, one, CPU)
        test = one.examples.test
        data = Data(one.rows("test"), test, CPU)
        for index, head in enumerate(heads):
            (predicted,) = predict(head, data, np.arange(len(test)), 128)
            scores[index, place] = _correlation(test.values[0], predicted.numpy()[:, 0])
    return scores


def _correlation(true: Any, predicted: Floats) -> float:
    """Spearman's; 0 where a head says the same of all."""
    return regression(np.asarray(true, np.float64), predicted).values.get("spearman", 0.0)


def tau(scores: Floats, truth: Floats) -> list[float]:
    """Kendall's tau between each row of scores and the truth, its mean; the 95 % interval over checkpoints.

    A resample takes checkpoints with replacement; pairs of one checkpoint with itself do not count.
    """
    agree = (np.sign(scores[:, :, None] - scores[:, None]) * np.sign(truth[:, None] - truth)).mean(0)
    size = len(truth)
    counts = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), RESAMPLES)
    others = counts.sum(1) ** 2 - (counts**2).sum(1)
    resampled = np.einsum("bi,ij,bj->b", counts, agree, counts) / others
    low, high = np.quantile(resampled, [0.025, 0.975])
    return [float(agree.sum() / (size * (size - 1))), float(low), float(high)]


def _table(found: dict[str, Any]) -> Table:
    columns = ("way", "tau, much data by heads", "95 %", "tau, much data by ridge", "95 %", "s")
    rows = []
    for name, way in found["ways"].items():
        cells = [part for truth in ("head", "ridge") for part in _cells(way[truth])]
        seconds = found["seconds"].get(name)
        rows.append([name, *cells, "" if seconds is None else f"{seconds:.3f}"])
    rows.append(["much data by ridge", *_cells(found["agreement of the two"]), "", "", ""])
    return Table(columns, rows)


def _cells(values: Sequence[float]) -> list[str]:
    return [f"{values[0]:+.2f}", f"{values[1]:+.2f} to {values[2]:+.2f}"]
