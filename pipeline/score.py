"""Stage 4: a `FittedHead` and the test part to `Scores`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipeline.data.parts import Target
from pipeline.data.prediction_table import prediction_table
from pipeline.embed import Embeddings
from pipeline.heads.architectures import Head
from pipeline.heads.batches import Data
from pipeline.heads.fit import predict
from pipeline.heads.loss import loss_of
from pipeline.heads.verdict import Verdict, collapsed, verdicts
from pipeline.load import Examples
from pipeline.statistics.intervals import intervals
from pipeline.statistics.metrics import HAVE_CONSTANT, LOSS, PROBE, Metric, TargetMetrics, metric_name, over_seeds
from pipeline.statistics.per_class import classes_of
from pipeline.statistics.predictions import Floats, Predictions, first_seed, from_table
from pipeline.statistics.target_metrics import target_metrics
from pipeline.train_head import FittedHead

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Scores:
    """What a checkpoint's embeddings are worth on a task.

    Attributes:
        examples: what was scored.
        results: the metrics, over the whole test set: the loss, and those of the head, for each target, as the mean
            over its seeds; then the probe's.
        omitted: by name, why further metrics are not defined on this data.
        table: the predictions, for each seed of the head a row per unit of the test set: `seed`, `row` (FILE:ROW),
            `position` in token-level tasks, and for each target `<target>_target`, `_mask`, `_prediction` and, for
            classes, `_probabilities`; where there is a probe `<target>_probe_prediction` and `_probe_probabilities`,
            the same for each seed, and for ridge its scores. One seed stands behind another.
        losses: the first head's mean training loss at each epoch.
        val_losses: with `patience`, the loss on the validation examples after each epoch.
        notes: warnings about the scores.
        earlier_notes: warnings from the stages before.
        companions: by name, what the embeddings are like whatever the labels; see `Embeddings.label_free`.
        verdicts: what is wrong with the head; in full among the notes.
        baselines: by name of a headline metric, what a baseline reaches in it, also where the checkpoint's is not
            defined; see `baseline_scores`.
        head: that of the first seed, which is served; None where it is not at hand.
    """

    examples: Examples
    results: tuple[Metric, ...]
    omitted: dict[str, str]
    table: pa.Table
    losses: list[float]
    val_losses: list[float]
    notes: tuple[str, ...] = ()
    earlier_notes: tuple[str, ...] = ()
    companions: dict[str, float] = field(default_factory=dict)
    verdicts: tuple[Verdict, ...] = ()
    baselines: dict[str, float] = field(default_factory=dict)
    head: Head | None = None

    @property
    def task_name(self) -> str:
        """The task's name."""
        return self.examples.task.task_name

    @property
    def metrics(self) -> dict[str, float]:
        """The values by name, such as `test_3state_accuracy`, each with its noise and its interval.

        Then the baselines, and the companions.
        """
        parsed = [(Metric.parse(key), value) for key, value in self.baselines.items()]
        lines = [metric.of_baseline(value) for metric, value in parsed if metric]
        named = {name: value for metric in (*self.results, *lines) for name, value in metric.named.items()}
        return named | self.companions

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

    @cached_property
    def classes(self) -> pd.DataFrame:
        """For each target whose labels are classes a row per class, see `per_class`; the probe's are `probe_...`."""
        probes = {metric.target for metric in self.results if metric.probe}
        return classes_of(self.table, [target.name for target in self.examples.targets if target.classes], probes)


def score(embeddings: Embeddings, fitted: FittedHead, in_list: bool = False) -> Scores:
    """Predicts the whole test part and computes every metric on it.

    Args:
        embeddings: of the test part.
        fitted: the heads, and the probe.
        in_list: the task is one of a list, where the names of metrics begin with the task's.
    """
    examples = embeddings.examples
    task_name = examples.task.task_name if in_list else ""
    rows, device = embeddings.rows("test"), next(fitted.head.parameters()).device
    of_probe = {PROBE: fitted.probe.predict(rows, examples.test)} if fitted.probe else {}
    guesses = [_constant(examples, index) for index in range(len(examples.targets))]
    data, measured, tables = Data(rows, examples.test, device), [], []
    for one in fitted.heads:
        outputs = _predict(one.head, data, examples.task.batch_size)
        answers = [_answers(output, target) for output, target in zip(outputs, examples.targets, strict=True)]
        found, why = _results(examples, answers, guesses, task_name)
        measured.append(([_loss(examples, outputs, task_name), *found], why))
        tables.append(prediction_table(examples.test, examples.targets, {"": answers, **of_probe}, one.seed))
    results, omitted = over_seeds([_finite(*one) for one in measured])
    if of_probe:
        found, why = _finite(*_results(examples, of_probe[PROBE], guesses, task_name, probe=True))
        results, omitted = results + found, omitted | why
    table = pa.concat_tables(tables).combine_chunks()
    with_intervals, refused = _with_intervals(results, table, examples.targets)
    notes = [f"{names} left out: {reason}" for reason, names in by_reason(omitted, ("is", "are")).items()]
    notes += [f"{names}: {reason}" for reason, names in by_reason(refused).items()]
    found_wrong = (*collapsed(embeddings.collapse), *verdicts(examples, fitted.heads, with_intervals))
    return Scores(
        examples,
        with_intervals,
        omitted,
        table,
        fitted.losses,
        fitted.val_losses,
        tuple(notes + [one.text for one in found_wrong]),
        examples.notes + embeddings.notes + fitted.notes,
        companions(embeddings, in_list),
        found_wrong,
    )


