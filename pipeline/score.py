"""Stage 4: a `FittedHead` and the test part to `Scores`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline.data.parts import Part, Target
from pipeline.embed import Embeddings
from pipeline.heads.architectures import Head
from pipeline.heads.batches import Data
from pipeline.heads.fit import predict
from pipeline.heads.loss import loss_of
from pipeline.heads.verdict import verdicts
from pipeline.load import Examples
from pipeline.statistics.classification import classification
from pipeline.statistics.intervals import intervals
from pipeline.statistics.metrics import HAVE_CONSTANT, LOSS, Metric, TargetMetrics, over_seeds
from pipeline.statistics.predictions import from_table
from pipeline.statistics.regression import regression
from pipeline.train_head import FittedHead

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Scores:
    """What a checkpoint's embeddings are worth on a task.

    Attributes:
        examples: what was scored.
        results: the metrics, over the whole test set: the mean over the seeds of the head.
        omitted: by name, why further metrics are not defined on this data.
        table: the predictions, for each seed of the head a row per unit of the test set: `seed`, `row` (FILE:ROW),
            `position` in token-level tasks, and for each target `<target>_target`, `_mask`, `_prediction` and, for
            classes, `_probabilities`. One seed stands behind another.
        losses: the first head's mean training loss at each epoch.
        val_losses: with `patience`, the loss on the validation examples after each epoch.
        notes: warnings about the scores.
        earlier_notes: warnings from the stages before.
    """

    examples: Examples
    results: tuple[Metric, ...]
    omitted: dict[str, str]
    table: pa.Table
    losses: list[float]
    val_losses: list[float]
    notes: tuple[str, ...] = ()
    earlier_notes: tuple[str, ...] = ()

    @property
    def task_name(self) -> str:
        """The task's name."""
        return self.examples.task.task_name

    @property
    def metrics(self) -> dict[str, float]:
        """The values by name, such as `test_3state_accuracy`, each followed by its noise and its interval's ends."""
        return {name: value for metric in self.results for name, value in metric.named.items()}

    @property
    def constant(self) -> dict[str, float]:
        """By name, where it says something: what the best constant guess from the train labels reaches."""
        return {metric.key: metric.constant for metric in self.results if metric.constant is not None}

    @property
    def first_seed(self) -> pa.Table:
        """The predictions of the first head, which pictures show."""
        return first_seed(self.table)

    @property
    def predictions(self) -> pd.DataFrame:
        """`table` as a DataFrame: labels are categories."""
        frame: pd.DataFrame = self.table.to_pandas()
        return frame


def score(embeddings: Embeddings, fitted: FittedHead, in_list: bool = False) -> Scores:
    """Predicts the whole test part and computes every metric on it.

    Args:
        embeddings: of the test part.
        fitted: the heads.
        in_list: the task is one of a list, where the names of metrics begin with the task's.
    """
    examples = embeddings.examples
    targets, part = examples.targets, examples.test
    task_name = examples.task.task_name if in_list else ""
    outputs = [_predict(embeddings, one.head) for one in fitted.heads]
    results, omitted = over_seeds([_measured(of_seed, examples, task_name) for of_seed in outputs])
    tables = [_table(part, targets, of_seed, one.seed) for of_seed, one in zip(outputs, fitted.heads, strict=True)]
    table = pa.concat_tables(tables).combine_chunks()
    finite, refused = _with_intervals(results, table, targets)
    notes = [f"{name} is left out: {reason}" for name, reason in omitted.items()]
    notes += [f"{', '.join(names)}: {reason}" for reason, names in refused.items()]
    return Scores(
        examples,
        finite,
        omitted,
        table,
        fitted.losses,
        fitted.val_losses,
        tuple(notes + verdicts(examples, fitted, finite)),
        examples.notes + embeddings.notes + fitted.notes,
    )


def _measured(outputs: list[torch.Tensor], examples: Examples, task_name: str) -> tuple[list[Metric], dict[str, str]]:
    """The finite metrics of one head, from its outputs on the test part, and by name why others are left out."""
    targets, part = examples.targets, examples.test
    loss = float(loss_of(outputs, _tensors(part.values), _tensors(part.masks), targets))
    results, omitted = [Metric(task_name, "", LOSS, loss)], dict[str, str]()
    for index, target in enumerate(targets):
        mask, train = part.masks[index], examples.train
        true = part.values[index][mask]
        found = _metrics_of(outputs[index].numpy()[mask], true, target)
        guess = _constant(train.values[index][train.masks[index]], len(true), target)
        constant = _metrics_of(guess, true, target).values
        results += [
            Metric(task_name, target.name, name, value, constant.get(name) if name in HAVE_CONSTANT else None)
            for name, value in found.values.items()
        ]
        omitted.update({Metric(task_name, target.name, name).key: why for name, why in found.omitted.items()})
    for metric in results:
        if not np.isfinite(metric.value):
            omitted[metric.key] = f"it is {metric.value}: the labels or the head's outputs are out of range"
    return [metric for metric in results if np.isfinite(metric.value)], omitted


