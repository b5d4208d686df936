"""All that is wrong with a user's data is told in one run: kind by kind, with places, counts and remedies."""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import measure
from pipeline.config.task import Files, Task
from pipeline.data import tables
from pipeline.engines.elsewhere import portable
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.load import load, load_all
from pipeline.store.embedding_table import Store
from pipeline.validation import validate
from tests.support.data import make_task, write_csv
from tests.support.encoders import FakeEncoder

GOOD = {
    "note": "",
    "sequence": "MKTAYIAK",
    "number": "1.5",
    "place": "inner",
    "state": "HHCCHHCC",
    "seen": "11110000",
    "profile": "[1, 2, 3, 4, 5, 6, null, 8]",
}
SPOILT: dict[tuple[str, str], str] = {
    ("sequence", "empty"): "",
    ("number", "empty"): "",
    ("number", "text"): "many",
    ("place", "empty"): "",
    ("state", "empty"): "",
    ("state", "length"): "HHC",
    ("seen", "empty"): "",
    ("seen", "length"): "111100001",
    ("seen", "mask"): "1111000x",
    ("profile", "empty"): "",
    ("profile", "text"): "0.1 0.2",
    ("profile", "length"): "[1, 2]",
    ("profile", "value"): "[1, 2, 3, 4, 5, 6, 7, true]",
}
IN_FILES = [("", "width"), ("number", "byte")]  # a row has a field more; a number has a byte that is not UTF-8
EXPECTED = {
    "sequence": "a sequence",
    "number": "a number",
    "place": "a class name",
    "state": "8 characters, one per residue",
    "seen": "(8 characters, one per residue|a mask of 0 and 1)",
    "profile": "a JSON list of (8 )?numbers or nulls",
}
FILES = {"train": ["x000", "x001"], "test": ["x000"]}
ROWS = 12  # of each file
BYTE = "\ue000"  # where a byte is to stand that is not UTF-8
TASKS: list[dict[str, Any]] = [
    {"task_type": "regression", "target_column": ["number"]},
    {"task_type": "classification", "target_column": ["place"], "num_classes": 2},
    {"level": "token", "task_type": "classification", "target_column": ["state"], "mask_column": ["seen"]},
    {"level": "token", "task_type": "regression", "target_column": ["profile"]},
]


@dataclass(frozen=True)
class Defect:
    """What is planted in a row."""

    part: str
    file: str
    row: int
    column: str
    kind: str

    @property
    def line(self) -> int:
        return self.row + 2


def planted(kinds: Sequence[tuple[str, str]]) -> st.SearchStrategy[list[Defect]]:
    """Some of these kinds, anywhere."""
    files = [(part, file) for part, names in FILES.items() for file in names]
    places = st.tuples(st.sampled_from(files), st.integers(0, ROWS - 1), st.sampled_from(kinds))
    return st.lists(places.map(lambda at: Defect(*at[0], at[1], *at[2])), min_size=1, max_size=30).map(visible)


def visible(defects: Sequence[Defect]) -> list[Defect]:
    """One of each cell, and those that nothing else hides.

    A row of another width is not read; without a sequence nobody knows how long a label must be.
    """
    cells = {(one.part, one.file, one.row, one.column): one for one in defects}
    wide = {key[:3] for key, one in cells.items() if one.kind == "width"}
    bare = {key[:3] for key, one in cells.items() if one.column == "sequence"}
    kept = [one for key, one in cells.items() if one.kind == "width" or key[:3] not in wide]
    known = [one for one in SPOILT if one[0] not in ("state", "seen") and one[1] != "length"]
    return [
        one
        for one in kept
        if (one.part, one.file, one.row) not in bare or (one.column, one.kind) in (*known, *IN_FILES)
    ]


def spoilt(rows: list[dict[str, str]], defects: Sequence[Defect]) -> list[dict[str, str]]:
    """The rows of a file with the defects of its cells."""
    changed = [dict(row) for row in rows]
    for one in defects:
        if one.kind == "byte":
            changed[one.row]["number"] = f"1{BYTE}5"
        elif one.kind != "width":
            changed[one.row][one.column] = SPOILT[one.column, one.kind]
    return changed


