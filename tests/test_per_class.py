"""Metrics of each class alone: by hand, against scikit-learn, in the report and among the run's files."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import classification_report

from pipeline.report.page import page
from pipeline.score import Scores
from pipeline.statistics.per_class import MEASURES, per_class
from pipeline.statistics.predictions import Predictions
from pipeline.store.embedding_table import Store
from pipeline.validation import validate
from tests.support.data import ADAM, make_task
from tests.support.encoders import FakeEncoder


def test_by_hand() -> None:
    """Three sequences of 2, 1 and 3 tokens; class c is in no label, and predicted once."""
    true = np.array([0, 1, 1, 0, 0, 1])
    scores = np.array([[0.9, 0.1, 0], [0.2, 0.8, 0], [0.6, 0.4, 0], [0.7, 0.3, 0], [0.1, 0.2, 0.7], [0.0, 1.0, 0]])
    found = per_class(Predictions(true, scores, np.array([2, 1, 3]), ["a", "b", "c"])).set_index("class")
    assert found["labels"].tolist() == [3, 3, 0]
    assert found["sequences"].tolist() == [2, 3, 0]
    assert found["precision"].tolist() == [2 / 3, 1, 0]
    assert found["recall"].tolist()[:2] == [2 / 3, 2 / 3]
    assert found.loc["b", "f1"] == pytest.approx(4 / 5)
    assert found.loc["a", "auroc"] == pytest.approx(7 / 9)  # of nine pairs, 0.1 is below 0.2 and 0.6
    assert found.loc["c", ["recall", "f1", "auroc", "average_precision"]].isna().all()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 6), heads=st.integers(1, 3))
def test_as_scikit_learn_has_it_in_the_mean_over_seeds(seed: int, classes: int, heads: int) -> None:
    rng = np.random.default_rng(seed)
    true = rng.integers(0, classes, 60)
    outputs = [rng.dirichlet(np.ones(classes), 60) for _ in range(heads)]
    names = [f"class {index}" for index in range(classes)]
    found = per_class(Predictions(true, outputs[0], np.ones(60, np.int64), names, further=tuple(outputs[1:])))
    for index, name in enumerate(names):
        reports = [
            classification_report(
                true, one.argmax(1), labels=range(classes), target_names=names, output_dict=True, zero_division=0
            )[name]
            for one in outputs
        ]
        assert found["labels"][index] == reports[0]["support"]
        if reports[0]["support"]:
            for ours, theirs in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
                assert found[ours][index] == pytest.approx(np.mean([one[theirs] for one in reports]))


def _scores(tmp_path: Path) -> Scores:
    rng = random.Random(0)
    rows = [{"sequence": "".join(rng.choices("ACDEK", k=8)), "kind": rng.choice("xyz")} for _ in range(60)]
    task = make_task(tmp_path / "data", rows, task_type="classification", optim=ADAM, num_epochs=1)
    (scores,) = validate(FakeEncoder(), task, Store(tmp_path / "store"))
    return scores


def test_a_report_has_a_fold_with_a_row_per_class_for_head_and_probe(tmp_path: Path) -> None:
    scores = _scores(tmp_path)
    assert list(scores.classes["class"]) == ["x", "y", "z"]
    assert {f"probe_{name}" for name in MEASURES} <= set(scores.classes.columns)
    assert scores.classes["labels"].sum() == len(scores.examples.test)
    html = page("title", [scores], {}, {}, "")
    assert "Each class alone" in html
    assert ">probe average precision</th>" in html


def test_numbers_have_no_classes(tmp_path: Path) -> None:
    rows = [{"sequence": "ACDEK" + "K" * index, "fitness": index} for index in range(12)]
    task = make_task(tmp_path / "data", rows, optim=ADAM, num_epochs=1)
    (scores,) = validate(FakeEncoder(), task, Store(tmp_path / "store"))
    assert scores.classes.empty
    assert "Each class alone" not in page("title", [scores], {}, {}, "")
