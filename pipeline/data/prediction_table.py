"""The table of predictions: what is kept of them, and what metrics, intervals and differences are computed from."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.data.parts import Part, Target
from pipeline.statistics.predictions import Floats


def prediction_table(part: Part, targets: tuple[Target, ...], answers: dict[str, list[Floats]], seed: int) -> pa.Table:
    """A row per unit of the test part, from which anyone can compute each metric again.

    Args:
        part: the test part.
        targets: of the task.
        answers: for each target, what is predicted, shape (units, outputs): under "" the head's numbers or
            probabilities, under `PROBE` the probe's.
        seed: of the head.
    """
    rows = np.repeat(np.arange(len(part)), part.counts)
    columns: dict[str, pa.Array] = {"seed": pa.array(np.full(len(rows), seed, np.int64))}
    columns |= {"row": pa.DictionaryArray.from_arrays(rows.astype(np.int32), part.rows)}
    if len(rows) != len(part) or part.counts.max() > 1:
        first = np.repeat(np.cumsum(part.counts) - part.counts, part.counts)
        columns["position"] = pa.array((np.arange(len(rows)) - first).astype(np.int32))
    for index, (target, value, mask) in enumerate(zip(targets, part.values, part.masks, strict=True)):
        names, numbers = target.labels, target.classes is None
        columns[f"{target.name}_target"] = pa.array(value, mask=~mask) if numbers else _labels(value, names, ~mask)
        columns[f"{target.name}_mask"] = pa.array(mask)
        for who, found in answers.items():
            stem, answer = f"{target.name}{who}", found[index]
            if numbers:
                columns[f"{stem}_prediction"] = pa.array(answer[:, 0])
            else:
                columns[f"{stem}_prediction"] = _labels(answer.argmax(1), names, None)
                columns[f"{stem}_probabilities"] = _lists(answer)
    return pa.table(columns)


def _labels(indices: npt.NDArray[Any], names: list[str], null: npt.NDArray[np.bool_] | None) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(indices.astype(np.int32), mask=null), names)


def _lists(values: npt.NDArray[np.float64]) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