def companions(embeddings: Embeddings, in_list: bool) -> dict[str, float]:
    """What the embeddings of a task are like, under the names that are logged: in a list they begin with the task's."""
    prefix = f"{metric_name(embeddings.examples.task.task_name)}/" if in_list else ""
    return {prefix + name: value for name, value in embeddings.label_free.items()}


def _results(
    examples: Examples, answers: list[Floats], guesses: list[dict[str, float]], task_name: str, probe: bool = False
) -> tuple[list[Metric], dict[str, str]]:
    """The metrics of a head or a probe, beside those of a constant guess, and by name why others are not defined."""
    results, omitted = [], dict[str, str]()
    for index, (target, numbers, guess) in enumerate(zip(examples.targets, answers, guesses, strict=True)):
        found = _metrics_of(examples, index, numbers)
        results += [
            Metric(task_name, target.name, name, value, guess.get(name), probe=probe)
            for name, value in found.values.items()
        ]
        undefined = {Metric(task_name, target.name, name, probe=probe).key: why for name, why in found.omitted.items()}
        omitted.update(undefined)
    return results, omitted


def _finite(results: list[Metric], omitted: dict[str, str]) -> tuple[list[Metric], dict[str, str]]:
    """The metrics that are finite numbers, and by name why others are left out."""
    for metric in results:
        if not math.isfinite(metric.value):
            source = "probe" if metric.probe else "head"
            omitted[metric.key] = f"it is {metric.value}: the labels or the {source}'s outputs are out of range"
    return [metric for metric in results if math.isfinite(metric.value)], omitted


def _with_intervals(
    results: list[Metric], table: pa.Table, targets: tuple[Target, ...]
) -> tuple[tuple[Metric, ...], dict[str, str]]:
    """The metrics with their intervals, and by name why some have none: from the table, as anyone can later."""
    kinds = {metric.probe for metric in results}
    found = {
        (target.name, probe): intervals(from_table(table, target.name, probe)) for target in targets for probe in kinds
    }
    refused: dict[str, str] = {}
    for place, metric in enumerate(results):
        if metric.name == LOSS:
            continue
        of_target = found[metric.target, metric.probe]
        results[place] = replace(metric, interval=of_target.values.get(metric.name))
        if reason := of_target.refused.get(metric.name):
            refused[metric.key] = reason
    return tuple(results), refused


def by_reason(reasons: Mapping[str, str], verbs: tuple[str, str] = ("", "")) -> dict[str, str]:
    """Reasons by name to names by reason, in words, and a verb for one name or for several.

    What holds for the head and the probe alike is named once.
    """
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    words = {}
    for reason, every in names.items():
        of_probe = {name: metric.beside.key for name in every if (metric := Metric.parse(name)) and metric.probe}
        both = [name for name in every if name in of_probe.values()]
        alone = [name for name in every if name not in both and of_probe.get(name) not in both]
        said = ", ".join([*([f"{', '.join(both)} and the probe's"] if both else []), *alone])
        words[reason] = f"{said} {verbs[len(every) > 1]}".rstrip()
    return words


def _predict(head: Head, data: Data, batch_size: int) -> list[torch.Tensor]:
    """For each target, a head's outputs on the test part, shape (units, outputs)."""
    with torch.autocast(data.device.type, enabled=False):
        return predict(head, data, np.arange(len(data.part)), batch_size)


def _loss(examples: Examples, outputs: list[torch.Tensor], task_name: str) -> Metric:
    """The test loss of a head, over all targets."""
    part = examples.test
    loss = loss_of(outputs, _tensors(part.values), _tensors(part.masks), examples.targets)
    return Metric(task_name, "", LOSS, float(loss))


def _tensors(arrays: list[Any]) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in arrays]


def _answers(output: torch.Tensor, target: Target) -> Floats:
    """A head's outputs to numbers or probabilities, shape (units, outputs)."""
    return np.asarray((output if target.classes is None else torch.softmax(output, dim=1)).numpy())


def _metrics_of(examples: Examples, index: int, answers: Floats) -> TargetMetrics:
    """The metrics of a target from what is predicted for all units of the test part, shape (units, outputs)."""
    target, test = examples.targets[index], examples.test
    mask = test.masks[index]
    counts = np.add.reduceat(mask, np.cumsum(test.counts) - test.counts, dtype=np.int64)
    predicted = answers[mask, 0] if target.classes is None else answers[mask]
    true: npt.NDArray[Any] = test.values[index][mask]
    predictions = Predictions(true, predicted, counts[counts > 0], target.classes)
    return target_metrics(predictions, examples.task.level)


def _constant(examples: Examples, index: int) -> dict[str, float]:
    """The metrics that say something of a head that knows nothing but the train labels of a target."""
    target, train, test = examples.targets[index], examples.train, examples.test
    known = train.values[index][train.masks[index]]
    answers = np.zeros((len(test.values[index]), target.outputs))
    if target.classes is None:
        answers[:] = known.mean()
    else:
        answers[:, np.bincount(known).argmax()] = 1
    found = _metrics_of(examples, index, answers).values
    return {name: value for name, value in found.items() if name in HAVE_CONSTANT}
