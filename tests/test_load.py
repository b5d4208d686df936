"""CSV files to examples, worked by hand. What is refused is in test_errors.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.task import Files, Task
from pipeline.data.parts import UNKNOWN, unit_index
from pipeline.errors import DataError
from pipeline.load import Examples, load
from tests.support.data import make_task, write_csv


def test_token_classes_masks_and_vocabulary_by_hand(tmp_path: Path) -> None:
    train = [
        {"sequence": "MKV", "ss": "HEC", "seen": "011", "y": "?"},
        {"sequence": "ACDEF", "ss": "CCZHH", "seen": "11011", "y": "?"},
    ]
    test = [{"sequence": "MK", "ss": "QE", "seen": "01", "y": "?"}]
    options = {"level": "token", "task_type": "classification", "target_column": ["ss"], "mask_column": ["seen"]}
    examples = load(make_task(tmp_path, train, test, **options))
    (target,) = examples.targets
    assert target.classes == ("C", "E", "H")  # Z and Q stand under masks: they are not looked at
    assert target.outputs == 3
    assert examples.train.sequences == ["MKV", "ACDEF"]
    assert examples.train.rows == ["x000.csv:0", "x000.csv:1"]
    assert examples.train.counts.tolist() == [3, 5]
    assert examples.train.values[0].tolist() == [UNKNOWN, 1, 0, 0, 0, UNKNOWN, 2, 2]
    assert examples.train.masks[0].tolist() == [False, True, True, True, True, False, True, True]
    assert examples.test.values[0].tolist() == [UNKNOWN, 1]


def test_token_numbers_with_nulls_by_hand(tmp_path: Path) -> None:
    train = [{"sequence": "MKV", "score": "[1, null, -2.5]"}, {"sequence": "A", "score": "[0]"}]
    examples = load(make_task(tmp_path, train, level="token"))
    assert examples.train.values[0].tolist() == [1.0, 0.0, -2.5, 0.0]
    assert examples.train.masks[0].tolist() == [True, False, True, True]


def test_digit_strings_keep_their_zeros(tmp_path: Path) -> None:
    train = [{"sequence": "MKVA", "metal": "0011"}, {"sequence": "MK", "metal": "00"}]
    examples = load(make_task(tmp_path, train, level="token", task_type="classification"))
    assert examples.train.values[0].tolist() == [0, 0, 1, 1, 0, 0]


BAD: list[tuple[dict[str, Any], str, str, str]] = [
    ({}, "1.5", "", "a number"),
    ({"task_type": "classification"}, "a", "", "a class name"),
    ({"level": "token"}, "[1, null]", "[1]", "a JSON list of 2 numbers or nulls"),
    ({"level": "token", "task_type": "classification"}, "HE", "H", "2 characters, one per residue"),
]


@pytest.mark.parametrize(("options", "good", "wrong", "expected"), BAD)
def test_all_bad_cells_of_a_column_are_counted(
    options: dict[str, Any], good: str, wrong: str, expected: str, tmp_path: Path
) -> None:
    task = make_task(tmp_path, [{"sequence": "MK", "y": good}], **options)
    for name in ("x000", "x001"):
        labels = [good, wrong, good, wrong, wrong, wrong]
        write_csv(tmp_path / "train" / f"{name}.csv", [{"sequence": "MK", "y": label} for label in labels])
    task.dataset = Files("x[000..001]", "x000")
    with pytest.raises(DataError) as found:
        load(task)
    start, cells, remedy = str(found.value).split("; ")
    count, also = cells.split(", also ")
    assert start.startswith(f"{tmp_path}/train/x000.csv:3: column 'y': expected {expected}, found ")
    assert count == "8 cells are like that"
    assert [one.split()[0] for one in also.split(", ")] == [
        "x000.csv:5",
        "x000.csv:6",
        "x000.csv:7",
        "x001.csv:3",
        "...",
    ]
    assert remedy == "correct or remove these rows"


def test_bad_cells_of_masks_and_frames(tmp_path: Path) -> None:
    masked: dict[str, Any] = {"level": "token", "task_type": "classification", "mask_column": ["seen"]}
    rows = [{"sequence": "MK", "y": "HE", "seen": seen} for seen in ("12", "01", "2x")]
    task = make_task(tmp_path, rows, **masked)
    with pytest.raises(DataError, match=r"csv:2: .* a mask of 0 and 1, found '2'; 2 cells .*, also x000.csv:4 '2'; "):
        load(task)
    frame = pd.DataFrame({"sequence": ["MK", "", "", "M"], "y": [1.0] * 4})
    with pytest.raises(DataError, match=r"\['train'\], row 1: .* a sequence, found ''; 2 .*, also row 2 ''; correct"):
        load(Task(target_column=["y"]), frames={"train": frame, "test": frame})


def test_words_that_look_like_missing_values_are_classes(tmp_path: Path) -> None:
    train = [{"sequence": "M", "y": word} for word in ("NA", "null", "nan", "1", "1.0", "Lysosome/Vacuole", "a, b")]
    examples = load(make_task(tmp_path, train, task_type="classification"))
    assert examples.targets[0].classes == tuple(sorted(["NA", "null", "nan", "1", "1.0", "Lysosome/Vacuole", "a, b"]))


def test_long_sequences_go_out_whole_and_are_counted(tmp_path: Path) -> None:
    train = [{"sequence": "M" * n, "y": letter} for n, letter in ((3, "b"), (9, "a"), (4, "b"), (5, "c"))]
    task = make_task(tmp_path, train, task_type="classification", max_seq_length=4)
    examples = load(task)
    assert examples.train.sequences == ["MMM", "MMMM"]
    assert examples.train.left_out == 2
    assert examples.train.lengths.tolist() == [3, 9, 4, 5]
    assert examples.limit == 4
    assert examples.targets[0].classes == ("a", "b", "c")  # the vocabulary is older than the filter
    assert examples.train.values[0].tolist() == [1, 1]
    assert "train: 2 of 4 sequences left out, over 4" in examples.notes
    assert load(task, max_seq_length=3).train.sequences == ["MMM"]
    assert load(task, max_seq_length=3).limit == 3
    assert load(task, max_seq_length=100).train.sequences == ["MMM", "MMMM"]


def test_several_files_in_order_and_a_val_part(tmp_path: Path) -> None:
    task = make_task(tmp_path, [{"sequence": "M", "y": 0}])
    for part, names in (("train", ("x000", "x001", "x002")), ("val", ("x000",))):
        for number, name in enumerate(names):
            rows = [{"sequence": "MK"[: 1 + number % 2], "y": 10 * number + row} for row in range(2)]
            write_csv(tmp_path / part / f"{name}.csv", rows)
    task.dataset = Files("x[000..002]", "x000", "x000.csv")
    assert load(task).val is None
    task.patience = 2
    examples = load(task)
    assert examples.train.values[0].tolist() == [0, 1, 10, 11, 20, 21]
    assert examples.train.rows[3] == "x001.csv:1"
    assert examples.val is not None
    assert examples.val.values[0].tolist() == [0, 1]
    assert list(examples.parts) == ["train", "test", "val"]


def test_a_label_of_the_test_part_alone_takes_room_that_was_declared(tmp_path: Path) -> None:
    train = [{"sequence": "M", "y": "b"}, {"sequence": "K", "y": "c"}]
    test = [{"sequence": "M", "y": "a"}]
    task = make_task(tmp_path, train, test, task_type="classification", num_classes=3)
    examples = load(task)
    assert examples.targets[0].classes == ("b", "c", "a")
    assert any("cannot be learnt: a" in note for note in examples.notes)
    assert any("3 classes declared, 2 in the train part" in note for note in examples.notes)
    task.num_classes = 2
    with pytest.raises(DataError, match=r"x000\.csv:2: column 'y': expected one of the 2 classes b, c, found 'a'"):
        load(task)


def test_the_digest_changes_with_content_and_not_with_what_a_mask_hides(tmp_path: Path) -> None:
    def digest(name: str, label: str, mask: str, sequence: str = "MKV") -> str:
        rows = [{"sequence": sequence, "m": mask, "y": label}, {"sequence": "AA", "m": "11", "y": "HE"}]
        options: dict[str, Any] = {"level": "token", "task_type": "classification", "mask_column": ["m"]}
        return load(make_task(tmp_path / name, rows, **options)).train.digest

    first = digest("a", "HEH", "011")
    assert digest("b", "EEH", "011") == first
    assert len({first, digest("c", "HHH", "011"), digest("d", "HEH", "111"), digest("e", "HEH", "011", "MKK")}) == 4


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.text("ACDEFGHIKLMNPQRSTVWY", min_size=1, max_size=9), st.text(st.characters(codec="utf-8"))),
        min_size=1,
        max_size=8,
    )
)
def test_any_text_survives_the_csv(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> None:
    """Class names with commas, quotes, blanks, newlines: what was written is what is read."""
    names = [("x" + name.replace("\r", "").replace("\0", "")) for _, name in rows]
    train = [{"sequence": sequence, "y": name} for (sequence, _), name in zip(rows, names, strict=True)]
    task = make_task(tmp_path_factory.mktemp("csv"), train, task_type="classification")
    examples: Examples = load(task)
    classes = examples.targets[0].classes
    assert classes == tuple(sorted(set(names)))
    assert [classes[index] for index in examples.train.values[0]] == names


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.data())
def test_unit_index_is_the_concatenation_of_slices(counts: list[int], data: st.DataObject) -> None:
    some = data.draw(st.lists(st.integers(0, len(counts) - 1), max_size=8))
    flat = np.arange(sum(counts))
    starts = np.cumsum([0, *counts])
    expected = [unit for index in some for unit in flat[starts[index] : starts[index + 1]]]
    assert unit_index(np.array(counts), np.array(some, dtype=np.int64)).tolist() == expected
