"""Measurements in the background: the same curve as where the training waits, whatever happens to the worker."""

from __future__ import annotations

import json
import logging
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from mlflow import MlflowClient

from pipeline import (
    Downstream,
    DownstreamTrainerCallback,
    DownstreamValidation,
    Store,
    open_encoder,
    setup_dwnstr_task_validation_callbacks,
)
from pipeline.config.background import Background
from pipeline.config.schema import Config
from pipeline.config.task import Task
from pipeline.errors import CheckpointError, ConfigError, PipelineError
from pipeline.tracking.protocol import Data
from pipeline.tracking.recording import Recording, replay
from pipeline.tracking.sender import flush
from pipeline.training.best import Best
from pipeline.training.loop import _look
from pipeline.training.snapshots import Snapshots, on_cpu
from pipeline.training.worker import Worker
from pipeline.validation import validate
from tests.support.background import loop_of, pending, snapshots
from tests.support.data import planted, planted_task, proteins, write_csv
from tests.support.lab import newest_run
from tests.support.own_model import OwnTokenizer
from tests.support.programs import ROOT
from tests.support.training import Busy, Recorder, loader, section, trainer

ACCURACY = "test_label_accuracy"


@pytest.fixture
def task(tmp_path: Path) -> Task:
    made = planted_task(tmp_path / "data", num_epochs=2)
    write_csv(Path(made.dataset_path) / "test/x000.csv", planted(proteins(60, 2)))  # enough for intervals
    return made


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
    for name in runs[0].data.metrics:
        histories = [MlflowClient().get_metric_history(run.info.run_id, name) for run in runs]
        points = [[(one.step, one.value) for one in history] for history in histories]
        assert points[0] == points[1], name
    assert runs[0].data.metrics.keys() == runs[1].data.metrics.keys()
    assert f"{ACCURACY}_delta_start" in late.curve[-1][1]
    assert "in the background" in caplog.text
    assert not list((tmp_path / "late").rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("when_busy", "max_pending", "steps"),
    [("drop_oldest", 1, [0, 4]), ("drop_oldest", 2, [0, 3, 4]), ("skip", 1, [0, 1, 4]), ("skip", 2, [0, 1, 2, 4])],
)
def test_where_the_worker_is_busy(
    task: Task, tmp_path: Path, tracking: str, model_folder: Any, when_busy: str, max_pending: int, steps: list[int]
) -> None:
    """The first is being measured; of the others as many wait as may, and the last is among them in the end."""
    downstream, model = loop_of(
        tmp_path, task, model_folder("esm"), when_busy=when_busy, max_pending=max_pending, drain_timeout=0.2
    )
    for step in range(5):
        assert downstream(model, step) == {}
        with torch.no_grad():
            next(model.parameters()).add_(0.01)
    with torch.no_grad():
        next(model.parameters()).sub_(0.01)
    downstream._last = *downstream._last[:2], _look(model)  # as if not trained since
    downstream.close()
    assert pending(downstream) == steps
    assert snapshots(tmp_path) == {f"step={step}" for step in steps}
    assert downstream.curve == []
    assert downstream.session._points == [(step, {}) for step in range(5) if step not in {*steps, 4}] + (
        [(4, {})] if when_busy == "skip" else []
    )
    (noted,) = tmp_path.rglob("missed.json")  # where the worker finds the gaps of what it draws
    assert {*steps} | {*json.loads(noted.read_text())} == {*range(5)}