def write(folder: Path, defects: Sequence[Defect]) -> list[Task]:
    for part, files in FILES.items():
        for file in files:
            here = [one for one in defects if (one.part, one.file) == (part, file)]
            path = write_csv(folder / part / f"{file}.csv", spoilt([GOOD] * ROWS, here))
            lines = path.read_text().split("\n")
            for one in here:
                lines[one.row + 1] += ",more" if one.kind == "width" else ""
            path.write_bytes("\n".join(lines).encode().replace(BYTE.encode(), b"\xff"))
    files_of_parts = Files("x[000..001]", "x000")
    return [
        Task(dataset_path=str(folder), dataset=files_of_parts, task_name=f"task {number}", **task)
        for number, task in enumerate(TASKS)
    ]


def clauses(error: PipelineError) -> list[str]:
    """What an error says: its line; of several defects, the lines below the first, which says how many there are."""
    first, *lines = str(error).split("\n")
    if not lines:
        return [first]
    assert first == f"{len(lines)} defects in the data:"
    assert all(line.startswith(f"  {number}. ") for number, line in enumerate(lines, 1))
    return [line.partition(". ")[2] for line in lines]


def groups(defects: Sequence[Defect]) -> dict[tuple[str, str, str], list[Defect]]:
    """The defects of each kind, in the order of the files and their rows."""
    found: dict[tuple[str, str, str], list[Defect]] = {}
    for one in sorted(defects, key=lambda one: (one.file, one.row)):
        found.setdefault((one.part, one.column, one.kind), []).append(one)
    return found


def said_of(group: Sequence[Defect], folder: Path) -> str:
    """A pattern for what must be said of the defects of a kind."""
    first, *others = group
    column = f"column '{first.column}': expected {EXPECTED.get(first.column)}, found '.*'"
    problem = {
        "width": "expected 7 fields as in the header, found 8",
        "byte": "not a CSV file in UTF-8: found the byte 0xff",
    }.get(first.kind, column)
    what = {"width": "rows", "byte": "lines"}.get(first.kind, "cells")
    start = f"{re.escape(str(folder))}/{first.part}/{first.file}.csv:{first.line}: {problem}"
    if not others:
        return start + ("; correct or remove the row" if what == "cells" else "")
    also = ", ".join(f"{one.file}.csv:{one.line} [^;]*?" for one in others[:4]) + (r", \.\.\." if others[4:] else "")
    remedy = "save these files as UTF-8" if what == "lines" else "correct or remove these rows"
    return f"{start}; {len(group)} {what} are like that, also {also}; {remedy}"


def assert_all_said(error: PipelineError, expected: Sequence[str]) -> None:
    said = clauses(error)
    for pattern in expected:
        assert [one for one in said if re.fullmatch(pattern, one)], (pattern, said)
    assert len(said) == len(expected), (expected, said)


@settings(max_examples=100, deadline=None)
@given(planted([*SPOILT, *IN_FILES]))
def test_whatever_is_planted_in_files_is_named(tmp_path_factory: pytest.TempPathFactory, defects: list[Defect]) -> None:
    """In any file, part and task, with how many there are; nothing else is, and what is one defect is one line."""
    folder = tmp_path_factory.mktemp("planted")
    with pytest.raises(DataError) as error:
        load_all(write(folder, defects))
    assert_all_said(error.value, [said_of(group, folder) for group in groups(defects).values()])


@settings(max_examples=50, deadline=None)
@given(planted(list(SPOILT)))
def test_whatever_is_planted_in_frames_is_named(defects: list[Defect]) -> None:
    defects = visible([replace(one, file="") for one in defects])
    frames = {}
    for part in FILES:
        rows = spoilt([GOOD] * ROWS, [one for one in defects if one.part == part])
        frames[part] = pd.DataFrame(rows).replace("", None)
    with pytest.raises(DataError) as error:
        load_all([Task(task_name=str(number), **task) for number, task in enumerate(TASKS)], frames=frames)
    expected = []
    for (part, column, _), group in groups(defects).items():
        start = rf"frames\['{part}'\], row {group[0].row}: column '{column}': expected {EXPECTED[column]}, found '.*'"
        also = ", ".join(f"row {one.row} [^;]*?" for one in group[1:5]) + (r", \.\.\." if group[5:] else "")
        several = f"; {len(group)} cells are like that, also {also}; correct or remove these rows"
        expected.append(start + (several if group[1:] else "; correct or remove the row"))
    assert_all_said(error.value, expected)


