"""Effective rank, cosines and dead dimensions, against their definitions."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from pipeline.embed import embed
from pipeline.load import load
from pipeline.statistics.label_free import label_free
from pipeline.store.embedding_table import Store
from pipeline.tracking.protocol import Data, NullTracker
from pipeline.validation import validate
from tests.support.data import TEXTS, token_task
from tests.support.encoders import FakeEncoder


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (30, 30)])
def test_agrees_with_the_definitions(shape: tuple[int, int]) -> None:
    embeddings = np.random.default_rng(0).normal(1, 1, shape).astype(np.float32)
    embeddings[:, :3] = 0.25
    embeddings[:, 5] = embeddings[:, 6]
    singular = np.linalg.svd(embeddings.astype(np.float64), compute_uv=False)
    share = singular / singular.sum()
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in combinations(embeddings.astype(float), 2)]
    found = label_free(embeddings)
    assert found["rank_me"] == pytest.approx(np.exp(-np.sum(share * np.log(share + 1e-300))), rel=1e-4)
    assert found["mean_cosine"] == pytest.approx(np.mean(cosines), abs=1e-9)
    assert found["dead_dimensions"] == pytest.approx(3 / shape[1])


def test_known_ranks() -> None:
    assert label_free(np.eye(8, dtype=np.float32)) == pytest.approx(
        {"rank_me": 8.0, "mean_cosine": 0.0, "dead_dimensions": 0.0}
    )
    collapsed = label_free(np.ones((8, 4), np.float32))
    assert collapsed["rank_me"] == pytest.approx(1, abs=1e-4)
    assert collapsed["mean_cosine"] == pytest.approx(1)
    assert collapsed["dead_dimensions"] == 1
    assert label_free(np.zeros((3, 2), np.float32)) == {"rank_me": 0.0, "mean_cosine": 0.0, "dead_dimensions": 1.0}
    assert "mean_cosine" not in label_free(np.ones((1, 2), np.float32))


class Kept(NullTracker):
    """Keeps what it is given; stages go to another tracker."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def metrics(self, values: Mapping[str, float], step: int | None = None, data: Data | None = None) -> None:
        self.found |= values


@pytest.mark.parametrize("memory", [10**9, 0])
def test_of_the_distinct_train_sequences_pooled(tmp_path: Path, memory: int) -> None:
    task, encoder = token_task(tmp_path, [*TEXTS, *TEXTS]), FakeEncoder()
    (embeddings,) = embed([load(task)], encoder, Store(tmp_path, memory_bytes=memory))
    expected = label_free(np.stack([encoder.state(text).mean(0).numpy() for text in TEXTS]))
    assert embeddings.label_free == pytest.approx({f"embedding_{name}": value for name, value in expected.items()})


def test_named_behind_the_task_in_a_list(tmp_path: Path, store: Store) -> None:
    task = token_task(tmp_path)
    for tasks, prefix in ((task, ""), ([task], "tokens/")):
        tracker = Kept()
        validate(FakeEncoder(), tasks, store, tracker)
        names = ("rank_me", "mean_cosine", "dead_dimensions")
        assert {f"{prefix}embedding_{name}" for name in names} <= set(tracker.found)
