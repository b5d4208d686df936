"""What is drawn is what was measured, of any data, and the script that calls keeps its matplotlib as it was."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from pipeline.config.task import Task
from pipeline.data.parts import Part, Target
from pipeline.embed import embed
from pipeline.load import Examples, load
from pipeline.report import figures
from pipeline.report.figures import canvas, curves, draw, numbers
from pipeline.report.figures.canvas import shorten
from pipeline.report.figures.classification import MOST, class_figure, confusion, confusion_figure, precision_recall
from pipeline.report.figures.examples import choose, letters_of
from pipeline.score import Scores, score
from pipeline.statistics.metrics import LOSS, Metric
from pipeline.store.embedding_table import Store
from pipeline.train_head import train_head
from tests.support.data import column, make_task, planted_task, proteins
from tests.support.encoders import FakeEncoder
from tests.support.programs import loaded_after

CPU = torch.device("cpu")
HEADING = ("task: target", "accuracy 0.5")
# What a user may have set: a dark style, TeX for every text, frames and fonts of their own.
STYLE: Any = {
    "text.usetex": True,
    "text.color": "white",
    "font.size": 30,
    "font.family": "cursive",
    "figure.facecolor": "black",
    "figure.dpi": 30,
    "figure.autolayout": True,
    "figure.constrained_layout.use": True,
    "axes.facecolor": "black",
    "axes.edgecolor": "white",
    "axes.labelcolor": "white",
    "axes.labelsize": 30,
    "axes.labelpad": 40,
    "axes.grid": True,
    "axes.xmargin": 0.4,
    "axes.prop_cycle": matplotlib.cycler(color=["white"]),  # type: ignore[attr-defined]
    "axes.spines.top": False,
    "axes.spines.left": False,
    "axes.formatter.use_mathtext": True,
    "axes.formatter.limits": (0, 0),
    "xtick.color": "white",
    "xtick.top": True,
    "xtick.direction": "in",
    "xtick.minor.visible": True,
    "ytick.labelsize": 40,
    "ytick.left": False,
    "ytick.right": True,
    "lines.linewidth": 9,
    "lines.linestyle": ":",
    "lines.marker": "x",
    "lines.markeredgewidth": 5,
    "patch.linewidth": 8,
    "patch.force_edgecolor": True,
    "image.cmap": "gray",
    "image.origin": "lower",
    "image.interpolation": "bilinear",
    "savefig.bbox": "tight",
    "savefig.facecolor": "black",
    "savefig.transparent": True,
}


def measured(task: Task, store: Store) -> Scores:
    (embeddings,) = embed([load(task)], FakeEncoder(), store)
    return score(embeddings, train_head(embeddings, store, CPU))


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> Scores:
    folder = tmp_path_factory.mktemp("token")
    targets = {"target_column": ["label", "seen"], "mask_column": ["seen", None], "num_epochs": 2, "max_seq_length": 25}
    return measured(planted_task(folder, **targets, patience=5), Store(folder / "store"))


def pixels(path: Path) -> npt.NDArray[np.uint8]:
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def check_pictures(paths: list[Path], folder: Path) -> None:
    """Every file is a picture with something on white, small enough for a page of many."""
    assert sorted(paths) == sorted(folder.iterdir())
    for path in paths:
        picture = pixels(path)
        assert (picture[0, 0] == 255).all()
        assert (picture[:, :, 0] < 128).sum() > 100
        assert path.stat().st_size < 150_000


def by_hand(kind: str, level: str, names: list[str], lengths: list[int], said: Any, **options: Any) -> Scores:
    """Scores of sequences of some lengths, one target, class or number 0 at every unit unless given."""
    classes = tuple(names) if kind == "classification" else None
    target = Target("y", classes, len(names) if classes else 1)
    counts = np.array(lengths if level == "token" else [1] * len(lengths))
    units = int(counts.sum())
    true = options.get("true", np.zeros(units, dtype=np.int64 if classes else np.float64))
    mask = options.get("mask", np.ones(units, dtype=np.bool_))
    texts, rows = ["A" * length for length in lengths], [f"x000.csv:{row}" for row in range(len(lengths))]
    part = Part(texts, rows, counts, [true], [mask], 0, np.array(lengths))
    column = pa.DictionaryArray.from_arrays(pa.array(said.astype(np.int32)), names) if classes else pa.array(said)
    examples = Examples(Task(level=level, task_type=kind, target_column=["y"]), (target,), part, part)
    table = pa.table({"y_prediction": column})
    return Scores(examples, (Metric("", "", LOSS, 1.0),), {}, table, [], [])


def test_every_picture_of_a_token_task_in_order(tmp_path: Path, token: Scores) -> None:
    paths = draw(token, tmp_path / "new" / "folder")
    own = ["label_confusion", "label_per_class", "seen_confusion", "seen_per_class"]
    assert [path.stem for path in paths] == [*own, "examples", "learning_curve", "lengths"]
    check_pictures(paths, tmp_path / "new" / "folder")


def test_the_numbers_drawn_are_those_of_scikit_learn_at_unmasked_positions(
    tmp_path: Path, token: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "confusion_figure", lambda heading, names, counts, path: drawn.append((names, counts)))
    draw(token, tmp_path)
    table = token.table
    for (names, counts), target in zip(drawn, ("label", "seen"), strict=True):
        mask = np.array(column(table, f"{target}_mask"))
        true, said = (np.array(column(table, f"{target}_{what}"))[mask] for what in ("target", "prediction"))
        assert counts.tolist() == confusion_matrix(list(true), list(said), labels=names).tolist()
    assert not np.array(column(table, "label_mask")).all()
    assert drawn[0][1].sum() == sum(column(table, "label_mask"))


@given(st.integers(2, 6), st.data())
def test_confusion_precision_and_recall_are_those_of_scikit_learn(classes: int, data: st.DataObject) -> None:
    pairs = data.draw(st.lists(st.tuples(*[st.integers(0, classes - 1)] * 2), min_size=1, max_size=30))
    true, said = np.array(pairs).T
    counts = confusion(true, said, classes)
    labels = list(range(classes))
    assert counts.tolist() == confusion_matrix(true, said, labels=labels).tolist()
    expected = precision_recall_fscore_support(true, said, labels=labels, zero_division=0)
    for mine, theirs in zip((*precision_recall(counts), counts.sum(1)), (*expected[:2], expected[3]), strict=True):
        np.testing.assert_allclose(mine, theirs)


def test_a_class_that_was_declared_and_never_seen_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "confusion_figure", lambda heading, names, counts, path: drawn.append((names, counts)))
    scores = by_hand("classification", "sequence", ["a"], [3, 3], np.array([0, 0]))
    examples = replace(scores.examples, targets=(replace(scores.examples.targets[0], outputs=4),))
    column = pa.DictionaryArray.from_arrays(pa.array([0, 2], pa.int32()), ["a", "class 1", "class 2", "class 3"])
    draw(replace(scores, examples=examples, table=pa.table({"y_prediction": column})), tmp_path)
    assert drawn[0][0] == ["a", "class 2"]
    assert drawn[0][1].tolist() == [[1, 1], [0, 0]]


def test_nothing_of_matplotlib_is_changed(tmp_path: Path, token: Scores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(matplotlib.rcParams, "lines.linewidth", 1.75)  # a user's own
    before = matplotlib.rcParams.copy(), matplotlib.get_backend(auto_select=False), warnings.filters[:]
    draw(token, tmp_path)
    assert (matplotlib.rcParams.copy(), matplotlib.get_backend(auto_select=False), warnings.filters) == before
    assert sys.modules["matplotlib.pyplot"].get_fignums() == []  # scikit-learn imports it, and no figure is in it


def test_matplotlib_is_loaded_when_it_draws_and_pyplot_never() -> None:
    assert not {"matplotlib", "PIL"} & loaded_after("import pipeline.report.figures, pipeline.report.page")
    code = """