def test_files_and_columns_that_are_missing_are_counted_across_parts(tmp_path: Path) -> None:
    tasks = write(tmp_path, [Defect("train", "x000", 3, "number", "text")])
    tasks[0].dataset = Files("x[000..003]", "x[000..001]")
    for part in FILES:
        path = tmp_path / part / "x000.csv"
        path.write_text(path.read_text().replace("sequence,", "Sequence,").replace("state", "states"))
    with pytest.raises(DataError) as error:
        load_all([tasks[0], tasks[2]])
    root = re.escape(str(tmp_path))
    assert_all_said(
        error.value,
        [
            rf"expected a CSV file at {root}/train/x002.csv, found none .*; 3 files .*, also x003.csv, test/x001.csv",
            rf"{root}/train/x000.csv:1: expected a column 'sequence', .*\?; 2 files .*, also test/x000.csv:1",
            rf"{root}/train/x000.csv:1: expected a column 'state', .*\?; 2 files .*, also test/x000.csv:1",
            rf"{root}/train/x000.csv:5: column 'number': expected a number, found 'many'; .*",
        ],
    )


def test_files_that_cannot_be_read_do_not_hide_the_others(tmp_path: Path) -> None:
    """A header that is not UTF-8, an empty file, one of a header alone; and a range that is none, in another task."""
    tasks = write(tmp_path, [Defect("test", "x000", 3, "number", "text")])
    tasks[0].dataset = Files("x[000..003]", "x000")
    for name, content in (("x001", b"not\xe4,number\n"), ("x002", b""), ("x003", b"sequence,number\n")):
        (tmp_path / "train" / f"{name}.csv").write_bytes(content)
    tasks[1].dataset = Files("x{0..", "x000")
    with pytest.raises(DataError) as error:
        load_all(tasks[:2])
    root = re.escape(str(tmp_path))
    assert_all_said(
        error.value,
        [
            rf"{root}/train/x001.csv:1: not a CSV file in UTF-8: found the byte 0xe4",
            rf"{root}/train/x002.csv: expected a header row, found an empty file",
            rf"{root}/train/x003.csv: expected rows below the header, found none",
            rf"{root}/test/x000.csv:5: column 'number': expected a number, found 'many'; .*",
            r"dataset: 'x\{0\.\.' is not a file name or a range .*",
        ],
    )


def test_labels_that_are_good_are_held_to_the_number_of_classes(tmp_path: Path) -> None:
    """Whatever else is wrong in the same column; but a class weight for each is not asked for then."""
    rows = [{"sequence": "MKV", "y": name} for name in ("a", "b", "", "c", "a", "c")]
    options: dict[str, Any] = {"task_type": "classification", "num_classes": 2, "class_weights": [1.0]}
    task = make_task(tmp_path, [rows[0], rows[1], rows[2]], rows, **options)
    with pytest.raises(DataError) as error:
        load(task)
    assert_all_said(
        error.value,
        [
            r".*/train/x000.csv:4: column 'y': expected a class name, found ''; .*",
            r".*/test/x000.csv:4: column 'y': expected a class name, found ''; .*",
            r".*/test/x000.csv:5: .* expected one of the 2 classes a, b, found 'c'; 2 cells .* x000.csv:7 'c'; .*",
        ],
    )


def test_what_a_defect_makes_unknown_is_not_said(tmp_path: Path) -> None:
    """All of a part masked, or too long, is said where nothing in it is wrong; the other column does not matter."""
    options: dict[str, Any] = {"level": "token", "task_type": "classification", "max_seq_length": 3}
    rows = [{"sequence": "MKVL", "y": "HHHH", "z": "HH", "m": "0000"}] * 2
    task = make_task(tmp_path, rows, target_column=["y", "z"], mask_column=["m", None], **options)
    with pytest.raises(DataError) as error:
        load(task)
    masked = [rf".*/{part}/x000.csv: column 'y': every position of {part} is masked out" for part in FILES]
    too_long = [rf".*/{part}/x000.csv: expected sequences of at most 3 in {part}, the shortest .*" for part in FILES]
    cells = [rf".*/{part}/x000.csv:2: column 'z': expected 4 characters.*; 2 cells .*" for part in FILES]
    assert_all_said(error.value, [*masked, *too_long, *cells])
    path = tmp_path / "train" / "x000.csv"
    path.write_text(path.read_text() + "MK,HH\n")
    with pytest.raises(DataError) as error:
        load(task)
    width = r".*/train/x000.csv:4: expected 4 fields as in the header, found 2"
    assert_all_said(error.value, [width, masked[1], too_long[1], *cells])
    path.write_bytes(path.read_bytes() + b"MK,\xe4\n")
    with pytest.raises(DataError) as error:
        load(task)
    width = r".*/train/x000.csv:4: expected 4 fields as in the header, found 2; 2 rows .*, also x000.csv:5 with 2; .*"
    byte = r".*/train/x000.csv:5: not a CSV file in UTF-8: found the byte 0xe4"
    assert_all_said(error.value, [width, byte, masked[1], too_long[1], *cells])


