"""What is found in the data: planted leaks, shifts and constant labels; nothing where there is nothing."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.load import Examples, load
from pipeline.statistics import leakage
from pipeline.statistics.leakage import LEAST, SHARED, K, nearly_the_same
from tests.support.data import make_task
from tests.support.models import RESIDUES


def sequences(n: int, seed: int, length: int = 120) -> list[str]:
    source = random.Random(seed)
    return ["".join(source.choices(RESIDUES, k=length)) for _ in range(n)]


def changed(sequence: str, places: int, seed: int = 0) -> str:
    """The sequence with substitutions."""
    letters = list(sequence)
    for place in random.Random(seed).sample(range(len(letters)), places):
        letters[place] = "X"
    return "".join(letters)


def loaded(folder: Path, train: list[tuple[str, Any]], test: list[tuple[str, Any]], **options: Any) -> Examples:
    parts = ([{"sequence": text, "y": label} for text, label in rows] for rows in (train, test))
    return load(make_task(folder, *parts, **options))


def numbered(texts: list[str], seed: int, shift: float = 0.0) -> list[tuple[str, Any]]:
    return list(zip(texts, np.random.default_rng(seed).normal(shift, 1, len(texts)).tolist(), strict=True))


def test_a_clean_set_gives_no_warning(tmp_path: Path) -> None:
    train, test = sequences(200, 1), sequences(100, 2)
    examples = loaded(tmp_path / "numbers", numbered(train, 1), numbered(test, 2))
    assert examples.notes == ()
    assert examples.metrics["downstream/test_in_train"] == examples.metrics["downstream/test_near_train"] == 0
    draw = random.Random(3)
    labelled = [[(text, draw.choice("ab")) for text in part] for part in (train, test)]
    assert loaded(tmp_path / "classes", *labelled, task_type="classification").notes == ()
    tokens = [[(text, "".join(draw.choices("HEC", k=len(text)))) for text in part] for part in (train, test)]
    assert loaded(tmp_path / "tokens", *tokens, task_type="classification", level="token").notes == ()


def test_of_many_labels_that_train_has_not_a_few_are_named(tmp_path: Path) -> None:
    train = [(text, "a" if row % 2 else "b") for row, text in enumerate(sequences(20, 1))]
    test = [(text, f"n{row:02}") for row, text in enumerate(sequences(20, 2))]
    notes = loaded(tmp_path, train, test, task_type="classification").notes
    assert "cannot be learnt: n00, n01, n02, n03, n04 and 15 more" in " ".join(notes)
    assert max(map(len, notes)) < 200


def test_planted_duplicates_are_said_with_their_rows(tmp_path: Path) -> None:
    train, test = sequences(200, 1), sequences(100, 2)
    test[3], test[7], test[9] = train[5], changed(train[20], 4), changed(train[30], 60)
    examples = loaded(tmp_path, numbered(train, 1), numbered(test, 2))
    same, near = examples.notes
    assert same == f"1 of 100 test sequences are in train too, such as that of {tmp_path / 'test' / 'x000.csv'}:5"
    assert near.startswith("1 of 100 test sequences are nearly the same as one in train")
    assert "test/x000.csv:9: scores say little" in near
    assert examples.metrics["downstream/test_in_train"] == examples.metrics["downstream/test_near_train"] == 0.01


def test_what_is_not_compared_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """30 sequences of 120 letters in train, where 1,300 are looked at: each third."""
    monkeypatch.setattr(leakage, "MOST", 1300)
    train, test = sequences(30, 1), sequences(10, 2)
    test[3], test[4] = changed(train[6], 4), changed(train[7], 4)
    near, said = loaded(tmp_path, numbered(train, 1), numbered(test, 1)).notes
    assert near.startswith("1 of 10 test sequences are nearly the same")
    assert said == "of train 1 of 3 sequences was compared for sequences that are nearly the same: there may be more"


def jaccard(first: str, second: str) -> float:
    a, b = ({text[i : i + K] for i in range(len(text) - K + 1)} for text in (first, second))
    return len(a & b) / len(a | b) if min(len(a), len(b)) >= LEAST else 0.0


@pytest.mark.parametrize("length", [40, 60, 300])
def test_near_duplicates_are_those_of_sets_of_k_mers(length: int) -> None:
    """None is found that is not one by the definition, and those well above the threshold are all found."""
    known = [*sequences(60, 1, length), "MKVLAA" * 20, "A" * 50, "MK", ""]
    ours = [changed(known[i], 1 + i % 9, i) for i in range(60)]
    ours += ["MKVLAA" * 21, "A" * 60, "MK", "", *sequences(30, 5)]
    best = np.array([max(jaccard(text, other) for other in known) for text in ours])
    found = nearly_the_same(ours, known)
    assert (best[found] >= SHARED).all()
    assert found[best >= SHARED].all()
    assert 0 < found.sum() < len(ours)


def test_a_planted_shift_is_reported_in_each_kind_of_label(tmp_path: Path) -> None:
    train, test = sequences(200, 1), sequences(100, 2)
    (note,) = loaded(tmp_path / "a", numbered(train, 1), numbered(test, 2, shift=0.8)).notes
    assert "y: the labels differ between the parts, mean" in note
    assert "Kolmogorov-Smirnov" in note
    draw = random.Random(3)
    classes = [[(text, "a" if draw.random() < share else "b") for text in part] for part, share in
               ((train, 0.5), (test, 0.2))]  # fmt: skip
    (note,) = loaded(tmp_path / "b", *classes, task_type="classification").notes
    assert "of train and" in note
    assert "chi-squared" in note
    tokens = [[(text, "".join(draw.choices("HEC", weights, k=len(text)))) for text in part] for part, weights in
              ((train, (1, 1, 1)), (test, (2, 1, 1)))]  # fmt: skip
    (note,) = loaded(tmp_path / "c", *tokens, task_type="classification", level="token").notes
    assert "y: the classes of a sequence differ between the parts, mean C 0.3" in note
    numbers = [[(text, json.dumps([shift] * len(text))) for text, shift in numbered(part, 1, by)] for part, by in
               ((train, 0.0), (test, 0.9))]  # fmt: skip
    assert "Kolmogorov-Smirnov" in loaded(tmp_path / "d", *numbers, level="token").notes[0]


def test_random_splits_seldom_warn(tmp_path: Path) -> None:
    """One data set, split anew 40 times: at a level of 0.001 none is expected to warn."""
    texts, labels = sequences(150, 1), np.random.default_rng(0)
    rows = [(text, float(value)) for text, value in zip(texts, labels.gamma(1, 1, 150), strict=True)]
    notes: list[str] = []
    for seed in range(40):
        order = np.random.default_rng(seed).permutation(150)
        notes += loaded(tmp_path, [rows[i] for i in order[:100]], [rows[i] for i in order[100:]]).notes
    assert notes == []


def test_constant_and_masked_labels_are_said(tmp_path: Path) -> None:
    train, test = sequences(60, 1), sequences(60, 2)
    notes = loaded(tmp_path / "a", [(text, 2.5) for text in train], numbered(test, 2)).notes
    assert notes == ("y: all train labels are 2.5: a head has nothing to learn",)
    notes = loaded(tmp_path / "b", numbered(train, 1), [(text, 2.5) for text in test]).notes
    assert notes == ("y: all test labels are 2.5: scores cannot tell heads apart",)
    cell = json.dumps([None] * 80 + [1.0, 2.0] * 20)
    notes = loaded(tmp_path / "c", [(t, cell) for t in train], [(t, cell) for t in test], level="token").notes
    assert notes == ("y: 67% of the train labels are masked", "y: 67% of the test labels are masked")
