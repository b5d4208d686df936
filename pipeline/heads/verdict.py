"""What is wrong with a trained head, or its embeddings, in words, and what to change: from its losses and its scores.

Losses are compared with the loss of the best constant guess, so the rules mean the same for every task:
the *explained share* of a loss is 1 for a loss of 0, and 0 for a head that knows no more than the labels' distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.config.task import Task
from pipeline.data.parts import Part, Target
from pipeline.heads.fit import SeedHead
from pipeline.load import Examples
from pipeline.statistics.metrics import LOSS, Metric

FALLING = 0.1  # of what is explained at the end, added from the second last tenth of the epochs to the last
LEAST = 0.01  # of an explained share: less is the noise of a few epochs
NO_BETTER = "not better than its baseline"
GAP = 0.4  # of explained shares between train and test set
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a head.

    Attributes:
        target: which of its targets it is about; empty where it is about all.
        short: a word or a few, for a table.
        text: in full, with what to change.
    """

    target: str
    short: str
    text: str


@dataclass(frozen=True)
class _Shares:
    """Explained shares of the losses of a task's heads.

    Attributes:
        train: of the training loss in the epoch whose weights are kept, mean over the heads.
        test: of the test loss, mean over the heads.
        last, before: in the last tenth of the epochs, and in the tenth before: of the validation loss where there is
            one, else of the training loss, which also falls as a head learns its train set by heart.
    """

    train: float
    test: float
    last: float
    before: float


def collapsed(how: str) -> list[Verdict]:
    """That a head can learn little from such embeddings; see `Embeddings.collapse`, nothing where that is empty."""
    if not how:
        return []
    remedy = (
        "look at the embedding_* metrics of earlier checkpoints, at another layer (layer: -2), and at what the"
        " pre-training does with its learning rate and weight decay"
    )
    text = f"the embeddings have collapsed: they {how}; a score is made of what little is left, {remedy}"
    return [Verdict("", "embeddings collapsed", text)]


def verdicts(examples: Examples, heads: Sequence[SeedHead], results: Sequence[Metric]) -> list[Verdict]:
    """What is wrong with the heads of a task; empty where nothing is.

    Args:
        examples: of the task.
        heads: one for each seed.
        results: their metrics on the test set.
    """
    steps = _steps(heads)
    found = [
        Verdict(
            metric.target,
            "mse no better than a constant's" if metric.name == "mse" else "no better than a guess",
            f"{metric.key} is no better than a constant guess, after {steps}: {_more(examples.task)}",
        )
        for metric in results
        if not metric.probe and _no_better(metric)
    ]
    shares = _shares(examples, heads, results)
    if shares is None:
        return found
    overfits = shares.train - shares.test > GAP
    if overfits:
        remedy = "let it stop early" if examples.task.patience is None else "lower patience or optim.lr"
        set_patience = " (patience: 5)" if examples.task.patience is None else ""
        text = (
            f"the head fits its train set and not the test set: it explains {shares.train:.0%} of the training loss and"
            f" {shares.test:.0%} of the test loss, after {steps}: {remedy}{set_patience}, or give it more train rows"
        )
        found.append(Verdict("", "over-fitted", text))
    to_the_end = any(len(one.losses) == examples.task.num_epochs for one in heads)
    if to_the_end and _still_falling(shares) and not overfits:
        loss = "training" if examples.task.patience is None else "validation"
        text = f"the {loss} loss was still falling at the end, after {steps}: {_more(examples.task)}"
        found.append(Verdict("", "still learning", text))
    return found


def _still_falling(shares: _Shares) -> bool:
    return shares.last - shares.before > max(LEAST, FALLING * shares.last)


def _steps(heads: Sequence[SeedHead]) -> str:
    least, most = min(one.steps for one in heads), max(one.steps for one in heads)
    if most == 1:
        return "1 optimizer step"
    return f"{most:,} optimizer steps" if least == most else f"{least:,} to {most:,} optimizer steps"


def _more(task: Task) -> str:
    """How to have a head learn more."""
    keys = "num_epochs or optim.lr" if task.patience is None else "num_epochs, patience or optim.lr"
    return f"raise {keys}, or lower batch_size"


def _no_better(metric: Metric) -> bool:
    """Whether accuracy, or squared error, is better than the constant guess by less than its standard error."""
    if metric.constant is None or metric.name not in ("accuracy", "mse"):
        return False
    error = metric.interval.error if metric.interval else 0.0
    gain = metric.constant - metric.value if metric.lower_is_better else metric.value - metric.constant
    return gain <= error


def _shares(examples: Examples, heads: Sequence[SeedHead], results: Sequence[Metric]) -> _Shares | None:
    """None where there are no losses, or nothing to explain."""
    test = next((metric.value for metric in results if metric.name == LOSS), None)
    train_guess = _guess_loss(examples.train, examples, weighted=True)
    test_guess = _guess_loss(examples.test, examples)
    if test is None or not heads[0].losses or train_guess <= 0 or test_guess <= 0:
        return None
    kept = [one.losses[int(np.argmin(one.val_losses)) if one.val_losses else -1] for one in heads]
    last, before = zip(*(_tenths(one.val_losses or one.losses) for one in heads), strict=True)
    losses = fmean(kept) / train_guess, test / test_guess, fmean(last) / train_guess, fmean(before) / train_guess
    return _Shares(*(1 - loss for loss in losses))


def _tenths(losses: Sequence[float]) -> tuple[float, float]:
    """Mean loss of the last tenth of the epochs, and of the tenth before: at least two epochs each, if there are."""
    size = max(2, len(losses) // 10)
    last, before = losses[-size:], losses[-2 * size : -size]
    return fmean(last), fmean(before or last)


def _guess_loss(part: Part, examples: Examples, weighted: bool = False) -> float:
    """The loss on a part, summed over targets, of a guess that knows the distribution of the train labels alone."""
    total = 0.0
    for index, target in enumerate(examples.targets):
        train = examples.train.values[index][examples.train.masks[index]]
        labels = part.values[index][part.masks[index]]
        if not len(labels) or not len(train):
            continue
        if target.classes is None:
            total += float(((labels - train.mean()) ** 2).mean())
        else:
            total += _entropy(train, labels, target, weighted)
    return total


def _entropy(train: Array, labels: Array, target: Target, weighted: bool) -> float:
    """The cross-entropy of the classes' shares of the train labels on some labels; a class without any counts as one.

    `weighted`: by the class weights, as in training.
    """
    weights = np.array(target.weights) if weighted and target.weights else np.ones(target.outputs)
    shares = np.maximum(np.bincount(train, minlength=target.outputs), 1) * weights
    shares = shares / shares.sum()
    of_label = weights[labels]
    return float(-(of_label * np.log(np.maximum(shares[labels], 1e-12))).sum() / max(of_label.sum(), 1e-12))
