"""The probe beside the head on real data: its cost, and how far it is from scikit-learn's `RidgeCV`.

    python benchmarks/probe.py --data FOLDER [--sets NAME ...] [--width 96] [--layers 2] [--window 1] [--limit N]
        [--rounds 3] [--cpu-time] [--json FILE]

FOLDER holds the data sets in `SETS`; `stability` is of the sample data. Embeddings are those of an ESM of random
weights, in memory. Timed are the fit and the predictions on the test part of the probe, and of the head with the
default settings: 10 epochs in batches of 128. `RidgeCV` gets the same standardised embeddings, in token-level tasks the
same folds and the sum of squared errors as its score.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import StandardScaler
from timing import in_turn, write
from work import make_esm

from pipeline import Store, Task
from pipeline.data.parts import Part
from pipeline.embed import Embeddings, embed
from pipeline.heads import ridge
from pipeline.heads.batches import Data
from pipeline.heads.fit import fit, predict
from pipeline.heads.probe import Probe, fit_probe, folds_of
from pipeline.load import load
from pipeline.train_head import make_head

CPU = torch.device("cpu")
CLOCK: list[Callable[[], float]] = [time.perf_counter]
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Set:
    """A data set: its folder, the labels, and the task's options."""

    folder: str
    target: str
    options: dict[str, Any]


CLASSES = {"task_type": "classification"}
SAMPLE = Path(__file__).parents[1] / "sample/data/proteins"
SETS = {
    "gb1_fitness": Set("gb1_fitness", "target", {}),
    "membrane_soluble": Set("membrane_soluble", "membrane", CLASSES),
    "scl10": Set("scl10", "location", CLASSES),
    "ss3_flip": Set("ss3_flip", "3state", {**CLASSES, "level": "token", "mask_column": ["resolved"]}),
    "stability": Set(str(SAMPLE), "stability", {}),
}


def task_of(name: str, options: argparse.Namespace) -> Task:
    """The task of a data set, with every file of its train part."""
    one = SETS[name]
    task = Task(task_name=name, dataset_path=str(options.data / one.folder), target_column=[one.target], **one.options)
    files = {kind: len(list((options.data / one.folder / kind).glob("x*.csv"))) for kind in ("train", "test")}
    task.dataset = replace(task.dataset, **{kind: f"x[000..{count - 1:03d}]" for kind, count in files.items()})
    task.max_rows.train = options.limit or None
    task.probe_window = options.window if task.level == "token" else 1
    return task


def time_head(embeddings: Embeddings) -> float:
    """Seconds of the head."""
    examples, began = embeddings.examples, CLOCK[0]()
    module = make_head(examples.task, embeddings.table.hidden_size, examples.targets, CPU)
    fit([module], [examples.task.random_seed], embeddings, CPU)
    data = Data(embeddings.rows("test"), examples.test, CPU)
    predict(module.eval(), data, np.arange(len(examples.test)), examples.task.batch_size)
    return CLOCK[0]() - began


def time_probe(embeddings: Embeddings) -> float:
    """Seconds of the probe."""
    began = CLOCK[0]()
    fit_probe(embeddings).predict(embeddings.rows("test"), embeddings.examples.test)
    return CLOCK[0]() - began


def windows(values: Array, counts: npt.NDArray[np.int64], window: int) -> Array:
    """Rows of each sequence with their neighbours', sequence by sequence."""
    half, found = window // 2, []
    for one in np.split(values, np.cumsum(counts)[:-1]):
        padded = np.pad(one, ((half, half), (0, 0)))
        found.append(np.concatenate([padded[place : place + len(one)] for place in range(window)], 1))
    return np.concatenate(found)


def least_squares(model: RidgeCV, features: Array, labels: Array) -> float:
    """What `RidgeCV` is to choose by: the sum over the units of a fold."""
    return float(-((model.predict(features).reshape(labels.shape) - labels) ** 2).sum())


