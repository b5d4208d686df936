"""The background where something is not as usual: classes of a script, folders that are gone, states that are older."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from pipeline import DownstreamValidation, setup_dwnstr_task_validation_callbacks
from pipeline.config.background import Background
from pipeline.config.schema import Config
from pipeline.config.task import Task
from pipeline.encoders.description import DESCRIPTION
from pipeline.training.best import Best, Kept
from pipeline.training.snapshots import Snapshots
from pipeline.training.worker import Worker
from pipeline.training.worker_process import OwnWorker
from tests.support.background import NOBODY, loop_of, pending, place_of
from tests.support.data import planted_task
from tests.support.training import Busy, loader, section, trainer


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
    with pytest.raises(FileNotFoundError):
        worker._measure(snapshot)
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


@pytest.mark.usefixtures("tracking")
@pytest.mark.parametrize("name", ["x/../../../escaped", "0123abcd"])
def test_a_state_that_names_another_folder(
    task: Task, tmp_path: Path, model_folder: Any, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    downstream, model = loop_of(tmp_path, task, model_folder("esm"))
    state = downstream.state_dict()
    downstream.load_state_dict({**state, "background": {"training": name, "pending": []}})
    downstream(model, 0)
    downstream.close()
    place = place_of(tmp_path)
    assert not (tmp_path / "escaped").exists()
    assert (place.name == f"background-{name}") == (name == "0123abcd")
    assert ("one begins anew" in caplog.text) == (name != "0123abcd")


@pytest.mark.usefixtures("tracking")
def test_a_training_that_goes_back(task: Task, tmp_path: Path, model_folder: Any) -> None:
    """Neither the best snapshots nor the changes are of what comes later."""
    downstream, model = loop_of(tmp_path, task, model_folder("esm"))
    downstream(model, 0)
    state = downstream.state_dict()
    downstream.close()
    place = place_of(tmp_path)
    (place / "progress.pt").write_text("of a later result")
    (place / "best").mkdir()
    best = Best(place / "best", downstream.config)
    best._note([kept_at(4), kept_at(0)])
    for step in (0, 4):
        best.path(step).write_text("weights")
    again, model = loop_of(tmp_path, task, model_folder("esm"), max_pending=2)
    again.load_state_dict(state)
    again(model, 1)
    again.close()
    assert pending(again) == [0, 1]
    assert not (place / "progress.pt").exists()
    assert best.kept == [kept_at(0)]
    assert [path.name for path in place.glob("best/*.ckpt")] == ["step=0.ckpt"]


def kept_at(step: int) -> Kept:
    return Kept(step, 0.5 + step, None, None)


def test_fewer_are_kept_than_before(task: Task, tmp_path: Path) -> None:
    """As where `keep_best` was made less before a training was resumed."""
    queue, said = Snapshots(tmp_path), []
    for step, count in ((1, 3), (2, 3), (3, 3), (4, 1)):
        config = Config(dataset=[task], background=Background(keep_best=count, keep_best_metric="test_label_mcc"))
        made = queue.write(step, {"state_dict": {}}, {})
        best = Best(tmp_path / "best", config)
        said.append(best.offer(made, {"test_label_mcc": step / 10}))
    assert [path.name for path in tmp_path.glob("best/*.ckpt")] == ["step=4.ckpt"]
    assert said[-1].endswith("in the place of step=3 (0.3000), step=2 (0.2000), step=1 (0.1000)")


@pytest.mark.usefixtures("tracking")
def test_a_stage_that_only_validates_forgets_nothing(
    task: Task, tmp_path: Path, model_folder: Any, recwarn: pytest.WarningsRecorder
) -> None:
    """What was not measured when a training ended waits for the next training."""
    own = Background(worker_command=NOBODY, drain_timeout=0.0, max_pending=9)
    (callback,) = setup_dwnstr_task_validation_callbacks(
        section(tmp_path, task, mode="background", background=own, on_start=True)
    )
    assert isinstance(callback, DownstreamValidation)
    pl.seed_everything(5, verbose=False)
    module, one = Busy(model_folder("esm")), trainer(tmp_path, [callback], max_epochs=1)
    one.fit(module, loader(), loader(shuffle=False))
    before = callback.state_dict()["background"]
    one.validate(module, loader(shuffle=False), verbose=False)
    assert before["pending"] == [0, 4]
    assert callback.state_dict()["background"] == before
    assert not [said for said in recwarn if "mode is not background" in str(said.message)]


@pytest.mark.usefixtures("tracking")
def test_a_training_waits_no_longer_than_timeout(task: Task, tmp_path: Path, model_folder: Any) -> None:
    """Else it would wait for ever: nobody measures."""
    downstream, model = loop_of(tmp_path, task, model_folder("esm"), options={"timeout": 0.2}, when_busy="wait")
    for step in range(3):
        downstream(model, step)
    assert pending(downstream) == [0, 1]
    downstream.close()


@pytest.mark.usefixtures("tracking")
def test_changes_that_cannot_be_read(task: Task, tmp_path: Path, model_folder: Any) -> None:
    """A checkpoint of the training is written all the same."""
    downstream, model = loop_of(tmp_path, task, model_folder("esm"))
    downstream(model, 0)
    (place_of(tmp_path) / "progress.pt").write_text("damaged")
    state = downstream.state_dict()
    downstream.close()
    assert state["progress"] is None
    assert state["background"]["pending"] == [0]


def test_the_end_of_a_worker_is_no_fault_of_the_next_snapshot(tmp_path: Path) -> None:
    """It is started again for that one; if it ends again, it is."""
    queue, workers = (
        Snapshots(tmp_path),
        OwnWorker(tmp_path, 100.0, None),
    )  # whose process ends: there is no worker.json
    first, second = (queue.write(step, {"state_dict": {}}, {}) for step in (0, 4))
    workers.call(first)
    assert ended(workers) == 2
    assert "worker ended with code 2: " in workers.trouble(first)
    assert workers.trouble(second) == ""
    assert ended(workers) == 2
    assert "worker ended with code 2: " in workers.trouble(second)
    workers.stop()
    assert workers.trouble(second) == ""  # it was ended for another one
    workers.stop()


def ended(workers: OwnWorker) -> int:
    assert workers._process is not None
    return workers._process.wait(100)
