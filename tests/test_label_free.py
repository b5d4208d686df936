"""Effective rank, cosines and dead dimensions, against their definitions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from pipeline.embed import embed
from pipeline.load import load
from pipeline.report.overview import overview, summary
from pipeline.report.page import page
from pipeline.statistics.label_free import collapse, label_free
from pipeline.store.embedding_table import Store
from pipeline.tracking.protocol import Data, NullTracker
from pipeline.validation import validate
from tests.support.data import TEXTS, make_task, proteins, token_task
from tests.support.encoders import FakeEncoder
from tests.support.models import RESIDUES


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


def pooled(texts: list[str], width: int = 64) -> Any:
    """A useful encoder: a vector of each residue and of each pair of neighbours, and a mean as large as models have."""
    table = np.random.default_rng(0).normal(size=(20, 20, width))
    indices = [[RESIDUES.index(letter) for letter in text] for text in texts]
    return np.stack([(table[one[:-1], one[1:]] + table[one[:-1], 0]).mean(0) for one in indices]) + 2.0


def variants(n: int) -> list[str]:
    """Of one protein of 200 residues, which differ at four sites, as in GB1."""
    draw = np.random.default_rng(1)
    text = list(proteins(1, 3, 200)[0].ljust(200, "A"))
    return ["".join([*draw.choice(list(RESIDUES), 4), *text[4:]]) for _ in range(n)]


def test_useful_embeddings_have_not_collapsed() -> None:
    """Neither of variants, which are alike, nor with rogue or dead dimensions, a small width or few letters."""
    for texts in (proteins(80, 1), variants(80)):
        values = pooled(texts)
        cosine = label_free(values.astype(np.float32))["mean_cosine"]
        assert cosine > (0.999 if len(texts[0]) == 200 else 0.8)
        rogue = np.c_[values, np.full(80, 1e4), np.zeros(80)]
        sparse = np.c_[values, np.zeros((80, 200)), np.ones((80, 200))]
        for one in (values, rogue, sparse, pooled(texts, 4), values[:, :1], values.astype(np.float16)):
            assert collapse(one.astype(np.float32), texts) == ""
    letters = ["".join(np.random.default_rng(seed).choice(list("ACGT"), 60)) for seed in range(80)]
    assert collapse(pooled(letters), letters) == ""


def test_collapsed_embeddings_are_told() -> None:
    for texts in (proteins(80, 1), variants(80)):
        values = pooled(texts)
        same = "are almost the same for all sequences, {} % as far apart as the sequences' compositions"
        constant = np.ones_like(values)
        assert collapse(constant, texts) == same.format("0.00")
        assert collapse(constant + 1e-7 * values, texts) == same.format("0.00")
        assert collapse(values.mean(0) + 0.001 * (values - values.mean(0)), texts).startswith("are almost the same")
        first, second = values.T[:2]
        plane = np.outer(first, np.arange(1, 65)) + np.outer(second, np.arange(64, 0, -1))
        assert re.match("vary along [12]\\.. of 64 directions alone, and the sequences' compos", collapse(plane, texts))
        assert collapse(plane[:49], texts[:49]) == ""


class Collapsed(FakeEncoder):
    """Whose hidden states hardly depend on the sequence."""

    def state(self, sequence: str) -> Tensor:
        return 1 + 1e-4 * super().state(sequence)


def test_a_collapse_is_said_beside_the_verdict(tmp_path: Path, store: Store) -> None:
    rows = [{"sequence": text, "y": text.count("W") / len(text)} for text in proteins(80, 3)]
    task = make_task(tmp_path, rows, rows, num_epochs=1)
    for encoder, words in ((FakeEncoder(), []), (Collapsed(name="collapsed"), ["embeddings collapsed"])):
        (scores,) = validate(encoder, task, store)
        assert [one.short for one in scores.verdicts if "embeddings" in one.short] == words
        said = "the embeddings have collapsed: they are almost the same for all sequences, "
        texts = (overview([scores]).text(), summary({}, [scores]), page("title", [scores], {}, {}, ""))
        assert [text.count("embeddings collapsed") for text in texts] == [len(words)] * 3
        assert [text.count(said) for text in texts] == [0, len(words), len(words)]


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