def test_a_label_that_is_bad_may_be_one_that_is_missed(tmp_path: Path) -> None:
    """None is left of the sequences that are short enough; and no class of train is known."""
    rows = [{"sequence": "MKVL", "y": "HHCC"}, {"sequence": "MK", "y": "H"}]
    options: dict[str, Any] = {"level": "token", "task_type": "classification", "max_seq_length": 3, "num_classes": 2}
    task = make_task(tmp_path, rows, [{"sequence": "MKV", "y": "HCE"}], **options)
    cell = r".*/train/x000.csv:3: column 'y': expected 2 characters, one per residue, found '1: H'; .*"
    many = r".*/test/x000.csv:2: column 'y': expected one of the 2 classes C, H, found 'E'; .*"
    with pytest.raises(DataError) as error:
        load(task)
    assert_all_said(error.value, [cell, many])
    write_csv(tmp_path / "train" / "x000.csv", [{"sequence": "MK", "z": "HC"}])
    with pytest.raises(DataError) as error:
        load(task)
    assert_all_said(error.value, [r".*/train/x000.csv:1: expected a column 'y', found no such column; .*"])


def test_class_weights_are_held_to_the_classes_beside_other_defects(tmp_path: Path) -> None:
    rows = [{"sequence": "MKVL", "y": name} for name in ("a", "b")]
    task = make_task(tmp_path, rows, task_type="classification", class_weights=[1.0])
    weights = r"task 'downstream': class_weights: expected 'balanced', or a weight for each of a, b, found \[1.0\]"
    with pytest.raises(ConfigError) as alone:
        load_all([task])
    assert_all_said(alone.value, [weights])
    with pytest.raises(DataError) as both:
        load(replace(task, max_seq_length=3))
    assert_all_said(
        both.value, [weights, *[rf".*/{part}/x000.csv: expected sequences of at most 3 .*" for part in FILES]]
    )
    write_csv(tmp_path / "train" / "x000.csv", [*rows, {"sequence": "MKVL", "y": ""}])
    with pytest.raises(DataError) as unknown:
        load(task)
    assert_all_said(unknown.value, [r".*/train/x000.csv:4: column 'y': expected a class name, found ''; .*"])


def test_one_file_is_read_with_all_of_its_defects(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "x000.csv", [{"sequence": "MK"}, {"sequence": "AC"}])
    path.write_bytes(path.read_bytes() + b"M,K\nM\xe4\nA,C\n")
    with pytest.raises(DataError) as error:
        tables.read(tmp_path, "x000", ["sequence"])
    width = (
        r".*/x000.csv:4: expected 1 fields as in the header, found 2; 2 rows are like that, also x000.csv:6 with 2; .*"
    )
    assert_all_said(error.value, [width, r".*/x000.csv:5: not a CSV file in UTF-8: found the byte 0xe4"])


def test_an_error_of_several_messages_reaches_other_processes() -> None:
    error = DataError("one\nthing", "another")
    assert str(error) == "2 defects in the data:\n  1. one thing\n  2. another"
    assert str(portable(error)) == str(pickle.loads(pickle.dumps(error))) == str(error)


def test_all_sequences_that_the_encoder_does_not_know_are_counted(tmp_path: Path) -> None:
    rows = [{"sequence": text, "y": number} for number, text in enumerate(["MK", "???", "AC", "?", "???"])]
    task = make_task(tmp_path, rows, rows[:2])
    with pytest.raises(DataError) as error:
        validate(FakeEncoder(), [task, replace(task, task_name="again")], Store(tmp_path / "store"))
    found = "expected a sequence with characters the encoder knows, found '\\?\\?\\?'"
    also = r"x000.csv:5 '\?', x000.csv:6 '\?\?\?', test/x000.csv:3 '\?\?\?'"
    column = rf"{re.escape(str(tmp_path))}/train/x000.csv:3: column 'sequence'"
    assert_all_said(
        error.value, [f"{column}: {found}; 4 cells are like that, also {also}; correct or remove these rows"]
    )


