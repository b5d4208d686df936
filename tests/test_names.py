"""What the run of a training is called in MLflow, where the training has no logger for it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wandb
from mlflow import MlflowClient
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from pipeline import Downstream, DownstreamTrainerCallback, setup_dwnstr_task_validation_callbacks
from pipeline.config.task import Task
from pipeline.tracking.sender import flush
from tests.support.data import planted_task
from tests.support.loops import loop, train
from tests.support.own_model import OwnTokenizer
from tests.support.training import Busy, loader, section, trainer

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return planted_task(tmp_path / "data", num_epochs=1)


def name_of_the_run(tracking: str) -> str:
    flush()
    (run,) = MlflowClient(tracking).search_runs(["0"])
    return str(run.info.run_name)


LOGGERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "none": (lambda _: False, f"{TIME} Busy on planted"),
    "without a name": (CSVLogger, f"{TIME} Busy on planted"),
    "CSV": (lambda folder: CSVLogger(folder, "small"), "small/version_0"),
    "its version": (lambda folder: TensorBoardLogger(folder, version="second"), "second"),
    "TensorBoard": (lambda folder: TensorBoardLogger(folder, "small", "second"), "small/second"),
    "W&B": (lambda folder: WandbLogger("small", folder, offline=True), "small"),
}


@pytest.mark.parametrize("kind", LOGGERS)
def test_lightning(
    kind: str,
    task: Task,
    tmp_path: Path,
    tracking: str,
    model_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wandb.teardown()  # it keeps the settings of an earlier run of this process
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    make, expected = LOGGERS[kind]
    task.task_name = "planted"
    callbacks = setup_dwnstr_task_validation_callbacks(section(tmp_path, task, on_start=True))
    training = trainer(tmp_path, callbacks, max_steps=1, logger=make(tmp_path / "logs"))
    training.fit(Busy(model_folder("esm")), loader(), loader(shuffle=False))
    if kind == "W&B":
        vars(training.loggers[0])["_experiment"].finish()
    assert re.fullmatch(expected, name_of_the_run(tracking))


@pytest.mark.parametrize(("own", "expected"), [({}, f"{TIME} Net on planted"), ({"run_name": "small"}, "small")])
def test_the_hugging_face_trainer(
    own: dict[str, Any], expected: str, task: Task, tmp_path: Path, tracking: str
) -> None:
    task.task_name = "planted"
    callback = DownstreamTrainerCallback(section(tmp_path, task))
    train(tmp_path / "out", [callback], max_steps=1, eval_steps=1, save_steps=1, **own)
    assert re.fullmatch(expected, name_of_the_run(tracking))


def test_a_loop(task: Task, tmp_path: Path, tracking: str) -> None:
    task.task_name = "planted"
    with Downstream(section(tmp_path, task), OwnTokenizer()) as downstream:
        loop(downstream, last=1)
    assert re.fullmatch(f"{TIME} Net on planted", name_of_the_run(tracking))
