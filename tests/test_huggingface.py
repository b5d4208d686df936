"""The Hugging Face Trainer: scores for its best checkpoint and its reporters, and a training that is not changed."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline import DownstreamTrainerCallback, validation
from pipeline.config.task import Task
from pipeline.errors import ConfigError, DataError
from pipeline.tracking.sender import flush
from tests.support.data import planted_task
from tests.support.loops import BEST, make_model, train
from tests.support.own_model import OwnTokenizer
from tests.support.readers import assert_in_wandb, in_tensorboard
from tests.support.training import section
from tests.support.two_ranks_of import both_ranks

NAME = f"eval_{BEST}"
CHOOSE: dict[str, Any] = {
    "metric_for_best_model": NAME,
    "greater_is_better": True,
    "load_best_model_at_end": True,
}
FRESH = {(4, "hooks"), (4, "modes")}  # a resumed model has not yet run, nor been evaluated


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return planted_task(tmp_path / "data", num_epochs=1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    seen: list[Any] = train(tmp_path_factory.mktemp("plain")).seen
    return seen


def made(tmp_path: Path, task: Task, **options: Any) -> DownstreamTrainerCallback:
    given = {"on_start": True, "on_error": "raise", **options}
    return DownstreamTrainerCallback(section(tmp_path, task, **given))


def differing(seen: list[Any], expected: list[Any]) -> set[tuple[int, str]]:
    """At which step what is not the same."""
    assert [step for step, _ in seen] == [step for step, _ in expected]
    pairs = zip(seen, expected, strict=True)
    return {(step, name) for (step, one), (_, other) in pairs for name in one if one[name] != other[name]}


def in_history(trainer: Any) -> list[tuple[int, float]]:
    return [(entry["step"], entry[NAME]) for entry in trainer.state.log_history if NAME in entry]


def test_the_best_checkpoint_and_the_reporters(
    task: Task, tmp_path: Path, tracking: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Early stopping stands before the callback, and sees the metric nevertheless; the console has the main ones."""
    import mlflow
    import wandb

    wandb.teardown()  # it keeps the settings of an earlier run of this process
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "out/tb"))
    callback = made(tmp_path, task)
    stopping = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=100.0)
    reporters = ["tensorboard", "wandb", "mlflow"]
    trainer = train(tmp_path / "out", [stopping, callback], report_to=reporters, **CHOOSE)
    assert trainer.state.global_step == 4  # the second evaluation is not better by 100
    curve = [(step, found[BEST]) for step, found in callback.session.curve]
    assert [step for step, _ in curve] == [0, 2, 4]
    assert in_history(trainer) == curve
    best = max(curve[1:], key=lambda one: one[1])
    assert trainer.state.best_metric == best[1]
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best[0]}")
    (events,) = {file.parent for file in (tmp_path / "out").rglob("events.out.*")}
    printed = capsys.readouterr().out
    assert printed.count(f"'{NAME}'") == len(curve)
    assert NAME.replace("accuracy", "macro_f1") not in printed
    assert in_tensorboard(events, f"eval/{BEST.replace('accuracy', 'macro_f1')}")
    in_single: list[Any] = [(step, pytest.approx(value)) for step, value in curve]
    assert in_tensorboard(events, f"eval/{BEST}") == in_single
    wandb.finish()
    (file,) = tmp_path.rglob("run-*.wandb")
    assert_in_wandb(file, f"eval/{BEST}", curve, "train/global_step")
    flush()
    mlflow.end_run()
    (run,) = MlflowClient(tracking).search_runs(["0"])
    for name in (NAME, BEST):  # what the trainer reports, and the measurement's own
        history = MlflowClient(tracking).get_metric_history(run.info.run_id, name)
        assert [(one.step, one.value) for one in history] == curve


def test_stopped_and_resumed(task: Task, tmp_path: Path, tracking: str, undisturbed: Any) -> None:
    """Weights, optimizer, random states and the order of the data are those of an undisturbed training."""
    whole = made(tmp_path, task)
    assert train(tmp_path / "whole", [whole]).seen == undisturbed
    train(tmp_path / "out", [made(tmp_path, task)], stop=4)
    stored = json.loads((tmp_path / "out/checkpoint-4/trainer_state.json").read_text())
    assert [step for step, _ in stored["stateful_callbacks"][whole.state_key]["points"]] == [0, 2, 4]
    resumed = made(tmp_path, task)
    trainer = train(tmp_path / "out", [resumed], resume=str(tmp_path / "out/checkpoint-4"))
    assert differing(trainer.seen, undisturbed[4:]) <= FRESH
    points = [(step, found) for step, found in resumed.session.state()["points"]]
    assert points == whole.session.curve
    assert in_history(trainer) == [(step, found[BEST]) for step, found in points]
    flush()
    runs = MlflowClient(tracking).search_runs(["0"])
    for run in runs:
        history = MlflowClient(tracking).get_metric_history(run.info.run_id, BEST)
        assert [one.step for one in history] == [0, 2, 4, 6, 8]
    assert len(runs) == 2