import sys, tempfile, pathlib
from pipeline.report.figures import curves
assert curves([(0, {"test_y_mse": 1.0})], pathlib.Path(tempfile.mkdtemp()))
assert "matplotlib.pyplot" not in sys.modules
import matplotlib
assert matplotlib.get_backend(auto_select=False) is None
"""
    assert "matplotlib" in loaded_after(code)


def test_a_user_s_own_style_changes_no_pixel(tmp_path: Path, token: Scores) -> None:
    true = np.random.default_rng(0).normal(size=2000)
    regression = by_hand("regression", "token", [], [40] * 50, true + 1, true=true)
    points = [(step, {"test_y_mse": 1e-5 * step, "test_y_r2": 1.0}) for step in range(3)]
    for name, style in zip(("plain", "own"), ({}, STYLE), strict=True):
        with matplotlib.rc_context(style):
            draw(token, tmp_path / name / "classes")
            draw(regression, tmp_path / name / "numbers")
            curves(points, tmp_path / name)
    plain = sorted((tmp_path / "plain").rglob("*.png"))
    assert len(plain) == 11
    for path in plain:
        other = tmp_path / "own" / path.relative_to(tmp_path / "plain")
        assert np.array_equal(pixels(path), pixels(other)), path.name


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_pictures_of_numbers(tmp_path: Path, store: Store, level: str) -> None:
    texts = proteins(60, 7)
    numbers = [[float(letter == "W") for letter in text] for text in texts]
    labels = [json.dumps(row) if level == "token" else sum(row) for row in numbers]
    rows = [{"sequence": text, "y (%/$)": label} for text, label in zip(texts, labels, strict=True)]
    paths = draw(measured(make_task(tmp_path, rows, level=level, num_epochs=3), store), tmp_path / "out")
    assert [path.name for path in paths if path.stem != "examples"] == [
        "y_______predicted.png",
        "learning_curve.png",
        "lengths.png",
    ]
    assert len(paths) == 3 + (level == "token")
    check_pictures(paths, tmp_path / "out")


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.sampled_from(["sequence", "token"]), st.lists(st.integers(1, 70), min_size=1, max_size=6))
def test_any_numbers_can_be_drawn(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, level: str, lengths: list[int]
) -> None:
    units = sum(lengths) if level == "token" else len(lengths)
    some = st.one_of(st.floats(width=32), st.sampled_from([0.0, 1e-40, 3.4e38, np.nan, np.inf]))
    draws = data.draw(st.lists(some, min_size=1, max_size=9)), data.draw(st.lists(st.floats(-1e38, 1e38), min_size=1))
    said, true = (np.resize(np.array(values), units) for values in draws)
    mask = np.resize(np.array([True, *data.draw(st.lists(st.booleans(), max_size=5))]), units)
    scores = by_hand("regression", level, [], lengths, said, true=true, mask=mask)
    losses = data.draw(st.lists(st.floats(0, 1e30), max_size=3))
    folder = tmp_path_factory.mktemp("numbers")
    limited = replace(scores.examples, limit=data.draw(st.one_of(st.none(), st.integers(1, 10**6))))
    val_losses = [*losses[:-1], *[np.inf] * bool(losses)]
    paths = draw(replace(scores, examples=limited, losses=losses, val_losses=val_losses), folder)
    assert ("learning_curve" in [path.stem for path in paths]) == bool(losses)
    check_pictures(paths, folder)


@settings(max_examples=12, deadline=None)
@given(
    st.data(), st.lists(st.text(min_size=1), min_size=1, max_size=5, unique=True), st.sampled_from([1, 3, 200, 9000])
)
def test_any_class_names_can_be_drawn(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, names: list[str], length: int
) -> None:
    """`$` starts no formula, and a letter that the font has not is no warning."""
    names = [*dict.fromkeys([*names, r"$\frac{1", "a_b^c", "蛋白" * 40, "\u0301", "ש"])]
    level = "token" if data.draw(st.booleans()) else "sequence"
    lengths = [length] * data.draw(st.integers(1, 3))
    units = sum(lengths) if level == "token" else len(lengths)
    shape = st.lists(st.integers(0, len(names) - 1), min_size=1, max_size=7)
    true, said = (np.resize(np.array(data.draw(shape)), units) for _ in range(2))
    folder = tmp_path_factory.mktemp("classes")
    scores = by_hand("classification", level, names, lengths, said, true=true)
    examples = replace(scores.examples, task=replace(scores.examples.task, task_name=names[0]))
    check_pictures(draw(replace(scores, examples=examples), folder), folder)


@pytest.mark.parametrize("classes", [1, 13, 40, MOST, MOST + 1, 300])
def test_many_classes_fit(tmp_path: Path, classes: int) -> None:
    counts = np.arange(classes * classes).reshape(classes, classes) * 1000
    names = [f"a rather long name of class {index}" for index in range(classes)]
    paths = [confusion_figure(HEADING, names, counts, tmp_path / "a.png")]
    paths.append(class_figure(HEADING, names, counts, "positions", tmp_path / "b.png"))
    check_pictures(paths, tmp_path)
    assert max(pixels(path).shape[1] for path in paths) < 2000


def test_points_beyond_what_is_drawn_are_a_fixed_sample() -> None:
    true = np.arange(30_000.0)
    predicted = np.where(true == 3, np.nan, true + 1)
    x, y, notes = numbers.sample(true, predicted)
    assert len(np.unique(x)) == numbers.POINTS
    assert (y == x + 1).all()
    assert 3 not in x
    assert notes.startswith("; a sample of 20,000; 1 that are not finite are left out")
    np.testing.assert_array_equal(numbers.sample(true, predicted)[0], x)


def test_the_examples_are_the_shortest_with_enough_labels() -> None:
    counts = np.array([100, 39, 50, 45, 200, 10])
    mask = np.ones(counts.sum(), dtype=np.bool_)
    mask[139:189][:20] = False  # of the 50, 30 are left
    part = Part([], [], counts, [np.zeros(len(mask))], [mask], 0, counts)
    assert choose(part) == [3, 0, 4, 1]
    assert choose(part, 6) == [3, 0, 4, 1, 2, 5]


def test_the_letters_of_an_example_by_hand() -> None:
    target = Target("ss", ("H", "E"), 3)
    true, mask = np.array([0, 1, 1, -1, 0]), np.array([True, True, True, False, True])
    part = Part(["MKVAC"], ["x000.csv:0"], np.array([5]), [true], [mask], 0, np.array([5]))
    assert letters_of(target, part, 0, np.array([0, 0, 1, 1, 2]), slice(0, 5)) == ("HEE·H", "HHE·?", " █  █")


def test_lengths_hold_what_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subtitles: list[str] = []
    make = canvas.new_figure

    def new_figure(width: float, height: float, title: str, subtitle: str) -> Any:
        subtitles.append(subtitle)
        return make(width, height, title, subtitle)

    monkeypatch.setattr(numbers, "new_figure", new_figure)
    rows = [{"sequence": "M" * length, "y": length} for length in (3, 9, 4, 2000)]
    examples = load(make_task(tmp_path, rows, max_seq_length=5))
    scores = Scores(examples, (), {}, pa.table({"y_prediction": [0.5, 0.5]}), [], [])
    check_pictures(draw(scores, tmp_path / "out"), tmp_path / "out")
    assert "train: 4 sequences, 2 of them too long; test: 4 sequences, 2 of them too long" in subtitles


def test_a_curve_for_each_task(tmp_path: Path) -> None:
    loss, mse = "dwnstr_task_val_loss", "test_y_mse"
    points = [(step, {f"a b/{loss}": 1 / (step + 1), f"A_B/{mse}": float(step), mse: np.nan}) for step in (5, 0, 10)]
    points.append((7, {mse: 0.5, f"deep/task/{loss}": 1.0, "seconds": 2.0}))
    paths = curves(points, tmp_path)
    assert [path.name for path in paths] == ["curve_a_b.png", "curve_A_B_2.png", "curve.png", "curve_deep_task.png"]
    check_pictures(paths, tmp_path)
    assert curves([], tmp_path / "none") == []


def test_the_probe_s_line_is_drawn_with_the_head_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(numbers, "save", lambda figure, _path: drawn.append(figure))
    points = [(step, {"test_y_mse": 2.0 - step, "test_y_probe_mse": 1.0 - step, "test_y_r2": 0.5}) for step in (0, 1)]
    curves(points, tmp_path)
    both, alone = drawn[0].axes
    head, beside = both.get_lines()
    assert (head.get_ydata().tolist(), beside.get_ydata().tolist()) == ([2.0, 1.0], [1.0, 0.0])
    assert (head.get_linestyle(), beside.get_linestyle()) == ("-", "--")
    assert both.get_title(loc="left") == "test_y_mse\nhead 1, probe 0"
    assert len(alone.get_lines()) == 1
    assert [text.get_text() for text in drawn[0].artists] == [
        "metrics by training step; 2 measurements; dashed: the probe"
    ]


def test_where_a_measurement_failed_is_a_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one metric alone is not defined; not where another task alone was measured."""
    drawn: list[Any] = []
    monkeypatch.setattr(numbers, "save", lambda figure, _path: drawn.append(figure))
    key = "a/test_y_accuracy"
    every = {key: 0.5, "a/test_y_mcc": 0.25, "a/test_y_baseline_accuracy": 0.125}
    points: list[tuple[int, dict[str, float]]] = [(0, every), (5, {}), (10, {key: 0.75}), (20, every)]
    curves([*points, (15, {"b/test_z_mcc": 0.5})], tmp_path)
    accuracy, mcc = drawn[0].axes
    line, baseline = accuracy.get_lines()
    assert line.get_xdata().tolist() == mcc.get_lines()[0].get_xdata().tolist() == [0, 5, 10, 20]
    assert np.array_equal(line.get_ydata(), [0.5, np.nan, 0.75, 0.5], equal_nan=True)
    assert np.array_equal(mcc.get_lines()[0].get_ydata(), [0.25, np.nan, np.nan, 0.25], equal_nan=True)
    assert list(baseline.get_ydata()) == [0.125, 0.125]
    assert drawn[0].artists[0].get_text() == (
        "metrics by training step; 3 measurements; dotted: the baseline; gaps: no value"
    )


