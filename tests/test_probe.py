"""The probe against scikit-learn, and against fits that are repeated for everything left out."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn import datasets
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor

from pipeline.config.task import Task
from pipeline.embed import Embeddings, embed
from pipeline.errors import ConfigError
from pipeline.heads import logistic, probe, ridge
from pipeline.heads.probe import fit_probe, folds_of
from pipeline.load import load
from pipeline.store.embedding_table import Store
from tests.support.data import make_task, planted_task, proteins
from tests.support.encoders import FakeEncoder

Array = npt.NDArray[np.float64]


class MatrixEncoder(FakeEncoder):
    """A row of a matrix for each sequence, which is the row's number: `12|` is row 12."""

    def __init__(self, matrix: Array) -> None:
        super().__init__()
        self.matrix = torch.tensor(matrix, dtype=torch.float32)
        self.hidden_size = matrix.shape[1]

    def state(self, sequence: str) -> Tensor:
        return self.matrix[int(sequence.rstrip("|"))].expand(len(sequence), -1)

    def count_unknown(self, sequences: Sequence[str]) -> list[tuple[int, int]]:
        return [(0, len(text)) for text in sequences]


def embedded(
    folder: Path, matrix: Array, labels: Iterable[object], train: Iterable[int] | None = None, **options: Any
) -> Embeddings:
    """A sequence-level task on the rows of a matrix; the test part has all of them."""
    rows = [{"sequence": f"{row}|", "y": label} for row, label in enumerate(labels)]
    task = make_task(folder, rows if train is None else [rows[row] for row in train], rows, **options)
    (found,) = embed([load(task)], MatrixEncoder(matrix), Store(folder / "store"))
    return found


def scaled(matrix: Array, train: npt.NDArray[np.int64] | None = None) -> Array:
    """Standardised as scikit-learn does it, what is stored being float32."""
    stored = matrix.astype(np.float32).astype(np.float64)
    scaler = StandardScaler().fit(stored if train is None else stored[train])
    result: Array = scaler.transform(stored)
    return result


def residues(embeddings: Embeddings, window: int = 1) -> tuple[Array, npt.NDArray[np.int64]]:
    """Standardised features of each train token, and the number of its sequence, worked out sequence by sequence."""
    rows, part = embeddings.rows("train"), embeddings.examples.train
    single = [rows.gather(np.array([index])).numpy().astype(np.float64) for index in range(len(part))]
    scaler, half = StandardScaler().fit(np.concatenate(single)), window // 2
    found = []
    for one in single:
        padded = np.pad(scaler.transform(one), ((half, half), (0, 0)))
        found.append(np.stack([padded[index : index + window].reshape(-1) for index in range(len(one))]))
    return np.concatenate(found), np.repeat(np.arange(len(part)), part.counts)


REAL: dict[str, tuple[Callable[..., Any], str]] = {
    "diabetes": (datasets.load_diabetes, "regression"),
    "iris": (datasets.load_iris, "classification"),
    "wine": (datasets.load_wine, "classification"),
    "breast_cancer": (datasets.load_breast_cancer, "classification"),
    "digits": (datasets.load_digits, "classification"),  # has columns of one value
}


@pytest.mark.parametrize("wide", [False, True], ids=["more rows", "more columns"])
@pytest.mark.parametrize("name", REAL)
def test_it_is_ridgecv(tmp_path: Path, name: str, wide: bool) -> None:
    """The same penalty, and predictions to 1e-6, with fewer rows than columns too."""
    read, kind = REAL[name]
    data = read()
    source = np.random.default_rng(0)
    train = source.permutation(len(data.target))[: data.data.shape[1] - 1 if wide else 300]
    labels = data.target if kind == "regression" else [f"{value:02d}" for value in data.target]
    embeddings = embedded(tmp_path, data.data, labels, train, task_type=kind)
    found = fit_probe(embeddings)
    matrix, values = scaled(data.data, train), np.asarray(data.target, dtype=float)
    if kind == "classification":
        seen = np.unique(data.target[train])
        values = (data.target[:, None] == seen).astype(float)
    reference = RidgeCV(ridge.PENALTIES).fit(matrix[train], values[train])
    assert found.penalties == {"y": reference.alpha_}
    predicted = found.predict(embeddings.rows("test"), embeddings.examples.test)[0]
    expected = reference.predict(matrix).reshape(len(values), -1)
    assert np.abs(predicted[:, : expected.shape[1]] - expected).max() <= 1e-6 * max(1, np.abs(expected).max())