def test_a_measurement_that_fails_or_is_left_out(
    task: Task, tmp_path: Path, tracking: str, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer goes on, though it chooses by a metric that is not there."""
    callback = made(tmp_path, task, on_error="warn", every_n_validations=2, on_start=False)
    stages: Any = validation
    real, values = stages.score, [1, 0]

    def fail(*given: Any, **options: Any) -> Any:
        torch.rand(2)
        if not values.pop(0):
            raise DataError("injected")
        return real(*given, **options)

    monkeypatch.setattr(validation, "score", fail)
    trainer = train(tmp_path / "out", [callback], **{**CHOOSE, "load_best_model_at_end": False})
    assert trainer.seen == undisturbed
    assert [step for step, _ in in_history(trainer)] == [2]
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert not math.isnan(trainer.state.best_metric)


def test_each_save_where_there_is_no_evaluation(task: Task, tmp_path: Path, tracking: str) -> None:
    options: dict[str, Any] = {"eval_strategy": "no", "save_steps": 4}
    without = train(tmp_path / "plain", **options).seen
    callback = made(tmp_path, task, on_start=False)
    trainer = train(tmp_path / "out", [callback], **options)
    assert trainer.seen == without
    assert [step for step, _ in in_history(trainer)] == [4, 8]
    stored = json.loads((tmp_path / "out/checkpoint-4/trainer_state.json").read_text())
    assert [step for step, _ in stored["stateful_callbacks"][callback.state_key]["points"]] == [4]


def test_mixed_precision(task: Task, tmp_path: Path, tracking: str) -> None:
    """The trainer's autocast stays in place, and the measurement has the precision that it is configured for."""
    without = train(tmp_path / "plain", bf16=True, max_steps=4).seen
    callback = made(tmp_path, task)
    assert train(tmp_path / "out", [callback], bf16=True, max_steps=4).seen == without
    assert [step for step, _ in callback.session.curve] == [0, 2, 4]


def test_a_trainer_that_shows_no_list_is_measured_and_told(
    task: Task, tmp_path: Path, tracking: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Something else than the Trainer's own handler calls: it is said that reporters hear nothing."""
    logging.getLogger("pipeline").addHandler(caplog.handler)
    callback, args = made(tmp_path, task), TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to=[])
    state, control = TrainerState(), TrainerControl()
    callback.on_train_begin(args, state, control, model=make_model(), processing_class=OwnTokenizer())
    logging.getLogger("pipeline").removeHandler(caplog.handler)
    assert [one.message for one in caplog.records if "no list of the trainer's callbacks" in one.message]
    callback.on_epoch_begin(args, state, control, model=make_model())
    assert [step for step, _ in callback.session.curve] == [0]
    callback.session.close("FINISHED")


def test_sharded_trainings_are_refused_in_words(task: Task, tmp_path: Path) -> None:
    args = SimpleNamespace(hf_deepspeed_config=SimpleNamespace(is_zero3=lambda: True))
    with pytest.raises(ConfigError, match=r"sharded: .*needs all weights on a rank; use DDP for now"):
        made(tmp_path, task).on_init_end(args, None, None)


def test_bad_data_end_the_training_before_it_begins(task: Task, tmp_path: Path, tracking: str) -> None:
    task.dataset.train = "x999"
    with pytest.raises(DataError, match="x999"):
        train(tmp_path / "out", [made(tmp_path, task)])
    task.dataset.train = "x000"
    off = made(tmp_path, task, enabled=False)
    train(tmp_path / "out", [off], max_steps=2)
    assert off.session.curve == []


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Any:
    return both_ranks("trainer", tmp_path_factory.mktemp("ranks"), empty_database)


def test_two_ranks(ranks: Any) -> None:
    """Each rank is what it would have been; the best checkpoint, stop and resume are as in one process."""
    first, second = ranks
    for number, rank in enumerate(ranks):
        assert rank["with"][:-1] == rank["without"][:-1]  # then the best weights are loaded
        buffers = {(4, "weights")} if number else set()  # rank 0's are stored; DDP shares them in the first step
        assert differing(rank["resumed"][:-1], rank["without"][4:-1]) <= FRESH | buffers
    assert first["curve"] == second["curve"]
    curve = [(step, found[BEST]) for step, found in first["curve"]]
    assert [step for step, _ in curve] == [0, 2, 4, 6, 8]
    assert first["best"] == second["best"] == max(value for step, value in curve if step)
    assert first["points"] == first["curve"]
    history = [(entry["step"], entry[NAME]) for entry in second["history"] if NAME in entry]
    assert history == curve
