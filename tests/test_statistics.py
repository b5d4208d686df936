"""Metrics by hand, and against torchmetrics-free references: scikit-learn on the same arrays, scipy's correlations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as reference

from pipeline.statistics.classification import classification
from pipeline.statistics.metrics import LOSS, OF_KIND, Metric
from pipeline.statistics.regression import regression


def test_classification_by_hand() -> None:
    true = np.array([0, 0, 1, 1])
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.2, 0.8]])
    found = classification(true, probabilities, ["a", "b"])
    assert found.values["accuracy"] == 0.75
    assert found.values["balanced_accuracy"] == 0.75
    assert found.values["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert found.values["mcc"] == pytest.approx((2 * 1 - 1 * 0) / np.sqrt(3 * 2 * 2 * 1))
    assert found.values["auroc"] == 1.0
    assert found.omitted == {}


def test_regression_by_hand() -> None:
    found = regression(np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 3.0])).values
    assert found["mse"] == pytest.approx(2 / 3)
    assert found["rmse"] == pytest.approx((2 / 3) ** 0.5)
    assert found["mae"] == pytest.approx(2 / 3)
    assert found["r2"] == pytest.approx(1 - 2 / (16 / 9 + 1 / 9 + 25 / 9))


@pytest.mark.parametrize(
    ("true", "classes", "omitted"),
    [
        (
            [0, 0],
            ["a", "b"],
            {"mcc": "the test labels are all of one class", "auroc": "the test labels are all of one class"},
        ),
        ([0, 1], ["a", "b", "c"], {"auroc": "no test label is c"}),
    ],
)
def test_what_is_not_defined_is_left_out_with_its_reason(
    true: list[int], classes: list[str], omitted: dict[str, str]
) -> None:
    found = classification(np.array(true), np.full((2, len(classes)), 1 / len(classes)), classes)
    assert found.omitted == omitted
    assert not set(found.values) & set(omitted)


def test_correlations_of_a_constant_are_left_out() -> None:
    assert set(regression(np.array([1.0, 1.0]), np.array([0.0, 2.0])).omitted) == {"r2", "pearson", "spearman"}
    constant = regression(np.array([1.0, 2.0]), np.array([0.3, 0.3]))
    assert set(constant.omitted) == {"pearson", "spearman"}
    assert set(regression(np.array([1.0]), np.array([2.0])).omitted) == {"r2", "pearson", "spearman"}


@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(2, 40))
def test_classification_agrees_with_scikit_learn(seed: int, classes: int, n: int) -> None:
    random = np.random.default_rng(seed)
    true = random.integers(0, classes, n)
    probabilities = random.dirichlet(np.ones(classes), n)
    found = classification(true, probabilities, [str(index) for index in range(classes)])
    predicted = probabilities.argmax(1)
    assert found.values["accuracy"] == pytest.approx(np.mean(true == predicted))
    expected = reference.precision_recall_fscore_support(true, predicted, average="macro", zero_division=0)[2]
    assert found.values["macro_f1"] == pytest.approx(expected)
    present = np.unique(true)
    recall = reference.recall_score(true, predicted, labels=present, average=None)
    assert found.values["balanced_accuracy"] == pytest.approx(recall.mean())
    if set(predicted) <= set(true) and len(present) > 1:  # else it warns
        expected = reference.balanced_accuracy_score(true, predicted)
        assert found.values["balanced_accuracy"] == pytest.approx(expected)
    if "auroc" in found.values:
        scores = probabilities if classes > 2 else probabilities[:, 1]
        assert found.values["auroc"] == pytest.approx(reference.roc_auc_score(true, scores, multi_class="ovr"))
    assert np.isfinite(list(found.values.values())).all()


@given(st.integers(0, 10**6), st.integers(2, 40))
def test_regression_agrees_with_scikit_learn_and_scipy(seed: int, n: int) -> None:
    random = np.random.default_rng(seed)
    true, predicted = random.normal(size=(2, n)).round(1)
    found = regression(true, predicted)
    assert found.values["mse"] == pytest.approx(reference.mean_squared_error(true, predicted))
    assert found.values["mae"] == pytest.approx(reference.mean_absolute_error(true, predicted))
    if "r2" in found.values:
        assert found.values["r2"] == pytest.approx(reference.r2_score(true, predicted))
    if "pearson" in found.values:
        assert found.values["pearson"] == pytest.approx(np.corrcoef(true, predicted)[0, 1], abs=1e-9)
        ranks = stats.rankdata(true), stats.rankdata(predicted)
        assert found.values["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-9)
    assert np.isfinite(list(found.values.values())).all()


KINDS = [name for names in OF_KIND.values() for name in names]


@given(
    st.text("ab_ /.é", min_size=1, max_size=9).filter(str.strip),
    st.text("ab_1 .", min_size=1, max_size=9),
    st.sampled_from(KINDS),
)
def test_a_logged_name_says_task_target_and_metric(task: str, target: str, name: str) -> None:
    metric = Metric(task, target, name)
    parsed = Metric.parse(metric.key)
    assert parsed is not None
    assert (parsed.key, parsed.target, parsed.name) == (metric.key, target, name)
    assert metric.key.startswith(metric.stem)
    assert metric.lower_is_better == (name in ("mse", "rmse", "mae"))


def test_the_loss_is_of_the_whole_task() -> None:
    assert Metric("a/b", "", LOSS).key == f"a_b/{LOSS}"
    assert Metric.parse(LOSS, 2.0) == Metric("", "", LOSS, 2.0)
    assert Metric("", "", LOSS).lower_is_better
    assert [Metric.parse(key) for key in ("train_loss", "test_x_f1", "x/lr", "test__mse")] == [None] * 4


@pytest.mark.parametrize("true", [[0, 1, 1], [1, 1, 1]])
def test_every_metric_of_a_kind_has_a_value_or_a_reason(true: list[int]) -> None:
    classes = classification(np.array(true), np.full((3, 2), 0.5), ["a", "b"])
    numbers = regression(np.array(true, dtype=float), np.array([0.1, 0.2, 0.4]))
    for kind, found in (("classification", classes), ("regression", numbers)):
        assert set(found.values) | set(found.omitted) == set(OF_KIND[kind])