class Chunks:
    """`ridge.Data` from arrays."""

    def __init__(self, features: Array, labels: Array, size: int = 7) -> None:
        self.joined = [
            (features[begin : begin + size], labels[begin : begin + size]) for begin in range(0, len(features), size)
        ]
        self.features, self.outputs, self.count = features.shape[1], labels.shape[1], len(features)

    def __iter__(self) -> Any:
        return iter([(features.copy(), labels.copy()) for features, labels in self.joined])


@pytest.mark.parametrize(("units", "width"), [(30, 4), (12, 11), (12, 12), (9, 20), (2, 3), (4, 1), (3, 0)])
def test_leaving_one_out_is_repeating_the_fit(units: int, width: int) -> None:
    source = np.random.default_rng(units)
    features, labels = source.normal(size=(units, width)), source.normal([0, 50], size=(units, 2))
    choice = ridge.by_leaving_one_out(Chunks(features, labels))
    for place, penalty in enumerate(ridge.PENALTIES):
        expected = np.zeros(2)
        for unit in range(units):
            others = np.arange(units) != unit
            if width:
                model = Ridge(penalty).fit(features[others], labels[others])
                expected += (model.predict(features[[unit]])[0] - labels[unit]) ** 2
            else:
                expected += (labels[others].mean(0) - labels[unit]) ** 2
        np.testing.assert_allclose(choice.errors[place], expected, rtol=1e-8)
    if width:
        model = Ridge(10).fit(features, labels)
        np.testing.assert_allclose(choice.solve(10), np.vstack([model.coef_.T, model.intercept_]), atol=1e-10)


