"""Several heads of one task, and labels that are standardised for them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.task import MaxRows, Task
from pipeline.embed import Embeddings, embed
from pipeline.heads.architectures import standard_head
from pipeline.heads.threads import on_threads, threads_of
from pipeline.load import load
from pipeline.report.tables import score_table
from pipeline.score import Scores, score
from pipeline.statistics.metrics import Metric, over_seeds
from pipeline.statistics.predictions import first_seed
from pipeline.store.embedding_table import Store
from pipeline.train_head import FittedHead, train_head
from tests.support.data import ADAM, make_task, planted_task, proteins
from tests.support.encoders import FakeEncoder

CPU = torch.device("cpu")


def embedded(task: Task, store: Store) -> Embeddings:
    (embeddings,) = embed([load(task)], FakeEncoder(), store)
    return embeddings


def measured(task: Task, store: Store) -> tuple[FittedHead, Scores]:
    embeddings = embedded(task, store)
    fitted = train_head(embeddings, store, CPU)
    return fitted, score(embeddings, fitted)


def numbers_task(folder: Path, mean: float = 0, deviation: float = 1, **options: Any) -> Task:
    """The share of W in a sequence, at any place and in any unit."""

    def rows(texts: list[str]) -> list[dict[str, object]]:
        return [{"sequence": text, "y": mean + 30 * deviation * text.count("W") / len(text)} for text in texts]

    settings = {"num_epochs": 5, "batch_size": 16, "optim": ADAM, **options}
    return make_task(folder, rows(proteins(90, 3)), rows(proteins(60, 4)), **settings)


LEVELS: dict[str, Any] = {"sequence": numbers_task, "token": planted_task}


@pytest.mark.parametrize("options", [{}, {"max_rows": MaxRows(train=40)}, {"patience": 1, "num_epochs": 12}], ids=str)
@pytest.mark.parametrize("level", list(LEVELS))
def test_key_num_seeds(tmp_path: Path, level: str, options: dict[str, Any]) -> None:
    """Head k is the head of a run with that seed, on the rows and the held-out part of the first seed."""
    task = LEVELS[level](tmp_path, **{"num_epochs": 3, **options})
    store = Store(tmp_path / "store")
    fitted, _ = measured(replace(task, num_seeds=3), store)
    assert [one.seed for one in fitted.heads] == [1234, 1235, 1236]
    assert len({tuple(one.losses) for one in fitted.heads}) == 3
    embeddings = embedded(task, store)
    for one in fitted.heads:
        parts = replace(embeddings.examples, task=replace(task, random_seed=one.seed))
        held_out = "patience" in options  # then the seed of a run draws what is held out too
        if held_out and one.seed != task.random_seed:
            continue
        alone = train_head(replace(embeddings, examples=parts), Store(tmp_path / f"alone{one.seed}"), CPU)
        assert one.losses == pytest.approx(alone.losses, rel=1e-5)
        assert one.steps == alone.heads[0].steps
        for ours, its in zip(one.head.parameters(), alone.head.parameters(), strict=True):
            torch.testing.assert_close(ours, its, atol=1e-4, rtol=1e-4)


def test_more_seeds_reuse_the_heads_that_are_there(tmp_path: Path) -> None:
    task, store = numbers_task(tmp_path), Store(tmp_path / "store")
    two, _ = measured(replace(task, num_seeds=2), store)
    assert two.metrics["reused"] == 0
    four, scores = measured(replace(task, num_seeds=4), store)
    assert [one.reused for one in four.heads] == [True, True, False, False]
    assert four.metrics["reused"] == 0.5
    assert not four.reused
    _, other = measured(replace(task, random_seed=1235, num_seeds=3), store)
    assert np.array_equal(scores.table["y_prediction"].to_numpy()[60:], other.table["y_prediction"].to_numpy())
    assert len(list((store.root / "heads").iterdir())) == 4


def test_a_small_head_does_not_depend_on_the_threads(tmp_path: Path) -> None:
    """One trains it: what four have stored is taken by one, with the bits that one gives."""
    task, stores = numbers_task(tmp_path), [Store(tmp_path / name) for name in ("four", "one")]
    with on_threads(4):
        four, _ = measured(task, stores[0])
        assert torch.get_num_threads() == 4
    with on_threads(1):
        again, one = measured(task, stores[0])[0], measured(task, stores[1])[0]
    assert again.reused
    assert not one.reused
    assert four.losses == one.losses


@pytest.mark.parametrize(("batch_size", "threads"), [(8, 1), (1_000, 1), (2_000, 3), (10_000, 13), (100_000, 64)])
def test_a_thread_has_a_gigaflop_of_each_step(tmp_path: Path, batch_size: int, threads: int) -> None:
    """An MLP of width 320 has 217,921 weights: a batch of 2,000 takes 6 x 2,000 x 217,921 = 2.6e9 operations."""
    examples = load(numbers_task(tmp_path, batch_size=batch_size))
    with on_threads(64):
        assert threads_of(standard_head("sequence", 320, [1]), examples) == threads


def test_scores_are_means_over_seeds_with_their_deviation(tmp_path: Path) -> None:
    task, store = numbers_task(tmp_path), Store(tmp_path / "store")
    _, scores = measured(replace(task, num_seeds=3), store)
    alone = [measured(replace(task, random_seed=seed), store)[1].metrics for seed in (1234, 1235, 1236)]
    for name in ("test_y_spearman", "test_y_mse", "dwnstr_task_val_loss"):
        each = [metrics[name] for metrics in alone]
        assert scores.metrics[name] == pytest.approx(fmean(each))
        assert scores.metrics[f"{name}_seed_std"] == pytest.approx(stdev(each))
    assert not any("seed_std" in name for name in alone[0])
    spearman, deviation = scores.metrics["test_y_spearman"], scores.metrics["test_y_spearman_seed_std"]
    assert f"{spearman:.4f} ± {deviation:.4f}" in score_table([scores]).text()


def test_the_table_has_a_block_for_each_seed(tmp_path: Path) -> None:
    task, store = planted_task(tmp_path, num_epochs=1), Store(tmp_path / "store")
    _, scores = measured(replace(task, num_seeds=2), store)
    units = int(load(task).test.counts.sum())
    assert scores.table["seed"].to_pylist() == [1234] * units + [1235] * units
    _, alone = measured(task, store)
    assert first_seed(scores.table).equals(alone.table)
    assert scores.first_seed["position"].to_pylist() == alone.table["position"].to_pylist()


def test_a_metric_that_one_head_does_not_have_is_left_out() -> None:
    def of(seed: int) -> list[Metric]:
        return [Metric("", "y", name, float(seed)) for name in ("mse", "spearman")]

    found, omitted = over_seeds([(of(1), {}), (of(3)[:1], {"test_y_spearman": "the predictions are all equal"})])
    assert found == [Metric("", "y", "mse", 2.0, seed_std=stdev([1.0, 3.0]))]
    assert omitted == {"test_y_spearman": "the predictions are all equal"}


@pytest.mark.parametrize("patience", [None, 3])
@pytest.mark.parametrize(("mean", "deviation"), [(52.0, 5.0), (1e7, 0.001)])
def test_key_standardize(tmp_path: Path, mean: float, deviation: float, patience: int | None) -> None:
    """Where the labels lie, and their unit, change no prediction but by that place and unit."""
    plain, own = numbers_task(tmp_path / "plain", patience=patience), {"patience": patience}
    store = Store(tmp_path / "store")
    first, one = measured(plain, store)
    moved, other = measured(numbers_task(tmp_path / "moved", mean, deviation, **own), store)
    expected = one.table["y_prediction"].to_numpy() * deviation + mean
    assert other.table["y_prediction"].to_numpy() == pytest.approx(expected, abs=1e-4 * deviation, rel=1e-12)
    assert moved.losses == pytest.approx([loss * deviation**2 for loss in first.losses], rel=1e-4)
    assert moved.val_losses == pytest.approx([loss * deviation**2 for loss in first.val_losses], rel=1e-4)
    assert other.metrics["test_y_spearman"] > 0.3


def test_labels_as_they_are(tmp_path: Path) -> None:
    """`standardize: false` trains on them: far from 0 a head needs long to get there; its key in the store differs."""
    task, store = numbers_task(tmp_path, 52), Store(tmp_path / "store")
    fitted, scores = measured(task, store)
    raw, other = measured(replace(task, standardize=False), store)
    assert not raw.reused
    assert raw.head.label_scale is None
    assert raw.losses[0] > 10 * fitted.losses[0]
    assert other.metrics["test_y_mse"] > 10 * scores.metrics["test_y_mse"]


def test_a_stored_head_predicts_in_the_units_of_the_labels(tmp_path: Path) -> None:
    task, store = numbers_task(tmp_path, 52), Store(tmp_path / "store")
    fresh, before = measured(task, store)
    stored, after = measured(task, store)
    assert stored.reused
    assert stored.head.label_scale == fresh.head.label_scale != None  # noqa: E711
    assert after.table.equals(before.table)
    labels = load(task).train.values[0]
    assert stored.head.label_scale == [(labels.mean(), labels.std())]


def test_masked_and_equal_labels_and_classes_beside_them(tmp_path: Path) -> None:
    """Mean and deviation are of unmasked labels; the deviation of equal ones is taken as 1."""
    rows = [
        {"sequence": "MKV", "y": json.dumps([1, 3, None]), "z": json.dumps([7, 7, 7])},
        {"sequence": "GG", "y": json.dumps([2, None]), "z": json.dumps([7, 7])},
    ]
    task = make_task(tmp_path, rows, level="token", target_column=["y", "z"], num_epochs=2)
    fitted, scores = measured(task, Store(tmp_path / "store"))
    assert fitted.head.label_scale == [(2.0, pytest.approx(np.std([1, 2, 3]))), (7.0, 1.0)]
    assert scores.metrics["test_z_mse"] < 4
    assert scores.metrics["test_y_mse"] < 4
