"""What is said of a head that is no better than a constant guess, was still learning, or learnt its train set."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.task import Task
from pipeline.report.overview import summary
from pipeline.report.page import page
from pipeline.score import Scores
from pipeline.store.embedding_table import Store
from pipeline.validation import validate
from tests.support.data import ADAM, make_task, planted_task, proteins
from tests.support.encoders import FakeEncoder

WORDS = {"guess": "no better than a constant guess", "falling": "still falling", "overfit": "fits its train set"}


def measured(task: Task, folder: Path) -> Scores:
    (scores,) = validate(FakeEncoder(), task, Store(folder / "store"))
    return scores


def said(scores: Scores) -> list[str]:
    return [name for name, words in WORDS.items() if any(words in note for note in scores.notes)]


def numbers(folder: Path, noise: float, **options: Any) -> Task:
    """The share of W; `noise` is the deviation of what nothing can tell, in deviations of that share."""
    draw = random.Random(1)

    def rows(texts: list[str]) -> list[dict[str, object]]:
        return [{"sequence": text, "y": 25 * text.count("W") / len(text) + draw.gauss(0, noise)} for text in texts]

    settings = {"num_epochs": 40, "batch_size": 16, "optim": ADAM, **options}
    return make_task(folder, rows(proteins(200, 3)), rows(proteins(100, 4)), **settings)


def test_a_head_that_learns_is_given_no_warning(tmp_path: Path) -> None:
    assert said(measured(numbers(tmp_path / "numbers", 0.1), tmp_path)) == []
    assert said(measured(planted_task(tmp_path / "classes"), tmp_path)) == []


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_a_head_that_has_hardly_been_trained(tmp_path: Path, level: str) -> None:
    few: dict[str, Any] = {"optim": {"name": "adam", "lr": 1e-5}, "num_epochs": 2}
    task = planted_task(tmp_path, **few) if level == "token" else numbers(tmp_path, 0.1, **few)
    scores = measured(task, tmp_path)
    assert said(scores) == ["guess"]
    (note,) = (note for note in scores.notes if WORDS["guess"] in note)
    metric = "test_label_accuracy" if level == "token" else "test_y_mse"
    steps = 2 * -(-(80 if level == "token" else 200) // 16)
    remedy = "raise num_epochs or optim.lr, or lower batch_size"
    assert note == f"{metric} is {WORDS['guess']}, after {steps} optimizer steps: {remedy}"


def test_a_loss_that_still_falls(tmp_path: Path) -> None:
    task = numbers(tmp_path, 0.1, optim={"name": "adam", "lr": 1e-3}, num_epochs=8)
    assert "falling" in said(measured(task, tmp_path))
    assert "falling" not in said(measured(replace(task, num_epochs=60, optim=ADAM), tmp_path))


def test_a_head_that_learns_its_train_set_by_heart(tmp_path: Path) -> None:
    """Labels that no one can tell from the sequences."""
    task = numbers(tmp_path, 20.0, num_epochs=300)
    scores = measured(task, tmp_path)
    assert "overfit" in said(scores)
    assert "falling" not in said(scores)
    assert any("let it stop early (patience: 5)" in note for note in scores.notes)
    assert "overfit" not in said(measured(replace(task, patience=2), tmp_path))


def test_what_is_wrong_is_in_the_description_and_on_the_page(tmp_path: Path) -> None:
    scores = measured(numbers(tmp_path, 0.1, num_epochs=1, optim={"name": "adam", "lr": 1e-5}), tmp_path)
    assert WORDS["guess"] in summary({}, [scores])
    assert WORDS["guess"] in page("title", [scores], {}, {}, "")


def test_no_epochs_are_no_better_than_a_guess(tmp_path: Path) -> None:
    scores = measured(numbers(tmp_path, 0.1, num_epochs=0), tmp_path)
    assert any("after 0 optimizer steps" in note for note in scores.notes)