@pytest.mark.parametrize("hidden", [False, True])
def test_skipped_weights_that_have_changed_are_not_measured(
    task: Task, tmp_path: Path, tracking: str, model_folder: Any, hidden: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where an optimizer changed them through `.data`."""
    downstream, model = loop_of(tmp_path, task, model_folder("esm"), when_busy="skip")
    for step in range(3):
        downstream(model, step)
    with torch.no_grad():
        weight = next(model.parameters())
        (weight.data if hidden else weight).add_(0.01)
    downstream.close()
    assert pending(downstream) == [0, 1]
    assert "the last weights are not measured" in caplog.text


def test_what_is_left_is_said_and_measured_by_the_command_line_or_later(
    task: Task, tmp_path: Path, tracking: str, model_folder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker that is started by hand, and a training that is resumed; and each is the checkpoint's own score."""
    downstream, model = loop_of(tmp_path, task, model_folder("esm"), max_pending=2, keep_best=1)
    for step in range(3):
        downstream(model, step)
        with torch.no_grad():
            model.esm.encoder.layer[0].attention.self.value.weight.mul_(1.5)
    state = downstream.state_dict()
    downstream.close()
    assert "steps 0, 1, 2 not measured after 0 s (background.drain_timeout); resume the training" in caplog.text
    (place,) = (tmp_path / "out/downstream").iterdir()
    scores = {}
    for step in range(3):
        encoder = open_encoder(str(place / f"step={step}/weights.ckpt"))
        (scores[step],) = validate(encoder, task, Store(tmp_path / f"store {step}"))
        assert encoder.step == step
    command = [sys.executable, "-m", "pipeline", "worker", str(place)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    again, model = loop_of(tmp_path, task, model_folder("esm"), max_pending=2, keep_best=1)
    again.load_state_dict(state)
    again(model, 3)
    assert [step for step, _ in again.curve] == [0, 1, 2]
    for step, metrics in again.curve:
        assert scores[step].metrics.items() <= metrics.items()
    assert pending(again) == [3]
    again.close()
    best = max(again.curve, key=lambda point: (point[1][ACCURACY], -point[0]))
    (kept,) = place.glob("best/*.ckpt")
    assert kept.name == f"step={best[0]}.ckpt"
    (found,) = validate(open_encoder(str(kept)), task, Store(tmp_path / "store best"))
    assert found.metrics[ACCURACY] == best[1][ACCURACY]
    third, model = loop_of(tmp_path, task, model_folder("esm"), max_pending=2)
    third.load_state_dict(state)  # once more from the same state: the results are there, and are not logged again
    third(model, 2)
    assert third.state_dict()["points"] == again.curve
    assert third.curve == []
    third.close()
    flush()
    history = MlflowClient().get_metric_history(newest_run().info.run_id, ACCURACY)
    assert [one.step for one in history] == [0, 1, 2]


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_a_worker_that_fails_twice(
    task: Task, tmp_path: Path, tracking: str, model_folder: Any, on_error: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said, and the run has it; nothing is logged as a metric."""
    downstream, model = loop_of(
        tmp_path, task, model_folder("esm"), on_error, worker_command="false {folder}", drain_timeout=60.0
    )
    downstream(model, 0)
    if on_error == "raise":
        with pytest.raises(PipelineError, match="failed at step 0"):
            downstream.close()
        downstream.session.close("FAILED")
        return
    downstream.close()
    assert "failed at step 0, it is tried once more: 'false" in caplog.text
    assert "failed at step 0, training goes on: 'false" in caplog.text
    flush()
    run = newest_run()
    assert "ended with code 1" in run.data.tags["downstream.failed.step 0"]
    assert run.data.metrics == {}
    assert snapshots(tmp_path) == set()


def test_a_command_of_the_user_s(
    task: Task, tmp_path: Path, tracking: str, model_folder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pipeline.training")
    command = f"{shlex.quote(sys.executable)} -m pipeline worker {{folder}}"
    downstream, model = loop_of(tmp_path, task, model_folder("esm"), worker_command=command, drain_timeout=300.0)
    downstream(model, 0)
    downstream.close()
    assert [step for step, _ in downstream.curve] == [0]
    (waited,) = [line for line in caplog.messages if "the training waited" in line]
    assert waited.endswith(" % of the training's time in all")
    assert snapshots(tmp_path) == set()


def test_a_snapshot_that_cannot_be_written(
    task: Task, tmp_path: Path, tracking: str, model_folder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    downstream, model = loop_of(tmp_path, task, model_folder("esm"))
    (tmp_path / "out").write_text("not a folder")
    downstream(model, 0)
    downstream.close()
    assert "failed at step 0, training goes on: background: " in caplog.text
    assert "cannot be written" in caplog.text
    flush()
    assert "cannot be written" in newest_run().data.tags["downstream.failed.step 0"]


def test_the_threads_of_the_worker(
    task: Task, tmp_path: Path, tracking: str, model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as the training has, so that scores are the same to the bit; or as the key says."""
    before, threads = torch.get_num_threads(), []
    monkeypatch.chdir(tmp_path)  # a worker goes to the folder of the training
    downstream, model = loop_of(tmp_path, task, model_folder("esm"))
    downstream(model, 0)
    downstream.close()
    (place,) = (tmp_path / "out/downstream").iterdir()
    try:
        for own in ("null", "3"):
            config = (place / "config.yaml").read_text()
            (place / "config.yaml").write_text(config.replace("worker_threads: null", f"worker_threads: {own}"))
            torch.set_num_threads(before + 1)
            Worker(place)
            threads.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(before)
    assert threads == [before, 3]


@pytest.mark.parametrize("kind", ["ModelCheckpoint", "EarlyStopping"])
def test_monitors_are_refused(task: Task, tmp_path: Path, tracking: str, model_folder: Any, kind: str) -> None:
    config = section(tmp_path, task, mode="background")
    callbacks = setup_dwnstr_task_validation_callbacks(config)
    monitor = getattr(pl.callbacks, kind)(monitor=ACCURACY)
    with pytest.raises(ConfigError, match=f"{kind}.*{ACCURACY}.*keep_best"):
        trainer(tmp_path, [monitor, *callbacks]).fit(Busy(model_folder("esm")), loader(), loader())


def test_a_best_model_is_refused(task: Task, tmp_path: Path, tracking: str) -> None:
    from tests.support.loops import BEST, late_section, train

    callback = DownstreamTrainerCallback(late_section(tmp_path, "background"))
    with pytest.raises(ConfigError, match=f"metric_for_best_model='eval_{BEST}'.*keep_best"):
        train(tmp_path / "out", [callback], metric_for_best_model=f"eval_{BEST}")


def test_a_module_that_cannot_be_made_again_is_waited_for(
    task: Task, tmp_path: Path, tracking: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Said in one line, and then as without the key."""
    from tests.support.loops import make_model

    config = section(tmp_path, task, mode="background", on_start=True)
    with Downstream(config, tokenizer=OwnTokenizer(), folder=tmp_path / "out") as downstream:
        assert ACCURACY in downstream(make_model(), 0)
    (said,) = [line for line in caplog.messages if "mode: background cannot be" in line]
    assert "Net cannot be made again from its weights; set model_factory" in said


def test_the_best_are_kept_and_ties_are_said(tmp_path: Path, task: Task) -> None:
    config = Config(dataset=[task], background=Background(keep_best=2, keep_best_metric="test_label_mcc"))
    best, folder = Best(tmp_path / "best", config), Snapshots(tmp_path / "queue")
    folder.folder.mkdir()
    said = []
    for step, value in ((1, 0.5), (2, 0.7), (3, 0.5), (4, 0.9), (5, 0.1)):
        made = folder.write(step, {"state_dict": {"weight": torch.tensor([step])}}, {"step": step})
        numbers = {"test_label_mcc": value, "test_label_mcc_ci_low": value - 0.1, "test_label_mcc_ci_high": value + 0.1}
        said.append(best.offer(made, numbers))
        best.offer(made, numbers)  # as after an interruption
    assert sorted(path.name for path in (tmp_path / "best").glob("*.ckpt")) == ["step=2.ckpt", "step=4.ckpt"]
    assert torch.load(tmp_path / "best/step=4.ckpt")["state_dict"]["weight"].item() == 4
    assert "step=1 (0.5000, interval 0.400 to 0.600) is kept" in said[0]
    assert "step=3 (0.5000, interval 0.400 to 0.600) is not kept" in said[2]
    assert "do not tell it from step=1" in said[2]
    assert "in the place of step=1" in said[3]
    assert "do not tell it" not in said[3]
    assert best.offer(folder.write(6, {"state_dict": {}}, {}), {}).endswith("test_label_mcc is not defined there")


def test_a_disk_without_room_for_a_snapshot(tmp_path: Path) -> None:
    """Nothing is left half written, and there is room for the next one."""
    queue = Snapshots(tmp_path)
    content = {"state_dict": {"weight": torch.zeros(100_000)}}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"step=3' cannot be written .*make room"):
            queue.write(3, content, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
    queue.write(3, content, {})
    assert [one.step for one in queue.waiting()] == [3]


def test_weights_that_share_memory_do_so_in_a_snapshot() -> None:
    weight = torch.arange(4.0)
    copied = on_cpu({"a": weight, "b": weight, "c": weight[:2], "extra": "state"})
    weight.zero_()
    assert copied["a"] is copied["b"]
    assert copied["a"].tolist() == [0, 1, 2, 3]
    assert copied["c"].untyped_storage().nbytes() == 8
    assert copied["extra"] == "state"


def test_calls_of_a_tracker_are_made_later(tmp_path: Path) -> None:
    """The same calls, in the same order, with the same files."""
    (tmp_path / "one.png").write_text("a picture")
    data = Data("task", "test", "folder", "0f", 3, 1)
    for name in ("told", "again"):
        (tmp_path / name).mkdir()
    told, again = Recording(tmp_path / "told"), Recording(tmp_path / "again")
    with told.stage("score") as stage:
        stage.metrics({"a": 0.1 + 0.2}, 3, data)
        stage.note("a note")
    told.artifact(tmp_path / "one.png", "figures", 4)
    told.data(data)
    (tmp_path / "one.png").unlink()
    replay(json.loads(json.dumps(told.calls)), again, tmp_path / "told")
    (stage_call, artifact, data_call), (_, kept, _) = again.calls, told.calls
    assert [stage_call, kept, data_call] == told.calls
    assert (tmp_path / "again" / artifact[1]).read_text() == "a picture"
    assert artifact[2:] == ["figures", 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"worker_command": "sbatch measure.sh"}, "a command with {folder} in it"),
        ({"worker_command": "sbatch '{folder}"}, "No closing quotation"),
        ({"worker_device": "gpu"}, "background.worker_device: expected one of auto, cpu, cuda, mps"),
        ({"when_busy": "drop"}, "background.when_busy: expected one of drop_oldest, skip, wait"),
        ({"drain_timeout": -1.0}, "expected 0 to 10 million seconds"),
        ({"keep_best": -1}, "background.keep_best is -1, expected at least 0"),
        ({"keep_best_metric": "test_label_acuracy"}, "did you mean 'test_label_accuracy'"),
    ],
)
def test_keys_that_are_wrong(task: Task, tmp_path: Path, options: Any, message: str) -> None:
    config = section(tmp_path, task, mode="background", background=Background(**options))
    with pytest.raises(ConfigError) as error:
        config.check()
    assert message in str(error.value)