def test_file_names_are_safe_and_all_different(tmp_path: Path) -> None:
    """Of targets whose names would be the same file, another folder, or no name."""
    names = ["", ".", "..", "a b", "A_B", "a_b_2", "a/b", "../a", 'a\\:*?"<>|', "\0\n", "蛋白/", "ß", "SS"]
    scores = by_hand("regression", "sequence", [], [3, 3], np.array([0.5, 1.5]))
    part, (target,) = scores.examples.test, scores.examples.targets
    many = replace(part, values=part.values * len(names), masks=part.masks * len(names))
    targets = tuple(replace(target, name=name) for name in names)
    table = pa.table({f"{name}_prediction": [0.5, 1.5] for name in names})
    examples = replace(scores.examples, targets=targets, train=many, test=many)
    folder = tmp_path / "inner"
    paths = draw(replace(scores, examples=examples, table=table), folder)
    assert len({path.name.casefold() for path in paths}) == len(paths) == len(names) + 1  # and that of the lengths
    assert not set("".join(path.name for path in paths)) & set(' /\\:*?"<>|')
    assert all(path.name.strip("._") for path in paths)
    assert [path.name for path in folder.parent.iterdir()] == ["inner"]
    check_pictures(paths, folder)


@given(st.text(), st.integers(1, 30))
def test_texts_are_one_line_and_short(text: str, most: int) -> None:
    assert not set(shorten(text, most)) & set("\n\r\t\v\f")
    assert len(shorten(text, most)) <= min(len(text), most)


def test_curves_have_bands_and_the_main_metric_is_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(numbers, "save", lambda figure, _path: drawn.append(figure))
    key = "test_location_spearman"
    points = [
        (step, {"test_location_average_precision": 0.75, key: 0.5, f"{key}_ci_low": 0.25, f"{key}_ci_high": 0.625})
        for step in (0, 1)
    ]
    curves(points, tmp_path)
    first, other = drawn[0].axes
    assert first.get_title(loc="left") == f"{key}\nhead 0.5"
    heights = first.collections[0].get_paths()[0].vertices[:, 1]
    assert {0.25, 0.625} <= set(heights.tolist())
    assert drawn[0].artists[0].get_text().endswith("bands: 95 % intervals")
    drawn[0].draw_without_rendering()
    assert other.title.get_window_extent().width == 0  # the title is the left one
    left = [axes._left_title.get_window_extent() for axes in drawn[0].axes]
    assert all(box.x0 >= 0 and box.x1 <= drawn[0].bbox.x1 for box in left)