def first_seed(table: pa.Table) -> pa.Table:
    """The rows of the first head in a table of predictions; all where no seed is told apart."""
    if "seed" not in table.column_names or not len(table):
        return table
    return table.filter(pc.equal(table["seed"], table["seed"][0]))


def _with_intervals(
    results: list[Metric], table: pa.Table, targets: tuple[Target, ...]
) -> tuple[tuple[Metric, ...], dict[str, list[str]]]:
    """The metrics with their intervals, and by reason those that have none: from the table, as anyone can later."""
    # Of the first head alone, though `value` is the mean of all: `from_table` does not take several seeds yet.
    found = {target.name: intervals(from_table(first_seed(table), target.name)) for target in targets}
    refused: dict[str, list[str]] = {}
    for metric in results:
        if metric.name != LOSS and (reason := found[metric.target].refused.get(metric.name)):
            refused.setdefault(reason, []).append(metric.key)
    return tuple(
        metric if metric.name == LOSS else replace(metric, interval=found[metric.target].values.get(metric.name))
        for metric in results
    ), refused


def _predict(embeddings: Embeddings, head: Head) -> list[torch.Tensor]:
    """For each target, a head's outputs on the test part, shape (units, outputs)."""
    part, device = embeddings.examples.test, next(head.parameters()).device
    with torch.autocast(device.type, enabled=False):
        data, batch_size = Data(embeddings.rows("test"), part, device), embeddings.examples.task.batch_size
        return predict(head, data, np.arange(len(part)), batch_size)


def _tensors(arrays: list[Any]) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in arrays]


def _metrics_of(output: npt.NDArray[np.float64], value: npt.NDArray[Any], target: Target) -> TargetMetrics:
    if target.classes is None:
        return regression(value, output[:, 0])
    return classification(value, _softmax(output), target.classes)


def _constant(train: npt.NDArray[Any], n: int, target: Target) -> npt.NDArray[np.float64]:
    """The outputs, shape (n, outputs), of a head that knows nothing but the train labels."""
    if target.classes is None:
        return np.full((n, 1), train.mean())
    logits = np.zeros((n, target.outputs))
    logits[:, np.bincount(train).argmax()] = 1
    return logits


def _softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(torch.softmax(torch.from_numpy(logits), dim=1).numpy())


def _table(part: Part, targets: tuple[Target, ...], outputs: list[torch.Tensor], seed: int) -> pa.Table:
    """One row per unit, from which anyone can compute each metric of a head again."""
    rows = np.repeat(np.arange(len(part)), part.counts)
    columns: dict[str, pa.Array] = {"seed": pa.array(np.full(len(rows), seed, np.int64))}
    columns |= {"row": pa.DictionaryArray.from_arrays(rows.astype(np.int32), part.rows)}
    if len(rows) != len(part) or part.counts.max() > 1:
        first = np.repeat(np.cumsum(part.counts) - part.counts, part.counts)
        columns["position"] = pa.array((np.arange(len(rows)) - first).astype(np.int32))
    for target, output, value, mask in zip(targets, outputs, part.values, part.masks, strict=True):
        if target.classes is None:
            columns[f"{target.name}_target"] = pa.array(value, mask=~mask)
            columns[f"{target.name}_prediction"] = pa.array(output.numpy()[:, 0])
        else:
            names = [*target.classes, *(f"class {index}" for index in range(len(target.classes), target.outputs))]
            probabilities = _softmax(output.numpy())
            columns[f"{target.name}_target"] = _labels(value, names, ~mask)
            columns[f"{target.name}_prediction"] = _labels(probabilities.argmax(1), names, None)
            columns[f"{target.name}_probabilities"] = _lists(probabilities)
        columns[f"{target.name}_mask"] = pa.array(mask)
    return pa.table(columns)


def _labels(indices: npt.NDArray[Any], names: list[str], null: npt.NDArray[np.bool_] | None) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(indices.astype(np.int32), mask=null), names)


def _lists(values: npt.NDArray[np.float64]) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
