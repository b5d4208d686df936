"""Fixtures that several files use: real data where it is given, small models, a store, a tracking database."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if "PYTEST_XDIST_WORKER" in os.environ:  # more threads than cores are slow out of proportion
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

from pipeline.store.embedding_table import Store
from tests.support import models
from tests.support.browser import chromium, missing
from tests.support.encoders import FakeEncoder

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# In CI the same examples each time: what a new example finds is for whoever runs the tests by hand.
settings.register_profile("here", deadline=None)  # no test depends on time
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")

DATA_VARIABLE = "DOWNSTREAM_TEST_DATA"


def pytest_configure(config: pytest.Config) -> None:
    """Has pytest-xdist hand out the files in their order, which is the one without it, not the largest first."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


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
    """Makes a model of `tests.support.models` once per session: `model_folder("esm", width=16)`."""
    made: dict[str, Path] = {}

    def make(kind: str, **options: Any) -> Path:
        key = f"{kind}{sorted(options.items())}"
        if key not in made:
            made[key] = getattr(models, kind)(tmp_path_factory.mktemp(kind), **options)
        return made[key]

    return make


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    lack = missing()
    assert not (lack and os.environ.get("CI")), f"CI has not {lack}"
    if lack:
        pytest.skip(f"needs {lack}")
    with chromium() as opened:
        yield opened


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


@pytest.fixture
def fake() -> FakeEncoder:
    return FakeEncoder()
