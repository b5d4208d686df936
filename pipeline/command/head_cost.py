"""What training the heads of a task and of its baseline will cost: steps, and their time on this device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from pipeline.baseline_scores import baseline_path
from pipeline.data.parts import unit_index
from pipeline.embed import Embeddings
from pipeline.encoders.baselines import BASELINES
from pipeline.heads.batches import Indices
from pipeline.heads.fit import fit, steps_of
from pipeline.load import Examples
from pipeline.store.embedding_table import Store
from pipeline.store.reading import Rows
from pipeline.train_head import head_paths, make_head

SECONDS = 1.0  # to time steps for
ROWS = 2**14  # of random numbers, which stand for the embeddings


@dataclass(frozen=True)
class HeadCost:
    """Of the heads of all seeds of a task.

    Attributes:
        stored: how many are in the store already.
        steps: that the optimizer takes for the others; fewer where early stopping ends them.
        seconds: of these steps; validation for early stopping is not counted.
    """

    stored: int
    steps: int
    seconds: float


def of_checkpoint(examples: Examples, key: str | None, width: int, store: Store, device: torch.device) -> HeadCost:
    """Of the heads on embeddings of a checkpoint; `key` is that of their table, None where it is not stored."""
    task, targets = examples.task, examples.targets
    head = make_head(task, width, targets, device)
    there = [path and path.exists() for path in head_paths(examples, key, head, task.seeds, store)]
    missing = [seed for seed, stored in zip(task.seeds, there, strict=True) if not stored]
    return _cost(examples, missing, width, device)


def of_baseline(examples: Examples, store: Store, device: torch.device) -> HeadCost | None:
    """Of those of the task's baseline, which are stored as its predictions are; None where the task wants none."""
    task = examples.task
    if not task.baselines:
        return None
    path = baseline_path(examples, store, device)
    if path and path.exists():
        return HeadCost(len(task.seeds), 0, 0.0)
    width = BASELINES[task.level](examples.train.sequences).hidden_size
    assert width is not None
    return _cost(examples, task.seeds, width, device)


def _cost(examples: Examples, seeds: Sequence[int], width: int, device: torch.device) -> HeadCost:
    """Trains some batches on random numbers, twice as many each time, until the time is up."""
    task, stored = examples.task, len(examples.task.seeds) - len(seeds)
    epoch, batches, seconds = steps_of(examples, 1), 1, 0.0
    if not seeds or not epoch * task.num_epochs:  # also where early stopping holds all out, which `fit` refuses
        return HeadCost(stored, 0, 0.0)
    _seconds(examples, seeds, width, device, 1)  # the first pass of a process takes longer
    while True:
        seconds = _seconds(examples, seeds, width, device, batches)
        if batches == epoch or seconds > SECONDS / 4:
            break
        batches = min(epoch, 2 * batches)
    return HeadCost(
        stored, len(seeds) * steps_of(examples, task.num_epochs), seconds / batches * epoch * task.num_epochs
    )


def _seconds(examples: Examples, seeds: Sequence[int], width: int, device: torch.device, batches: int) -> float:
    """The seconds of some steps of each head, of sequences of all lengths."""
    task = replace(examples.task, num_epochs=1, patience=None)
    count = min(len(examples.train), batches * task.batch_size)
    places = np.linspace(0, len(examples.train) - 1, count).astype(int).tolist()
    embeddings = _RandomEmbeddings(replace(examples, task=task, train=examples.train.of(places)), width)
    heads = [make_head(replace(task, random_seed=seed), width, examples.targets, device) for seed in seeds]
    began = time.perf_counter()
    fit(heads, seeds, embeddings, device)
    return time.perf_counter() - began


class _RandomRows(Rows):
    """Random numbers in place of embeddings that are not there yet."""

    def __init__(self, counts: Indices, width: int) -> None:
        self.in_memory, self._counts, self._on_device = True, counts, {}
        self.memory = torch.randn(min(ROWS, int(counts.sum())), width)

    def index(self, examples: Indices) -> Indices:
        return unit_index(self._counts, examples) % len(self.memory)


class _RandomEmbeddings(Embeddings):
    def __init__(self, examples: Examples, width: int) -> None:
        rows = _RandomRows(examples.train.counts, width)
        super().__init__(examples, rows, {}, 0, {}, (), reusable=False)

    def rows(self, part: str) -> Rows:
        assert part == "train"
        return self.all_rows