def theirs(embeddings: Embeddings, ours: Probe) -> tuple[float, float, float]:
    """The penalty that `RidgeCV` chooses; how far its predictions on the test part are from ours; their largest."""
    examples, columns = embeddings.examples, ours.features.columns

    def values(part: Part, name: str) -> Array:
        states: Array = embeddings.rows(name).gather(np.arange(len(part))).numpy().astype(np.float64)
        return states[:, columns]

    train, target = examples.train, examples.targets[0]
    scaler = StandardScaler().fit(values(train, "train"))
    mask, window = train.masks[0], examples.task.probe_window
    features = windows(scaler.transform(values(train, "train")), train.counts, window)[mask]
    labels = train.values[0][mask][:, None]
    labels = labels.astype(np.float64) if target.classes is None else (labels == np.arange(target.outputs)) * 1.0
    model = RidgeCV(ridge.PENALTIES)
    if examples.task.level == "token":
        fold = np.repeat(folds_of(train), train.counts)[mask]
        splits = [(np.flatnonzero(fold != one), np.flatnonzero(fold == one)) for one in np.unique(fold)]
        model = RidgeCV(ridge.PENALTIES, cv=splits, scoring=least_squares)
    model.fit(features, labels)
    test = windows(scaler.transform(values(examples.test, "test")), examples.test.counts, window)
    (mine,) = ours.predict(embeddings.rows("test"), examples.test)
    predicted = model.predict(test).reshape(mine.shape)
    return float(model.alpha_), float(np.abs(predicted - mine).max()), float(np.abs(predicted).max())


def condition(embeddings: Embeddings, ours: Probe) -> float:
    """The greatest eigenvalue of the embeddings' correlations by the least: how nearly collinear the columns are."""
    part = embeddings.examples.train
    chunks = (values for _, values in replace(ours.features, window=1).chunks(embeddings.rows("train"), part))
    eigenvalues = np.linalg.eigvalsh(sum(values.T @ values for values in chunks))
    return float(eigenvalues[-1] / max(eigenvalues[0], 1e-300))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--window", type=int, default=1, help="of the probe, in token-level tasks")
    parser.add_argument("--limit", type=int, default=0, help="most train sequences; 0 for all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds of one thread: on a busy machine")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.cpu_time:
        torch.set_num_threads(1)
        CLOCK[0] = time.process_time
    view = Table(title=f"An ESM of {options.layers} layers, width {options.width}", box=MARKDOWN)
    for column in (
        "",
        "train units",
        "head s",
        "probe s",
        "probe / head",
        "penalty",
        "RidgeCV's",
        "apart",
        "condition",
    ):
        view.add_column(column, justify="right" if column else "left")
    encoder, results = make_esm(options.layers, options.width, options.width // 16), []
    for name in options.sets:
        with tempfile.TemporaryDirectory() as folder:
            (one,) = embed([load(task_of(name, options), encoder.max_seq_length)], encoder, Store(Path(folder)))
            ways = {"head": partial(time_head, one), "probe": partial(time_probe, one)}
            seconds = in_turn(ways, options.rounds, warm=True)
            ratios = [probe / head for head, probe in zip(seconds["head"], seconds["probe"], strict=True)]
            ours = fit_probe(one)
            chosen = ours.penalties[SETS[name].target]
            penalty, apart, largest = theirs(one, ours)
            found = {
                "set": name,
                "units": int(one.examples.train.masks[0].sum()),
                "seconds": seconds,
                "ratio": float(np.median(ratios)),
                "penalty": chosen,
                "of_ridgecv": penalty,
                "apart": apart / max(1, largest),
                "condition": condition(one, ours),
            }
        medians = [f"{np.median(seconds[way]):.3f}" for way in ways]
        numbers = [f"{found['ratio']:.3f}", f"{chosen:g}", f"{penalty:g}", f"{found['apart']:.0e}"]
        view.add_row(name, f"{found['units']:,}", *medians, *numbers, f"{found['condition']:.0e}")
        results.append(found)
    Console(width=120).print(view)
    write(results, options.json)


if __name__ == "__main__":
    main()
