"""Data sets made up on the spot, and the tasks that read them."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.config.task import Files, Task
from tests.support.models import RESIDUES

ADAM = {"name": "adam", "lr": 0.01}
TEXTS = ["MKV", "ACDEFGHIKL", "GG", "MKVLAAGIVG" * 3, "WWW", "A"]


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """A CSV file with the keys of the first row as its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def make_task(
    folder: Path,
    train: Sequence[Mapping[str, object]],
    test: Sequence[Mapping[str, object]] | None = None,
    **options: Any,
) -> Task:
    """Writes the rows and gives the task that reads them; the last column is the target unless said otherwise."""
    write_csv(folder / "train" / "x000.csv", train)
    write_csv(folder / "test" / "x000.csv", test if test is not None else train)
    given: dict[str, Any] = {"dataset_path": str(folder), "dataset": Files(), "target_column": [list(train[0])[-1]]}
    given |= {"num_seeds": 1, "baselines": False}  # a test that is not about these needs one head
    return Task(**{**given, **options})


def token_task(folder: Path, texts: list[str] = TEXTS, **options: Any) -> Task:
    rows = [{"sequence": text, "y": json.dumps([0.5] * len(text))} for text in texts]
    return make_task(folder / "tokens", rows, level="token", task_name="tokens", **options)


def proteins(n: int, seed: int, longest: int = 30) -> list[str]:
    source = random.Random(seed)
    return ["".join(source.choice(RESIDUES) for _ in range(source.randint(5, longest))) for _ in range(n)]


def planted(texts: list[str]) -> list[dict[str, object]]:
    """A residue is `Y` where a W stands two places behind it: only aligned embeddings can tell."""
    labels = [
        "".join("Y" if text[i + 2 : i + 3] in ("W", "C", "D") else "n" for i in range(len(text))) for text in texts
    ]
    masks = ["".join("0" if letter == "M" else "1" for letter in text) for text in texts]
    numbers = [json.dumps([float(text[i + 2 : i + 3] == "W") for i in range(len(text))]) for text in texts]
    columns = zip(texts, labels, masks, numbers, strict=True)
    return [{"sequence": text, "label": y, "seen": mask, "number": z} for text, y, mask, z in columns]


def planted_task(folder: Path, **options: Any) -> Task:
    settings: dict[str, Any] = {
        "level": "token",
        "task_type": "classification",
        "target_column": ["label"],
        "mask_column": ["seen"],
        "num_epochs": 30,
        "batch_size": 16,
        "optim": ADAM,
    }
    return make_task(folder, planted(proteins(80, 1)), planted(proteins(30, 2)), **{**settings, **options})


def planted_task_at(folder: Path) -> Task:
    """The planted task on files that are there already."""
    task = planted_task(folder / "again")
    return replace(task, dataset_path=str(folder))


def column(table: pa.Table, name: str) -> list[Any]:
    values: list[Any] = table[name].to_pylist()
    return values
