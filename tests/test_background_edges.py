"""The background where something is not as usual: classes of a script, folders that are gone, states that are older."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.task import Task
from pipeline.encoders.description import DESCRIPTION
from pipeline.training.snapshots import Snapshots
from pipeline.training.worker import Worker
from tests.support.background import loop_of, place_of
from tests.support.data import planted_task


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return planted_task(tmp_path / "data", num_epochs=1)


@pytest.fixture
def in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a worker sets for its process is set back."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


@dataclass
class Settings:
    """Of a training script, as `save_hyperparameters` keeps them."""

    rate: float = 0.1


@pytest.mark.usefixtures("in_process", "tracking")
def test_a_snapshot_with_an_object_of_a_class_of_the_script(task: Task, tmp_path: Path, model_folder: Any) -> None:
    """It is measured; with the precision of matrix products that the training has, and without a false note."""
    torch.set_float32_matmul_precision("high")
    downstream, model = loop_of(tmp_path, task, model_folder("esm"), options={"compile": True})
    downstream(model, 0)
    place, program = place_of(tmp_path), sys.modules["__main__"]
    weights = place / "step=0/weights.ckpt"
    content = torch.load(weights, weights_only=True)
    assert "made_with" not in content[DESCRIPTION]
    assert downstream.session.description is not None
    assert "made_with" not in downstream.session.description
    Settings.__module__ = "__main__"
    vars(program)["Settings"] = Settings
    torch.save({**content, "hyper_parameters": {"settings": Settings()}}, weights)
    del vars(program)["Settings"]
    torch.set_float32_matmul_precision("highest")
    worker = Worker(place)
    assert torch.get_float32_matmul_precision() == "high"
    assert not worker._options.compile
    worker.run()
    downstream.close()
    assert [step for step, _ in downstream.curve] == [0]


@pytest.mark.usefixtures("in_process", "tracking")
def test_a_snapshot_that_is_dropped_while_it_is_measured(task: Task, tmp_path: Path, model_folder: Any) -> None:
    """The worker makes no folder in its place, which would be in the way of a later snapshot."""
    downstream, model = loop_of(tmp_path, task, model_folder("esm"))
    downstream(model, 0)
    place = place_of(tmp_path)
    worker, snapshot = Worker(place), Snapshots(place).of(0)
    snapshot.remove()
    worker._handle(snapshot)
    assert not snapshot.folder.exists()
    downstream.close()


def test_a_folder_that_an_earlier_worker_left_is_cleared(tmp_path: Path) -> None:
    queue = Snapshots(tmp_path)
    (tmp_path / "step=3/draft-0f/files").mkdir(parents=True)
    queue.write(2, {"state_dict": {}}, {})
    queue.clear(5)
    queue.write(3, {"state_dict": {}}, {})
    assert [one.step for one in queue.waiting()] == [2, 3]