def test_letters_in_lower_case_are_told(tmp_path: Path) -> None:
    rows = [{"sequence": text, "y": number} for number, text in enumerate(["MK", "acw", "AC"])]
    with pytest.raises(DataError) as error:
        validate(FakeEncoder(), make_task(tmp_path, rows, rows[:1]), Store(tmp_path / "store"))
    assert str(error.value).endswith("found 'acw'; it knows capital letters: upper-case the column")


NUMBERS = [str(number / 10) for number in range(40)]
STATES = [f"{number:06b}".replace("1", "H").replace("0", "C") for number in range(40)]
LISTS: list[Any] = [[float(number)] * 6 for number in range(40)]
UNCLEAR = [
    (NUMBERS, {3: ">70", 8: None}, "38 of 40 labels are numbers, row 3 is '>70', also row 8 None; clean", "a number"),
    (
        STATES,
        {3: "HHH", 8: None},
        "38 of 40 labels have a character for each of the sequence, row 3 has 3 for a sequence of 6, also row 8 0 for",
        "6 characters",
    ),
    (LISTS, {3: "x", 8: None}, "38 of 40 labels are lists, row 3 is 'x', also row 8 None; correct", "a JSON list of 6"),
]


@pytest.mark.parametrize(("good", "odd", "said", "expected"), UNCLEAR)
def test_frames_whose_labels_are_not_clear_are_told_all(
    good: list[Any], odd: dict[int, Any], said: str, expected: str, tmp_path: Path
) -> None:
    """Also of sequences that are missing, which say nothing of the labels, and of the other part."""
    labels = [odd.get(row, label) for row, label in enumerate(good)]
    train = pd.DataFrame({"sequence": ["MKVLAW"] * 40, "y": pd.Series(labels, dtype=object)})
    frames = {"train": pd.concat([train, pd.DataFrame({"sequence": [None], "y": [good[0]]})]), "test": train.head(6)}
    with pytest.raises(DataError) as error:
        measure(FakeEncoder(), frames, store=str(tmp_path))
    patterns = [
        rf"frames\['train'\]: column 'y': {re.escape(said)}.*",
        r"frames\['train'\], row 40: column 'sequence': expected a sequence, found ''; .*",
        rf"frames\['test'\], row 3: column 'y': expected {expected}.*; correct or remove the row",
    ]
    assert_all_said(error.value, patterns)


def test_the_first_five_of_many_odd_labels_are_named(tmp_path: Path) -> None:
    for good, last in ((NUMBERS, "row 4 'odd'"), (STATES, "row 4 3 for 6")):
        labels = ["odd"] * 6 + good[6:]
        frame = pd.DataFrame({"sequence": ["MKVLAW"] * 40, "y": labels})
        with pytest.raises(DataError, match=rf"34 of 40 labels .*, {last}, \.\.\.; "):
            measure(FakeEncoder(), {"train": frame, "test": frame.tail(6)}, store=str(tmp_path))


def test_labels_are_not_judged_where_their_kind_is_not_known(tmp_path: Path) -> None:
    """The train part has no sequences, so that nothing says what its words are."""
    train, test = pd.DataFrame({"text": ["MK"], "y": ["a"]}), pd.DataFrame({"sequence": ["MK", ""], "y": ["a", ""]})
    with pytest.raises(DataError) as error:
        measure(FakeEncoder(), {"train": train, "test": test}, store=str(tmp_path), target_column="y")
    column = r"frames\['train'\]: expected a column 'sequence', found no such column.*"
    assert_all_said(
        error.value, [column, r"frames\['test'\], row 1: column 'sequence': expected a sequence, found ''; .*"]
    )


def test_frames_without_rows_are_counted(tmp_path: Path) -> None:
    frame = pd.DataFrame({"sequence": ["MK"], "y": ["a"]})
    with pytest.raises(DataError) as error:
        measure(FakeEncoder(), {"train": frame.head(0), "test": frame.head(0)}, store=str(tmp_path))
    expected = r"frames\['train'\]: expected rows, found none; 2 frames are like that, also frames\['test'\]"
    assert_all_said(error.value, [expected])
