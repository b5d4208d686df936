"""A training that was killed in the middle of a measurement, resumed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from mlflow import MlflowClient

from pipeline import Store, open_encoder, setup_dwnstr_task_validation_callbacks, validate
from tests.support.data import planted_task, planted_task_at
from tests.support.programs import ROOT
from tests.support.training import INERT, Busy, Recorder, loader, section, trainer


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:The dirpath has changed from")
def test_killed_in_a_validation_and_resumed(tmp_path: Path, tracking: str, model_folder: Any) -> None:
    """As if resumed without the callback; one curve, in one run; each point is the command line's on its checkpoint."""
    planted_task(tmp_path / "data")
    shutil.copytree(model_folder("esm"), tmp_path / "esm")
    command = [sys.executable, "-m", "tests.support.killed", str(tmp_path)]
    killed = subprocess.run(command, cwd=ROOT, env={**os.environ, "MLFLOW_TRACKING_URI": tracking}, capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()[-2000:]
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["step=4.ckpt"]
    assert len(list((tmp_path / "store" / "live").glob("*/"))) == 1  # what the killed one left
    task = planted_task_at(tmp_path / "data")
    recorders = []
    for measured in (False, True):
        callbacks = setup_dwnstr_task_validation_callbacks(section(tmp_path, task)) if measured else []
        recorders.append(Recorder())
        keep = pl.callbacks.ModelCheckpoint(tmp_path / f"kept {measured}", "{step}", save_top_k=-1)
        pl.seed_everything(4, verbose=False)
        resumed = trainer(tmp_path, [*callbacks, keep, recorders[-1]], max_epochs=4)
        path = str(tmp_path / "kept" / "step=4.ckpt")
        module = Busy(tmp_path / "esm")
        resumed.fit(module, loader(), loader(shuffle=False), ckpt_path=path, **INERT)
    assert recorders[0].states == recorders[1].states
    assert recorders[0].end == recorders[1].end
    assert len(recorders[0].states) == 12
    (run,) = MlflowClient().search_runs(["0"])
    history = MlflowClient().get_metric_history(run.info.run_id, "test_label_accuracy")
    assert [point.step for point in history] == [4, 8, 12, 16]
    assert run.info.status == "FINISHED"
    for point in history:
        folder = tmp_path / ("kept" if point.step == 4 else "kept True")
        encoder = open_encoder(str(folder / f"step={point.step}.ckpt"))
        (scores,) = validate(encoder, task, Store(tmp_path / str(point.step)))
        assert scores.metrics["test_label_accuracy"] == point.value
    assert list((tmp_path / "store" / "live").iterdir()) == []