def test_equal_rows_do_not_disturb_what_is_left_out() -> None:
    """Their Gram matrix has several eigenvalues of 0, of which one belongs to the intercept."""
    source = np.random.default_rng(1)
    features, labels = np.repeat(source.normal(size=(4, 20)), 3, 0), source.normal(size=(12, 1))
    narrow = ridge.by_leaving_one_out(Chunks(np.linalg.qr(features.T)[1].T, labels)).errors
    np.testing.assert_allclose(ridge.by_leaving_one_out(Chunks(features, labels)).errors, narrow, rtol=1e-8)
    expected = 0.0
    for unit in range(12):
        others = np.arange(12) != unit
        model = Ridge(0.1).fit(features[others], labels[others])
        expected += (model.predict(features[[unit]]).item() - labels[unit, 0]) ** 2
    assert narrow[0, 0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("window", [1, 3, 7])
@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_folds_are_repeated_fits_without_their_sequences(
    tmp_path: Path, kind: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens with a mask count neither in a fit nor in an error, but their neighbours see them."""
    monkeypatch.setattr(probe, "CHUNK", 100)
    target = {"classification": "label", "regression": "number"}[kind]
    task = planted_task(tmp_path, task_type=kind, target_column=[target], probe_window=window)
    (embeddings,) = embed([load(task)], FakeEncoder(), Store(tmp_path / "store"))
    found, part = fit_probe(embeddings), embeddings.examples.train
    features, sequence = residues(embeddings, window)
    values, mask, fold = part.values[0], part.masks[0], folds_of(part)[sequence]
    labels = values[:, None] == np.arange(2) if kind == "classification" else values[:, None]
    errors = np.zeros(len(ridge.PENALTIES))
    for place, penalty in enumerate(ridge.PENALTIES):
        for one in range(5):
            inside, outside = mask & (fold == one), mask & (fold != one)
            model = Ridge(penalty).fit(features[outside], labels[outside].astype(float))
            wrong = model.predict(features[inside]).reshape(labels[inside].shape) - labels[inside]
            errors[place] += (wrong**2).sum()
    best = int(errors.argmin())
    assert found.penalties == {target: ridge.PENALTIES[best]}
    model = Ridge(ridge.PENALTIES[best]).fit(features[mask], labels[mask].astype(float))
    predicted = found.predict(embeddings.rows("train"), part)[0]
    np.testing.assert_allclose(predicted, model.predict(features).reshape(predicted.shape), atol=1e-9)
    chosen = probe._Labels(part, embeddings.examples.targets, [0])
    data = probe._Data(found.features, embeddings.rows("train"), part, chosen, mask)
    np.testing.assert_allclose(ridge.by_folds(data, data.folds()).errors.sum(1), errors, rtol=1e-9)


def test_targets_with_masks_of_their_own_have_what_each_has_alone(tmp_path: Path) -> None:
    task = planted_task(tmp_path, target_column=["label", "sequence"], mask_column=["seen", None])
    store = Store(tmp_path / "store")
    (embeddings,) = embed([load(task)], FakeEncoder(), store)
    together = fit_probe(embeddings)
    for index, (column, mask) in enumerate((("label", "seen"), ("sequence", None))):
        alone = replace(task, target_column=[column], mask_column=[mask])
        (embeddings,) = embed([load(alone)], FakeEncoder(), store)
        single = fit_probe(embeddings)
        assert single.penalties == {column: together.penalties[column]}
        np.testing.assert_allclose(single.coefficients[0], together.coefficients[index], atol=1e-12)


def test_equal_sequences_are_in_one_fold_whatever_the_order(tmp_path: Path) -> None:
    texts = proteins(23, 5)
    rows = [{"sequence": text, "y": 1} for text in [*texts, *texts[:4]]]
    first = load(make_task(tmp_path / "a", rows)).train
    other = load(make_task(tmp_path / "b", rows[::-1])).train
    fold = dict(zip(first.sequences, folds_of(first).tolist(), strict=True))
    assert dict(zip(other.sequences, folds_of(other).tolist(), strict=True)) == fold
    assert [folds_of(first)[place] for place in range(23, 27)] == [fold[text] for text in texts[:4]]
    assert sorted(np.bincount(list(fold.values())).tolist()) == [4, 4, 5, 5, 5]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_the_bits_do_not_depend_on_the_memory_budget(
    tmp_path: Path, level: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "CHUNK", 64)
    texts = proteins(60, 3)
    rows = [{"sequence": text, "y": text if level == "token" else text[0]} for text in texts]
    task = make_task(tmp_path, rows, task_type="classification", level=level)
    results = []
    for memory_bytes in (10**9, 0):
        (embeddings,) = embed([load(task)], FakeEncoder(), Store(tmp_path / "store", dtype, memory_bytes))
        found = fit_probe(embeddings)
        predicted = found.predict(embeddings.rows("test"), embeddings.examples.test)
        assert embeddings.rows("train").in_memory == (memory_bytes > 0)
        results.append(found.coefficients[0].tobytes() + predicted[0].tobytes())
    assert results[0] == results[1]


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_the_bits_do_not_depend_on_the_threads_or_on_the_rows_that_are_read_at_once(tmp_path: Path, level: str) -> None:
    """200 columns: products of such matrices are shared between threads where a library may use several."""
    texts = proteins(400, 3)
    rows = [{"sequence": text, "y": text if level == "token" else text[0]} for text in texts]
    task = make_task(tmp_path, rows, task_type="classification", level=level)
    store, results = Store(tmp_path / "store", "float32", 0), []
    for threads, size in ((1, 20_000), (2, 3)):
        with threadpool_limits(threads), pytest.MonkeyPatch.context() as patch:
            (embeddings,) = embed([load(task)], FakeEncoder(200), store)
            table = embeddings.rows("train")
            patch.setattr(type(table), "gather", in_pieces(type(table).gather, size))
            found = fit_probe(embeddings)
            predicted = found.predict(embeddings.rows("test"), embeddings.examples.test)
        results.append(found.coefficients[0].tobytes() + predicted[0].tobytes())
    assert results[0] == results[1]


def in_pieces(gather: Callable[..., Tensor], size: int) -> Callable[..., Tensor]:
    """Reads the rows of a few sequences at a time."""

    def gathered(self: Any, sequences: npt.NDArray[np.int64]) -> Tensor:
        cuts = range(0, len(sequences), size)
        return torch.cat([gather(self, sequences[begin : begin + size]).clone() for begin in cuts])

    return gathered


@pytest.mark.parametrize(("level", "window"), [("sequence", 1), ("token", 1), ("token", 3)])
def test_memory_does_not_grow_with_the_rows(
    tmp_path: Path, level: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings are on disk: what is added for each row is its label, its place and its fold, not 800 bytes."""
    monkeypatch.setattr(probe, "CHUNK", 256)
    peaks, units = [], []
    for sequences in (400, 2000) if level == "sequence" else (50, 250):
        texts = proteins(sequences, 3)
        rows = [{"sequence": text, "y": text if level == "token" else text[0]} for text in texts]
        options = {"task_type": "classification", "level": level, "probe_window": window}
        task = make_task(tmp_path / str(sequences), rows, rows[:10], **options)
        (embeddings,) = embed([load(task)], FakeEncoder(100), Store(tmp_path / "store", "float32", 0))
        embeddings.rows("train")
        tracemalloc.start()
        fit_probe(embeddings)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        units.append(int(embeddings.examples.train.counts.sum()))
    assert (peaks[1] - peaks[0]) / (units[1] - units[0]) < 200


def test_a_sequence_longer_than_a_chunk_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "CHUNK", 4)
    counts = np.array([1, 2, 9, 1, 1, 1, 1, 3])
    chunks = [(units.start, units.stop, list(sequences)) for units, sequences in probe._chunks(counts)]
    assert chunks == [(0, 12, [0, 1, 2]), (12, 16, [3, 4, 5, 6]), (16, 19, [7])]


def test_columns_of_one_value_are_dropped(tmp_path: Path) -> None:
    """Of a value but for the rounding of float32, too: scaled to a deviation of 1 it would be noise."""
    source = np.random.default_rng(0)
    matrix = source.normal(size=(40, 3)) * [1, 1e-4, 1e4] + [0, 1, 0]
    constants = np.stack([np.zeros(40), np.full(40, 0.1), 1000 + 1e-4 * source.normal(size=40)], 1)
    labels = matrix[:, 0]
    plain = fit_probe(embedded(tmp_path / "a", matrix, labels))
    found = fit_probe(embedded(tmp_path / "b", np.concatenate([constants, matrix], 1), labels))
    assert found.features.columns.tolist() == [3, 4, 5]
    np.testing.assert_array_equal(found.coefficients[0], plain.coefficients[0])


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_one_class_or_one_embedding_is_a_constant_guess(tmp_path: Path, kind: str) -> None:
    source = np.random.default_rng(0)
    options: dict[str, Any] = {"task_type": "classification", "probe": kind}
    matrix = source.normal(size=(20, 4))
    one = embedded(tmp_path / "a", matrix, ["x"] * 10 + ["y"] * 10, range(10), **options)
    (predicted,) = fit_probe(one).predict(one.rows("test"), one.examples.test)
    np.testing.assert_allclose(predicted, np.tile([1, 0], (20, 1)), atol=1e-12)
    same = embedded(tmp_path / "b", np.ones((20, 4)), ["x", "y", "y", "y"] * 5, **options)
    found = fit_probe(same)
    (predicted,) = found.predict(same.rows("test"), same.examples.test)
    np.testing.assert_allclose(predicted, np.tile([0.25, 0.75], (20, 1)), atol=1e-12)
    assert found.notes == ("probe: the embeddings of the train part are all equal, so it guesses one value",)


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_one_sequence_leaves_nothing_to_choose_by(tmp_path: Path, level: str) -> None:
    rows = [{"sequence": "MKV", "y": "[1, 2, 4]" if level == "token" else 2}]
    (embeddings,) = embed([load(make_task(tmp_path, rows, level=level))], FakeEncoder(), Store(tmp_path / "store"))
    found = fit_probe(embeddings)
    assert found.penalties == {"y": None}
    assert "probe: y has too few train labels to choose a penalty: the largest is taken" in found.notes
    predicted = found.predict(embeddings.rows("test"), embeddings.examples.test)[0]
    assert predicted.mean() == pytest.approx(7 / 3 if level == "token" else 2, rel=1e-4)


def test_class_weights_change_nothing_and_that_is_said(tmp_path: Path) -> None:
    plain = planted_task(tmp_path)
    store = Store(tmp_path / "store")
    (embeddings,), (weighted,) = (
        embed([load(replace(plain, class_weights=weights))], FakeEncoder(), store) for weights in (None, "balanced")
    )
    first, second = fit_probe(embeddings), fit_probe(weighted)
    np.testing.assert_array_equal(first.coefficients[0], second.coefficients[0])
    assert (first.notes, second.notes) == ((), ("probe: class_weights count for the head alone",))


def test_a_window_that_is_too_wide_is_one_token(tmp_path: Path) -> None:
    task = planted_task(tmp_path, probe_window=7)
    for size, window in ((585, 7), (586, 1)):  # 7 times 585 is 4,095
        (embeddings,) = embed([load(task)], FakeEncoder(size), Store(tmp_path / "store"))
        notes: list[str] = []
        assert probe._window(embeddings.examples.task, embeddings.table.hidden_size, notes) == window
    assert notes == ["probe: probe_window 7 of 586 columns would be 4102 features, more than 4096; it takes 1"]


def test_large_numbers_keep_their_digits(tmp_path: Path) -> None:
    """Labels far from 0, as wavelengths or temperatures are: the same fit, moved."""
    task = planted_task(tmp_path, task_type="regression", target_column=["number"])
    (embeddings,) = embed([load(task)], FakeEncoder(), Store(tmp_path / "store"))
    part = embeddings.examples.train
    far = replace(part, values=[np.asarray(part.values[0] + 1e9, np.float64)])
    moved = replace(embeddings, examples=replace(embeddings.examples, train=far))
    found, other = fit_probe(embeddings), fit_probe(moved)
    assert found.penalties == other.penalties
    np.testing.assert_allclose(other.coefficients[0][:-1], found.coefficients[0][:-1], atol=1e-6)
    assert other.coefficients[0][-1] == pytest.approx(found.coefficients[0][-1] + 1e9, abs=1e-5)


@pytest.mark.parametrize(("name", "classes"), [("iris", 3), ("breast_cancer", 2)])
def test_logistic_regression_is_scikit_learns(tmp_path: Path, name: str, classes: int) -> None:
    data = REAL[name][0]()
    labels = [f"{value:02d}" for value in data.target]
    embeddings = embedded(tmp_path, data.data, labels, task_type="classification", probe="logistic")
    found, part = fit_probe(embeddings), embeddings.examples.train
    matrix, fold = scaled(data.data), folds_of(part)
    entropies = []
    for penalty in logistic.PENALTIES:
        model, entropy = LogisticRegression(C=1 / penalty, max_iter=2000, tol=1e-6), 0.0
        for one in range(5):
            model.fit(matrix[fold != one], data.target[fold != one])
            chances = model.predict_proba(matrix[fold == one])
            entropy += log_loss(data.target[fold == one], chances, normalize=False, labels=range(classes))
        entropies.append(entropy)
    penalty = logistic.PENALTIES[int(np.argmin(entropies))]
    assert found.penalties == {"y": penalty}
    model = LogisticRegression(C=1 / penalty, max_iter=2000, tol=1e-6).fit(matrix, data.target)
    (chances,) = found.predict(embeddings.rows("test"), embeddings.examples.test)
    np.testing.assert_allclose(chances, model.predict_proba(matrix), atol=1e-6)


def test_a_class_that_was_not_seen_is_never_predicted() -> None:
    source = np.random.default_rng(0)
    features, classes = source.normal(size=(20, 2)), np.repeat([0, 2], 10)
    for folds, penalty in ((np.arange(20) % 5, True), (np.zeros(20, int), False)):
        found, chosen = logistic.fit_logistic(features, classes, folds, 4)
        assert (chosen is not None) == penalty
        chances = logistic.softmax(features @ found[:-1] + found[-1])
        np.testing.assert_array_equal(chances[:, [1, 3]], 0)
        np.testing.assert_allclose(chances.sum(1), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probe": "logistic"}, "probe: logistic is for classification; write ridge"),
        ({"probe": "lasso"}, "probe: expected one of ridge, logistic, none, found 'lasso'"),
        ({"probe_window": 4, "level": "token"}, "probe_window is 4, expected an odd number"),
        ({"probe_window": 3}, "probe_window is for token-level tasks; leave it out"),
        ({"probe_window": 0}, "probe_window is 0, expected at least 1"),
    ],
)
def test_a_probe_that_does_not_fit_the_task_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Task(dataset_path="data", target_column=["y"], **options).check()
