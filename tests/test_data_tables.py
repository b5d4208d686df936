"""DataFrames in place of files: the same examples, and errors that name the frame."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline.config.task import Task
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.load import load
from pipeline.store.embedding_table import Store
from pipeline.validation import validate
from tests.support.data import make_task
from tests.support.encoders import FakeEncoder

SEQUENCES = ["MKV", "AC", "GGGG"]
COLUMNS: dict[tuple[str, str], list[Any]] = {
    ("sequence", "regression"): [0.1, -3, 1e-300],
    ("sequence", "classification"): ["nan", "0011", "a,b"],
    ("token", "classification"): ["HEH", "01", "EEEE"],
    ("token", "regression"): [[1.0, None, -2.5], np.array([0.25, np.nan]), (1, 2, 3, 4)],
}

NO_SEQUENCE = {"sequence": pd.Series(["M", pd.NA], dtype=object), "y": [1.0, 2.0]}


def text(cell: Any) -> Any:
    """A cell as a user writes it into a CSV file."""
    if isinstance(cell, (str, int, float)):
        return cell
    return str([None if value is None or np.isnan(value) else float(value) for value in cell]).replace("None", "null")


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_frame_gives_what_its_file_gives(tmp_path: Path, kind: tuple[str, str]) -> None:
    cells = COLUMNS[kind]
    files = make_task(
        tmp_path,
        [{"sequence": s, "y": text(cell)} for s, cell in zip(SEQUENCES, cells, strict=True)],
        level=kind[0],
        task_type=kind[1],
    )
    frame = pd.DataFrame({"sequence": SEQUENCES, "y": pd.Series(cells, dtype=object)})
    told = load(replace(files, dataset_path=""), frames={"train": frame, "test": frame})
    read = load(files)
    assert told.train.digest == read.train.digest
    assert told.targets == read.targets
    assert told.test.rows == ["test:0", "test:1", "test:2"]


def test_masks_are_text_or_booleans(tmp_path: Path) -> None:
    task = Task(level="token", task_type="classification", target_column=["y"], mask_column=["m"])
    for mask in (["101", "11"], [[True, False, True], [np.True_, True]]):
        frame = pd.DataFrame({"y": ["HEH", "EE"], "m": mask, "sequence": ["MKV", "AC"]}, index=[7, 7])
        assert load(task, frames={"train": frame, "test": frame}).train.masks[0].tolist() == [
            True,
            False,
            True,
            True,
            True,
        ]


def test_a_score_is_that_of_the_files(tmp_path: Path) -> None:
    rows = [{"sequence": "M" * (n % 9 + 1), "y": n % 9} for n in range(30)]
    files = make_task(tmp_path / "data", rows, num_epochs=1)
    (read,) = validate(FakeEncoder(), files, Store(tmp_path / "a"))
    task, frame = replace(files, dataset_path=""), pd.DataFrame(rows)
    frames = {"train": frame, "test": frame}
    (told,) = validate(FakeEncoder(), task, Store(tmp_path / "b"), examples=[load(task, frames=frames)])
    assert told.metrics == read.metrics
    pd.testing.assert_frame_equal(told.predictions.drop(columns="row"), read.predictions.drop(columns="row"))
    assert told.predictions["y_target"].tolist() == [float(n % 9) for n in range(30)]


@pytest.mark.parametrize(
    ("frames", "kind", "message"),
    [
        ({"train": pd.DataFrame({"sequence": ["M"], "y": [1.0]})}, ConfigError, "frames: expected train, test and"),
        ({"y": [1.0], "sequnce": ["M"]}, DataError, r"frames\['train'\]: expected a column 'sequence', .*'sequnce'"),
        ({"sequence": [], "y": []}, DataError, r"frames\['train'\]: expected rows, found none"),
        (
            {"sequence": ["M", "A"], "y": [1.0, None]},
            DataError,
            r"\['train'\], row 1: column 'y': expected a number",
        ),
        (NO_SEQUENCE, DataError, r"row 1: column 'sequence': expected a sequence"),
    ],
)
def test_what_is_wrong_names_frame_row_and_column(frames: Any, kind: type[PipelineError], message: str) -> None:
    if "train" not in frames:
        frames = dict.fromkeys(("train", "test"), pd.DataFrame(frames))
    with pytest.raises(kind, match=message):
        load(Task(target_column=["y"]), frames=frames)


def test_a_sequence_that_the_encoder_does_not_know(tmp_path: Path) -> None:
    known, unknown = (pd.DataFrame({"sequence": ["MK", text], "y": [1.0, 2.0]}) for text in ("AC", "???"))
    examples = [load(Task(target_column=["y"]), frames={"train": known, "test": unknown})]
    with pytest.raises(DataError, match=r"frames\['test'\], row 1: column 'sequence': .* found '\?\?\?'"):
        validate(FakeEncoder(), examples[0].task, Store(tmp_path), examples=examples)


def test_files_still_need_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dataset_path is missing"):
        validate(FakeEncoder(), Task(target_column=["y"]), Store(tmp_path))
