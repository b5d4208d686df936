"""Measurements in the background: the same curve as where the training waits, whatever happens to the worker."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from mlflow import MlflowClient

from pipeline import DownstreamValidation, setup_dwnstr_task_validation_callbacks
from pipeline.config.background import Background
from pipeline.config.task import Task
from tests.support.data import planted_task
from tests.support.training import Busy, Recorder, loader, section, trainer


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return planted_task(tmp_path / "data", num_epochs=2)


def fit(folder: Path, task: Task, esm: Path, mode: str = "background", options: Any = None, **background: Any) -> Any:
    """A training of 8 steps, measured at 0, 4 and 8. Returns the callback, the recorder and the trainer."""
    own = Background(**{"max_pending": 9, **background})
    config = section(folder, task, mode=mode, background=own, on_start=True)
    (callback,) = setup_dwnstr_task_validation_callbacks(config)
    assert isinstance(callback, DownstreamValidation)
    pl.seed_everything(5, verbose=False)
    module, recorder = Busy(esm), Recorder()
    one = trainer(folder, [callback, recorder], **(options or {}))
    one.fit(module, loader(), loader(shuffle=False))
    return callback, recorder, one


def test_the_curve_is_that_of_blocking(
    task: Task, tmp_path: Path, tracking: str, model_folder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Point for point, to the bit, and logged at the snapshots' steps; the training is the same too."""
    esm = model_folder("esm")
    with caplog.at_level(logging.INFO):
        late, behind, _ = fit(tmp_path / "late", task, esm)
    waited, before, _ = fit(tmp_path / "waited", task, esm, "blocking")
    print(caplog.text)
    assert late.curve == waited.curve
    assert [step for step, _ in late.curve] == [0, 4, 8]
    assert behind.states == before.states
    assert behind.end == before.end
    assert late.summary == waited.summary
    runs = MlflowClient().search_runs(["0"])
    assert len(runs) == 2
    for name, value in runs[0].data.metrics.items():
        histories = [MlflowClient().get_metric_history(run.info.run_id, name) for run in runs]
        points = [[(one.step, one.value) for one in history] for history in histories]
        assert points[0] == points[1], name
    assert runs[0].data.metrics.keys() == runs[1].data.metrics.keys()
    assert not list((tmp_path / "late").rglob("*.ckpt"))
