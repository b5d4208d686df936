"""Fixtures: real data where it is given, small models in real layouts, and encoders whose hidden states are known."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from pipeline.config.schema import Files, Task
from pipeline.encoders.protocol import Encoder
from pipeline.store.embedding_table import Store
from tests import models

# In CI the same examples each time: what a new example finds is for whoever runs the tests by hand.
settings.register_profile("here", deadline=None)  # no test depends on time
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")

ROOT = Path(__file__).resolve().parents[1]
DATA_VARIABLE = "DOWNSTREAM_TEST_DATA"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets; its `golden` sibling holds reference figures."""
    folder = os.environ.get(DATA_VARIABLE)
    if not folder or not Path(folder).is_dir():
        assert not os.environ.get("CI"), f"{DATA_VARIABLE} must name the real data in CI"
        pytest.skip(f"needs the real data sets: set {DATA_VARIABLE} to their folder")
    return Path(folder)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a model of `tests.models` once per session: `model_folder("esm", width=16)`."""
    made: dict[str, Path] = {}

    def make(kind: str, **options: Any) -> Path:
        key = f"{kind}{sorted(options.items())}"
        if key not in made:
            made[key] = getattr(models, kind)(tmp_path_factory.mktemp(kind), **options)
        return made[key]

    return make


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables: making one takes seconds, a copy none."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    with contextlib.chdir(path.parent):  # where the default experiment keeps its artifacts from now on
        MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def tracking(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URI of an MLflow database of its own, in force for this test and its subprocesses."""
    import mlflow

    path = tmp_path / "mlflow.db"
    shutil.copy(empty_database, path)
    uri = f"sqlite:///{path}"
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    yield uri
    mlflow.set_tracking_uri(before)


def newest_run() -> Any:
    """The run begun last, nested ones aside."""
    from mlflow import MlflowClient

    runs = MlflowClient().search_runs(["0"])
    return next(run for run in runs if "mlflow.parentRunId" not in run.data.tags)


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """A CSV file with the keys of the first row as its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def make_task(
    folder: Path,
    train: Sequence[Mapping[str, object]],
    test: Sequence[Mapping[str, object]] | None = None,
    **options: Any,
) -> Task:
    """Writes the rows and gives the task that reads them; the last column is the target unless said otherwise."""
    write_csv(folder / "train" / "x000.csv", train)
    write_csv(folder / "test" / "x000.csv", test if test is not None else train)
    given: dict[str, Any] = {"dataset_path": str(folder), "dataset": Files(), "target_column": [list(train[0])[-1]]}
    return Task(**{**given, **options})


class FakeEncoder(Encoder):
    """Hidden states worked out by hand: one-hot residues, then noise that depends on the sequence alone."""

    device = torch.device("cpu")

    def __init__(self, hidden_size: int = 24, name: str = "fake") -> None:
        self.hidden_size = hidden_size
        self.digest = f"{name}-{hidden_size}"
        self.seen: list[str] = []

    def hidden_states(self, sequences: Sequence[str]) -> list[Tensor]:
        self.seen += sequences
        return [self.state(sequence) for sequence in sequences]

    def state(self, sequence: str) -> Tensor:
        """Shape (length, hidden_size)."""
        index = torch.tensor([models.RESIDUES.find(letter) for letter in sequence])
        one_hot = torch.nn.functional.one_hot(index.clamp(min=0), 20).float()
        seed = int.from_bytes(hashlib.sha256(sequence.encode()).digest()[:4], "big")
        noise = torch.randn(len(sequence), self.hidden_size - 20, generator=torch.Generator().manual_seed(seed))
        return torch.cat([one_hot, 0.1 * noise], 1)

    def count_unknown(self, sequences: Sequence[str]) -> list[tuple[int, int]]:
        return [(sum(letter not in models.RESIDUES for letter in text), len(text)) for text in sequences]


@pytest.fixture
def fake() -> FakeEncoder:
    return FakeEncoder()
