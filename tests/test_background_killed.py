"""Workers that are killed, hang or have no room on the disk, and trainings that are: nothing is lost or comes twice."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline import DownstreamValidation, setup_dwnstr_task_validation_callbacks
from tests.support.data import planted_task
from tests.support.killed_late import config, train
from tests.support.programs import ROOT
from tests.support.training import INERT

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path, model_folder: Any) -> Path:
    planted_task(tmp_path / "data")
    shutil.copytree(model_folder("esm"), tmp_path / "esm")
    return tmp_path


def measured(
    folder: Path, where: str, path: str | None = None, max_epochs: int = 4, **options: Any
) -> DownstreamValidation:
    """A training of 16 steps, measured at 0, 4, 8, 12 and 16."""
    (callback,) = setup_dwnstr_task_validation_callbacks(config(folder, **options))
    assert isinstance(callback, DownstreamValidation)
    train(folder, folder / where, [callback], path, max_epochs, **(INERT if path else {}))
    return callback


def points_of(callback: DownstreamValidation) -> Any:
    return callback.state_dict()["points"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_killed_or_hangs(
    folder: Path, tracking: str, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Tried once more: the curve is that of blocking."""
    hit: list[int] = []

    def strike() -> None:
        while not hit:
            for claim in folder.glob("late/downstream/*/step=4/claim"):
                if text := claim.read_text():
                    hit.append(int(text.partition("@")[0]))
                    os.kill(hit[0], number)
            time.sleep(0.001)

    threading.Thread(target=strike, daemon=True).start()
    with pytest.warns(UserWarning, match="failed at step 4, it is tried once more: the worker"):
        callback = measured(folder, "late", timeout=600.0 if number == signal.SIGKILL else 100.0)
    assert hit
    assert points_of(callback) == points_of(measured(folder, "waited", mode="blocking"))
    assert len(points_of(callback)) == 5


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:The dirpath has changed from")
@pytest.mark.filterwarnings("ignore:steps 0, 4.* of before the interruption")
@pytest.mark.parametrize("when", ["measured", "waiting"])
def test_a_training_that_is_killed_and_resumed(folder: Path, tracking: str, when: str) -> None:
    command = [sys.executable, "-m", "tests.support.killed_late", str(folder), when]
    killed = subprocess.run(command, cwd=ROOT, env={**os.environ, "MLFLOW_TRACKING_URI": tracking}, capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()[-2000:]
    (place,) = (folder / "downstream").iterdir()
    left = {path.name for path in place.glob("step=*")}
    assert left == (set() if when == "measured" else {"step=0", "step=4", "step=8"})
    path = str(folder / "kept" / ("step=8.ckpt" if when == "measured" else "step=4.ckpt"))
    resumed = measured(folder, ".", path)
    runs = MlflowClient().search_runs(["0"], order_by=["attributes.start_time"])
    history = MlflowClient().get_metric_history(runs[0].info.run_id, "test_label_accuracy")
    assert [one.step for one in history] == [0, 4, 8, 12, 16]
    assert runs[0].info.status == "FINISHED"
    assert [path.name for path in (folder / "downstream").iterdir()] == [place.name]
    assert not list(place.glob("step=*"))
    assert not list(place.rglob("*.ckpt"))
    step = int(Path(path).stem.partition("=")[2])
    whole = measured(folder, "whole", mode="blocking").curve
    again = measured(folder, "again", path, mode="blocking").curve  # a resumed training draws other random numbers
    assert points_of(resumed) == [*(one for one in whole if one[0] <= step), *again]


def test_a_disk_without_room_for_the_worker(folder: Path, tracking: str) -> None:
    """Said with the reason, twice; then the run has a tag and no metric, and the training has gone on."""
    command = f"bash -c 'ulimit -f 8; exec {sys.executable} -m pipeline worker {{folder}}'"
    with pytest.warns(UserWarning, match="failed at step 0") as said:
        callback = measured(folder, "full", worker_command=command, max_epochs=1)
    texts = [str(one.message) for one in said if "failed at step" in str(one.message)]
    assert [text.partition(":")[0] for text in texts] == [
        f"downstream validation failed at step {step}, {what}"
        for step in (0, 4)
        for what in ("it is tried once more", "training goes on")
    ]
    assert all("File too large" in text for text in texts)
    assert callback.curve == []
    (run,) = MlflowClient().search_runs(["0"])
    assert {"downstream.failed.step 0", "downstream.failed.step 4"} <= set(run.data.tags)
    assert run.data.metrics == {}
    assert not list(folder.rglob("weights.ckpt"))
