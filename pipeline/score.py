"""Stage 4: a `FittedHead` and the test part to `Scores`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipeline.config.schema import LOSS, Config, metric_name, metric_stems
from pipeline.embed import Embeddings
from pipeline.heads.batches import Data
from pipeline.heads.fit import loss_of, predict
from pipeline.load import Examples, Part, Target
from pipeline.statistics.metrics import Metrics, classification, regression
from pipeline.train_head import FittedHead

HEADLINE = {"classification": "accuracy", "regression": "spearman"}  # the metric to show where there is room for one
LOWER_IS_BETTER = (LOSS, "_mse", "_rmse", "_mae")
FLOORS = ("accuracy", "macro_f1", "mse", "rmse", "mae")  # metrics for which a constant guess says something


@dataclass(frozen=True)
class Scores:
    """What a checkpoint's embeddings are worth on a task.

    Attributes:
        task_name: the task.
        metrics: by name, such as `test_3state_accuracy`, over the whole test set.
        omitted: why further metrics are not defined on this data.
        constant: for some of the metrics, what the best constant guess from the train part reaches: its most frequent
            class, or its mean.
        predictions: a row per unit of the test set: `row` (FILE:ROW), `position` in token-level tasks, and for each
            target `<target>_target`, `_mask`, `_prediction` and, for classes, `_probabilities`.
        losses: the head's mean training loss at each epoch.
        held_losses: with `patience`, the loss on the held-out part after each epoch.
        examples: what was scored.
        notes: warnings from the stages before.
    """

    task_name: str
    metrics: dict[str, float]
    omitted: dict[str, str]
    constant: dict[str, float]
    predictions: pa.Table
    losses: list[float]
    held_losses: list[float]
    examples: Examples
    notes: tuple[str, ...] = ()

    def prefixed(self, prefix: str) -> Scores:
        """The same with `prefix` in front of every metric's name."""
        return replace(
            self,
            metrics={prefix + name: value for name, value in self.metrics.items()},
            omitted={prefix + name: reason for name, reason in self.omitted.items()},
            constant={prefix + name: value for name, value in self.constant.items()},
        )


def score(embeddings: Embeddings, fitted: FittedHead) -> Scores:
    """Predicts the whole test part and computes every metric on it."""
    examples = embeddings.examples
    targets, part = examples.targets, examples.test
    names = [metric_name(target.name) for target in targets]
    outputs = _predict(embeddings, fitted)
    values = {LOSS: float(loss_of(outputs, _tensors(part.values), _tensors(part.masks), targets))}
    omitted: dict[str, str] = {}
    constant: dict[str, float] = {}
    for index, (name, target) in enumerate(zip(names, targets, strict=True)):
        mask, train = part.masks[index], examples.train
        true = part.values[index][mask]
        found = _metrics(outputs[index].numpy()[mask], true, target)
        guess = _constant(train.values[index][train.masks[index]], len(true), target)
        floors = _metrics(guess, true, target).values
        values.update({f"test_{name}_{metric}": number for metric, number in found.values.items()})
        omitted.update({f"test_{name}_{metric}": reason for metric, reason in found.omitted.items()})
        constant.update({f"test_{name}_{metric}": floors[metric] for metric in FLOORS if metric in floors})
    for name in [name for name, value in values.items() if not np.isfinite(value)]:
        omitted[name] = f"it is {values.pop(name)}: the labels or the head's outputs are out of range"
    table = _table(part, targets, outputs)
    notes = examples.notes + embeddings.notes
    worse = [name for name, floor in constant.items() if name.endswith("_mse") and values.get(name, 0.0) > floor]
    if worse:
        remedy = "train longer, raise optim.lr, or bring the labels to a mean of 0 and a deviation of 1"
        notes += (f"{', '.join(worse)} is worse than a constant guess: {remedy}",)
    losses = fitted.losses, fitted.held_losses
    return Scores(examples.task.task_name, values, omitted, constant, table, *losses, examples, notes)


def headlines(config: Config) -> list[str]:
    """The names of the metrics to be shown in a line: one per target."""
    kinds = [HEADLINE[task.task_type] for task in config.dataset for _ in task.target_column]
    stems = [stem for stem in metric_stems(config) if not stem.endswith(LOSS)]
    return [stem + kind for stem, kind in zip(stems, kinds, strict=True)]


def lower_is_better(metric: str) -> bool:
    """Whether the better of two checkpoints has the lower value."""
    return metric.endswith(LOWER_IS_BETTER)


def _predict(embeddings: Embeddings, fitted: FittedHead) -> list[torch.Tensor]:
    """For each target, the head's outputs on the test part, shape (units, outputs)."""
    part, device = embeddings.examples.test, next(fitted.head.parameters()).device
    with torch.autocast(device.type, enabled=False):
        data, batch_size = Data(embeddings.rows("test"), part, device), embeddings.examples.task.batch_size
        return predict(fitted.head, data, np.arange(len(part)), batch_size)


def _tensors(arrays: list[Any]) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in arrays]


def _metrics(output: npt.NDArray[np.float64], value: npt.NDArray[Any], target: Target) -> Metrics:
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


def _table(part: Part, targets: tuple[Target, ...], outputs: list[torch.Tensor]) -> pa.Table:
    """One row per unit, from which anyone can compute each metric again."""
    rows = np.repeat(np.arange(len(part)), part.counts)
    columns: dict[str, pa.Array] = {"row": pa.DictionaryArray.from_arrays(rows.astype(np.int32), part.rows)}
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
