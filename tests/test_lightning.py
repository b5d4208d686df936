"""The callback in a real trainer: what it measures, when, where the numbers go, and what a checkpoint says."""

from __future__ import annotations

import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import pytest
import pytorch_lightning as pl
import torch
from mlflow import MlflowClient
from omegaconf import OmegaConf
from torch import nn
from transformers import AutoTokenizer, EsmForMaskedLM

from pipeline import (
    DownstreamValidation,
    LiveModel,
    Store,
    open_encoder,
    setup_dwnstr_task_validation_callbacks,
    validate,
)
from pipeline.config.task import Task
from pipeline.config.yaml_file import to_yaml
from pipeline.encoders.description import DESCRIPTION
from pipeline.errors import CheckpointError, ConfigError, DataError, PipelineError
from pipeline.score import Scores
from pipeline.statistics.metrics import is_shown_first
from tests.support.data import planted_task
from tests.support.lab import every_metric, newest_run
from tests.support.training import INERT, Busy, FromModule, WithMethod, loader, one_state, section, trainer


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return planted_task(tmp_path / "data", num_epochs=2)


@pytest.fixture
def module(model_folder: Any) -> Busy:
    folder = model_folder("esm")
    pl.seed_everything(5, verbose=False)
    return Busy(folder)


def callback_of(*args: Any, **options: Any) -> DownstreamValidation:
    (callback,) = setup_dwnstr_task_validation_callbacks(section(*args, **options))
    assert isinstance(callback, DownstreamValidation)
    return callback


def steps_of(callback: DownstreamValidation) -> list[int]:
    return [step for step, _ in callback.curve]


def measured(encoder: Any, task: Task, folder: Path) -> Scores:
    (scores,) = validate(encoder, task, Store(folder))
    return scores


def run_of(callback: DownstreamValidation) -> Any:
    key = callback.state_dict()["run"]
    assert key
    (run,) = MlflowClient().search_runs(["0"], f"tags.`pipeline.journal` = '{key}'")
    return run


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [4, 8]),
        ({"val_check_interval": 2}, [2, 4, 6, 8]),
        ({"val_check_interval": 0.25, "max_epochs": 1}, [1, 2, 3, 4]),
        ({"val_check_interval": 3, "check_val_every_n_epoch": None}, [3, 6]),
        ({"check_val_every_n_epoch": 2}, [8]),
        ({"accumulate_grad_batches": 2}, [2, 4]),
    ],
    ids=str,
)
def test_it_measures_at_every_validation(
    options: dict[str, Any], steps: list[int], task: Task, module: Busy, tmp_path: Path, tracking: str
) -> None:
    callback = callback_of(tmp_path, task)
    fit = trainer(tmp_path, [callback], **options)
    fit.fit(module, loader(), loader(shuffle=False))
    assert steps_of(callback) == steps
    run = run_of(callback)
    history = MlflowClient().get_metric_history(run.info.run_id, "test_label_accuracy")
    assert [one.step for one in history] == steps
    assert [one.value for one in history] == [metrics["test_label_accuracy"] for _, metrics in callback.curve]
    assert run.info.status == "FINISHED"
    assert fit.callback_metrics["test_label_accuracy"] == pytest.approx(history[-1].value)


def test_the_tokenizer_may_be_given(task: Task, module: Busy, tmp_path: Path, tracking: str) -> None:
    tokenizer: Any = module.tokenizer
    outer: Any = module
    outer.tokenizer = lambda *args, **options: tokenizer(*args, **options)  # it lives outside of the module
    with pytest.raises(CheckpointError, match=r"found none; give tokenizer=\.\.\."):
        trainer(tmp_path, [callback_of(tmp_path, task)]).fit(module, loader(), loader(shuffle=False))
    config = section(tmp_path, task)
    (callback,) = setup_dwnstr_task_validation_callbacks(config, tokenizer=tokenizer)
    assert isinstance(callback, DownstreamValidation)
    trainer(tmp_path, [callback], max_epochs=1).fit(module, loader(), loader(shuffle=False))
    assert steps_of(callback) == [4]


def test_the_untrained_and_the_final_weights(task: Task, module: Busy, tmp_path: Path, tracking: str) -> None:
    """`on_start` is step 0, before any step; `on_end` measures what no validation has."""
    untrained = measured(LiveModel(module).encoder(module), task, tmp_path / "a")
    callback = callback_of(tmp_path, task, on_start=True, on_end=True)
    options = {"max_steps": 5, "val_check_interval": 2, "check_val_every_n_epoch": None}
    trainer(tmp_path, [callback], **options).fit(module, loader(), loader(shuffle=False))
    assert steps_of(callback) == [0, 2, 4, 5]
    assert callback.curve[0][1] == untrained.metrics
    assert callback.curve[-1][1] == measured(LiveModel(module).encoder(module), task, tmp_path / "b").metrics


def test_the_numbers_are_those_of_the_command_line_and_of_python(
    task: Task, module: Busy, tmp_path: Path, tracking: str
) -> None:
    """To the last bit: callback, Python on the live module, Python on the `.ckpt`, the command line on the `.ckpt`."""
    from pipeline.__main__ import main

    callback = callback_of(tmp_path, task)
    keep = pl.callbacks.ModelCheckpoint(tmp_path / "kept", "{step}", monitor="step", mode="max", save_top_k=-1)
    trainer(tmp_path, [callback, keep]).fit(module, loader(), loader(shuffle=False))
    live = measured(LiveModel(module).encoder(module), task, tmp_path / "live")
    assert callback.curve[-1] == (8, live.metrics)
    (tmp_path / "task.yaml").write_text(to_yaml(section(tmp_path / "cli", task)))
    for step, metrics in callback.curve:
        path = tmp_path / "kept" / f"step={step}.ckpt"
        assert measured(open_encoder(str(path)), task, tmp_path / str(step)).metrics == metrics
        assert main(["main", f"--ckpt={path}", f"--config={tmp_path / 'task.yaml'}"]) == 0
        run = newest_run()
        assert run.info.run_name.startswith(f"step={step}: ")
        assert every_metric(run) == metrics
        assert run.data.metrics == {name: value for name, value in metrics.items() if is_shown_first(name)}


@pytest.mark.skipif(version("mlflow").startswith("3.1."), reason="MLflow 3.1 turns loggers off")
def test_a_difference_in_how_it_is_measured_is_said(
    task: Task, module: Busy, tmp_path: Path, tracking: str, caplog: pytest.LogCaptureFixture
) -> None:
    keep = pl.callbacks.ModelCheckpoint(tmp_path / "kept", "{step}")
    trainer(tmp_path, [callback_of(tmp_path, task), keep]).fit(module, loader(), loader(shuffle=False))
    path = str(tmp_path / "kept" / "step=8.ckpt")
    made_with = torch.load(path, weights_only=True)[DESCRIPTION]["made_with"]
    assert made_with["threads"] == torch.get_num_threads()
    assert made_with["precision"] == "fp32"
    with caplog.at_level(logging.WARNING):
        measured(open_encoder(path), task, tmp_path / "a")
        assert "in training" not in caplog.text
        validate(open_encoder(path), task, Store(tmp_path / "b", max_batch_tokens=64))
    found = f"max_batch_tokens {made_with['max_batch_tokens']}, here 64"
    assert (
        f"in training it was measured with {found}: scores may differ slightly from those of the training"
        in caplog.text
    )


def test_a_weights_only_checkpoint_describes_itself(task: Task, module: Busy, tmp_path: Path, tracking: str) -> None:
    """Lightning asks callbacks about whole checkpoints alone. Afterwards the trainer is as it was."""
    callback = callback_of(tmp_path, task)
    keep = pl.callbacks.ModelCheckpoint(tmp_path / "kept", "{step}", save_weights_only=True)
    fit = trainer(tmp_path, [callback, keep], max_epochs=1)
    io = fit.strategy.checkpoint_io
    fit.fit(module, loader(), loader(shuffle=False))
    assert fit.strategy.checkpoint_io is io
    fit.save_checkpoint(tmp_path / "kept" / "final.ckpt")
    for name in ("step=4.ckpt", "final.ckpt"):
        encoder = open_encoder(str(tmp_path / "kept" / name))
        assert callback.curve == [(4, measured(encoder, task, tmp_path / name).metrics)]


@pytest.mark.skipif(not hasattr(pl.callbacks, "EMAWeightAveraging"), reason="needs Lightning 2.6")
@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights_are_measured_wherever_the_callback_stands(
    first: bool, task: Task, module: Busy, tmp_path: Path, tracking: str
) -> None:
    """Lightning swaps them in for the validation; its `.ckpt` holds them, and scores the same."""
    callback = callback_of(tmp_path, task, on_end=True)
    average = pl.callbacks.EMAWeightAveraging(decay=0.5)
    keep = pl.callbacks.ModelCheckpoint(tmp_path / "kept", "{step}", save_top_k=-1)
    callbacks = [callback, average, keep] if first else [average, keep, callback]
    trainer(tmp_path, callbacks, max_epochs=1).fit(module, loader(), loader(shuffle=False))
    encoder = open_encoder(str(tmp_path / "kept" / "step=4.ckpt"))
    assert callback.curve == [(4, measured(encoder, task, tmp_path / "a").metrics)]
    stored = torch.load(tmp_path / "kept" / "step=4.ckpt", weights_only=True)
    key = "model.esm.embeddings.word_embeddings.weight"
    assert not torch.equal(stored["state_dict"][key], stored["current_model_state"][key])


def test_a_checkpoint_for_each_measurement(task: Task, module: Busy, tmp_path: Path, tracking: str) -> None:
    callback = callback_of(tmp_path, task, save=True, on_start=True)
    trainer(tmp_path, [callback]).fit(module, loader(), loader(shuffle=False))
    for step, metrics in callback.curve:
        encoder = open_encoder(str(tmp_path / "downstream" / f"step={step}.ckpt"))
        assert measured(encoder, task, tmp_path / str(step)).metrics == metrics
    assert steps_of(callback) == [0, 4, 8]


def test_a_checkpoint_for_a_class_of_the_users_own(
    task: Task, tmp_path: Path, tracking: str, model_folder: Any
) -> None:
    """With `save`, the class's `from_checkpoint` opens it; without, its `from_module` takes the live one."""

    class Keeps(Busy):
        def __init__(self, folder: str) -> None:
            super().__init__(Path(folder))
            self.save_hyperparameters()

    task.infer_target = "tests.support.training.FromModule"
    found = []
    for save in (False, True):
        model_folder("esm")
        pl.seed_everything(5, verbose=False)
        callback = callback_of(tmp_path, task, save=save, on_error="raise")
        trainer(tmp_path, [callback]).fit(Keeps(str(model_folder("esm"))), loader(), loader(shuffle=False))
        found.append(callback.curve)
    assert found[0] == found[1]


def test_the_modules_own_method_is_used(task: Task, tmp_path: Path, tracking: str, model_folder: Any) -> None:
    module = WithMethod(model_folder("esm"))
    callback = callback_of(tmp_path, task)
    trainer(tmp_path, [callback], max_epochs=1).fit(module, loader(), loader(shuffle=False))
    expected = measured(open_class(module), task, tmp_path / "a")
    assert callback.curve[0][1] == expected.metrics


def open_class(module: Busy) -> Any:
    from contextlib import nullcontext

    from pipeline.encoders.custom import CustomEncoder

    return CustomEncoder.from_module(FromModule, module.eval(), torch.device("cpu"), nullcontext, "")


@pytest.mark.skipif(not INERT, reason="Lightning 2.4 shows callbacks no checkpoint that is validated")
def test_validate_alone(task: Task, module: Busy, tmp_path: Path, tracking: str) -> None:
    """At the step of the checkpoint, in inference mode; the metrics are there for whoever asks."""
    keep = pl.callbacks.ModelCheckpoint(tmp_path / "kept", "{step}")
    first = callback_of(tmp_path, task)
    trainer(tmp_path, [first, keep], max_epochs=1).fit(module, loader(), loader(shuffle=False))
    second = callback_of(tmp_path, task)
    alone = trainer(tmp_path, [second, pl.callbacks.ModelCheckpoint(tmp_path / "kept", "{step}")])
    path = tmp_path / "kept" / "step=4.ckpt"
    alone.validate(module, loader(shuffle=False), ckpt_path=str(path), verbose=False, **INERT)
    assert second.curve == first.curve == [(4, first.curve[0][1])]
    assert alone.callback_metrics["test_label_accuracy"] == pytest.approx(first.curve[0][1]["test_label_accuracy"])


def test_nothing_runs_in_the_sanity_check(task: Task, module: Busy, tmp_path: Path, tracking: str) -> None:
    callback = callback_of(tmp_path, task)
    fit = trainer(tmp_path, [callback], limit_train_batches=0, max_epochs=1)
    fit.fit(module, loader(), loader(shuffle=False))
    assert callback.curve == []
    assert MlflowClient().search_runs(["0"]) == []


def test_fast_dev_run_tries_and_measures_nothing(task: Task, module: Busy, tmp_path: Path, tracking: str) -> None:
    callback = callback_of(tmp_path, task, on_start=True, on_end=True)
    trainer(tmp_path, [callback], fast_dev_run=True).fit(module, loader(), loader(shuffle=False))
    assert callback.curve == []


class NoModel(Busy):
    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        self.layer = nn.Linear(2, 2)


def build(kind: str, folder: Path) -> Any:
    module: Any = Busy(folder)
    if kind == "no model":
        return NoModel()
    if kind == "two models":
        module.teacher = EsmForMaskedLM.from_pretrained(folder)
    if kind == "no tokenizer":
        del module.tokenizer
    if kind == "two tokenizers":
        module.second = AutoTokenizer.from_pretrained(folder)
    return module


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no model", "NoModel: expected one Hugging Face model, found none; give the module a method hidden_states"),
        ("two models", "expected one Hugging Face model, found model, teacher; give"),
        ("no tokenizer", "expected one Hugging Face tokenizer in the module, found none; give tokenizer=..., keep it"),
        ("two tokenizers", "expected one Hugging Face tokenizer in the module, found 2: "),
    ],
)
def test_what_cannot_be_found_is_an_error_at_setup(
    kind: str, message: str, task: Task, tmp_path: Path, tracking: str, model_folder: Any
) -> None:
    module = build(kind, model_folder("esm"))
    with pytest.raises(CheckpointError, match=message):
        trainer(tmp_path, [callback_of(tmp_path, task)]).fit(module, loader(), loader(shuffle=False))
    assert MlflowClient().search_runs(["0"]) == []


def test_a_short_name_that_does_not_fit_is_an_error(task: Task, module: Busy, tmp_path: Path, tracking: str) -> None:
    task.infer_target = "prott5"
    with pytest.raises(CheckpointError, match="'prott5' is for t5 or mt5, but the model in Busy is esm; use auto"):
        trainer(tmp_path, [callback_of(tmp_path, task)]).fit(module, loader(), loader(shuffle=False))


def test_data_errors_come_before_the_first_step(task: Task, module: Busy, tmp_path: Path, tracking: str) -> None:
    path = tmp_path / "data" / "train" / "x000.csv"
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([header, "M" + rows[0], *rows[1:]]))
    with pytest.raises(DataError, match=r"x000.csv:2: column 'label'"):
        trainer(tmp_path, [callback_of(tmp_path, task)]).fit(module, loader(), loader(shuffle=False))


def test_a_sequence_that_the_encoder_cannot_read_is_an_error_at_setup(
    task: Task, module: Busy, tmp_path: Path, tracking: str
) -> None:
    path = tmp_path / "data" / "test" / "x000.csv"
    path.write_text(path.read_text() + '1111,nnnn,1111,"[0, 0, 0, 0]"\n')
    with pytest.raises(DataError, match="expected a sequence with characters the encoder knows, found '1111'"):
        trainer(tmp_path, [callback_of(tmp_path, task)], num_sanity_val_steps=0).fit(module, loader(), loader())


@pytest.mark.parametrize(
    ("kind", "target", "error"),
    [
        (Busy, "tests.support.training.Typo", "'tests.support.training.Typo' is neither a short name nor a class"),
        (Busy, "tests.support.training.Recorder", "tests.support.training.Recorder has no from_checkpoint"),
        (WithMethod, "auto", "a checkpoint of WithMethod cannot be opened again; set model_factory"),
    ],
)
def test_save_needs_a_way_back(
    kind: type[Busy], target: str, error: str, task: Task, tmp_path: Path, tracking: str, model_folder: Any
) -> None:
    task.infer_target = target
    with pytest.raises(PipelineError, match=error):
        callback = callback_of(tmp_path, task, save=True)
        trainer(tmp_path, [callback]).fit(kind(model_folder("esm")), loader(), loader(shuffle=False))


def test_weights_that_did_not_change_are_logged_all_the_same(
    task: Task, module: Busy, tmp_path: Path, tracking: str
) -> None:
    """Two validations between two optimiser steps: one LoggedModel, and each point of the curve."""
    callback = callback_of(tmp_path, task)
    options = {"accumulate_grad_batches": 2, "val_check_interval": 1, "max_epochs": 1}
    trainer(tmp_path, [callback], **options).fit(module, loader(), loader(shuffle=False))
    assert steps_of(callback) == [0, 1, 1, 2]
    run = run_of(callback)
    history = MlflowClient().get_metric_history(run.info.run_id, "test_label_accuracy")
    assert [(one.step, one.value) for one in history] == [(s, m["test_label_accuracy"]) for s, m in callback.curve]
    assert len(MlflowClient().search_logged_models(["0"])) == 3


@pytest.mark.skipif(not INERT, reason="Lightning 2.4 shows callbacks no checkpoint that is validated")
def test_the_best_checkpoint_validated_after_fit(task: Task, module: Busy, tmp_path: Path, tracking: str) -> None:
    """Its numbers are logged at its own step, not at the last one."""
    callback = callback_of(tmp_path, task)
    keep = pl.callbacks.ModelCheckpoint(tmp_path / "kept", "{step}", monitor="step", mode="min")
    fit = trainer(tmp_path, [callback, keep])
    fit.fit(module, loader(), loader(shuffle=False))
    fit.validate(module, loader(shuffle=False), ckpt_path="best", verbose=False, **INERT)
    assert steps_of(callback) == [4, 8, 4]
    assert callback.curve[0] == callback.curve[2]
    fit.fit_loop.max_epochs = 3
    fit.fit(module, loader(), loader(shuffle=False))
    assert steps_of(callback) == [4, 8, 4, 12]


def test_one_callback_in_two_trainings(task: Task, tmp_path: Path, tracking: str, model_folder: Any) -> None:
    """As in cross-validation: each has its own run, and its own count of validations."""
    callback = callback_of(tmp_path, task, every_n_validations=2)
    runs = []
    for _ in range(2):
        trainer(tmp_path, [callback], max_epochs=3).fit(Busy(model_folder("esm")), loader(), loader(shuffle=False))
        runs.append(run_of(callback).info.run_id)
    assert steps_of(callback) == [4, 12, 4, 12]
    assert len(set(runs)) == 2


def test_a_subclass_of_the_trainer_can_save(task: Task, module: Busy, tmp_path: Path, tracking: str) -> None:
    class Mine(pl.Trainer):
        pass

    callback = callback_of(tmp_path, task, save=True, on_error="raise")
    options: dict[str, Any] = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    Mine(callbacks=[callback], **options, **quiet).fit(module, loader(), loader(shuffle=False))
    stored = torch.load(tmp_path / "downstream" / "step=4.ckpt", weights_only=True)
    assert stored["pytorch-lightning_version"] == version("pytorch-lightning")


def test_two_mlflow_loggers(task: Task, module: Busy, tmp_path: Path, tracking: str, empty_database: Path) -> None:
    """The first one's run has the models; the second, on another server, is a mirror."""
    other = tmp_path / "other.db"
    other.write_bytes(empty_database.read_bytes())
    loggers = [
        pl.loggers.MLFlowLogger("mine", tracking_uri=tracking),
        pl.loggers.MLFlowLogger("theirs", tracking_uri=f"sqlite:///{other}"),
    ]
    callback = callback_of(tmp_path, task)
    trainer(tmp_path, [callback], logger=loggers).fit(module, loader(), loader(shuffle=False))
    for uri, one, models in ((tracking, loggers[0], 2), (f"sqlite:///{other}", loggers[1], 0)):
        client = MlflowClient(uri)
        history = client.get_metric_history(str(one.run_id), "test_label_accuracy")
        assert [point.step for point in history] == [4, 8]
        assert len(client.search_logged_models([str(one.experiment_id)])) == models


def test_views_of_one_buffer(task: Task, tmp_path: Path, tracking: str, model_folder: Any) -> None:
    """A method that hands out the same memory again is read before it does."""

    class Reuses(Busy):
        copies = False

        def hidden_states(self, sequences: Any) -> list[Any]:
            if not hasattr(self, "space"):
                self.space = torch.empty(5000, self.out.in_features)
            states, place = [], 0
            for sequence in sequences:
                state = one_state(self.model, self.tokenizer, sequence)
                view = self.space[place : place + len(state)]
                view.copy_(state)
                place += len(state)
                states.append(view.clone() if self.copies else view)
            return states

    found = []
    for copies in (False, True):
        model_folder("esm")
        pl.seed_everything(5, verbose=False)
        module = Reuses(model_folder("esm"))
        module.copies = copies
        callback = callback_of(tmp_path, task, on_error="raise")
        trainer(tmp_path, [callback], max_epochs=1).fit(module, loader(), loader(shuffle=False))
        found.append(callback.curve)
    assert found[0] == found[1]


def test_a_module_that_builds_its_model_late(task: Task, tmp_path: Path, tracking: str, model_folder: Any) -> None:
    class Late(Busy):
        def __init__(self) -> None:
            super().__init__(model_folder("esm"))
            self.kept = {"model": self.model}
            self.model = None

        def setup(self, stage: str) -> None:
            self.model = self.kept["model"]

    callback = callback_of(tmp_path, task)
    trainer(tmp_path, [callback], max_epochs=1).fit(Late(), loader(), loader(shuffle=False))
    assert steps_of(callback) == [4]


def test_child_runs(task: Task, module: Busy, tmp_path: Path, tracking: str) -> None:
    callback = callback_of(tmp_path, task, child_runs=True)
    trainer(tmp_path, [callback]).fit(module, loader(), loader(shuffle=False))
    run, client = run_of(callback), MlflowClient()
    children = client.search_runs(["0"], f"tags.mlflow.parentRunId = '{run.info.run_id}'")
    assert sorted(one.info.run_name for one in children) == [f"step={step} on {task.task_name}" for step in (4, 8)]
    for one in children:
        every = dict(callback.curve)[int(one.info.run_name.split()[0].removeprefix("step="))]
        assert one.data.metrics == {name: value for name, value in every.items() if is_shown_first(name)}
        tags = {name: text for name, text in one.data.tags.items() if name.startswith("downstream.")}
        assert tags["downstream.step"] == one.info.run_name.split()[0].removeprefix("step=")
        assert tags["downstream.tasks"] == task.task_name
        assert len(tags["downstream.checkpoint"]) == 16
        own = {"ckpt.digest": tags["downstream.checkpoint"], "ckpt.source": "live weights"}
        assert one.data.params == {**run.data.params, **own, "ckpt.step": tags["downstream.step"]}
        stages = client.search_runs(["0"], f"tags.mlflow.parentRunId = '{one.info.run_id}'")
        (scored,) = [stage.data.metrics for stage in stages if stage.info.run_name == "score"]
        assert {name: value for name, value in every.items() if "_delta_" not in name}.items() <= (
            scored.items() | one.data.metrics.items()
        )
        assert {stage.info.run_name for stage in stages} == {"load", "embed", "train_head", "score"}
        assert {stage.info.status for stage in stages} == {"FINISHED"}


def test_a_trainings_run_has_every_metric_and_lists_the_main_ones_first(
    task: Task, module: Busy, tmp_path: Path, tracking: str
) -> None:
    callback = callback_of(tmp_path, [task])
    trainer(tmp_path, [callback]).fit(module, loader(), loader(shuffle=False))
    run = run_of(callback)
    assert dict(callback.curve)[8].items() <= run.data.metrics.items()
    listed = [name for name in run.data.metrics if name in callback.curve[0][1]]
    first = [name for name in listed if is_shown_first(name)]
    assert 0 < len(first) < len(listed)
    assert listed[: len(first)] == first
    tags = {name: text for name, text in run.data.tags.items() if name.startswith("downstream.")}
    assert tags["downstream.kind"] == "training"
    assert tags["downstream.tasks"] == task.task_name
    assert tags[f"downstream.verdict.{task.task_name}"]


def test_the_run_of_the_trainers_own_logger_is_used(task: Task, module: Busy, tmp_path: Path, tracking: str) -> None:
    """With a LoggedModel for each step, the data sets once, the configuration, and the other loggers as mirrors."""
    loggers: list[Any] = [
        pl.loggers.MLFlowLogger("mine", tracking_uri=tracking),
        pl.loggers.CSVLogger(tmp_path, name="", version="csv"),
    ]
    callback = callback_of(tmp_path, [task])
    trainer(tmp_path, [callback], logger=loggers).fit(module, loader(), loader(shuffle=False))
    client = MlflowClient()
    run = client.get_run(loggers[0].run_id)
    assert callback.state_dict()["run"] is None
    name = f"{task.task_name}/test_label_accuracy"
    history = client.get_metric_history(run.info.run_id, name)
    assert [(one.step, one.value) for one in history] == [(step, metrics[name]) for step, metrics in callback.curve]
    models = client.search_logged_models([run.info.experiment_id], order_by=[{"field_name": f"metrics.`{name}`"}])
    assert {one.name for one in models} == {"step=4", "step=8"}
    assert all(one.source_run_id == run.info.run_id for one in models)
    assert len(run.inputs.dataset_inputs) == 2  # type: ignore[union-attr]
    assert run.data.params["cfg.dataset.0.num_epochs"] == "2"
    names = {one.path for one in client.list_artifacts(run.info.run_id, "downstream")}
    assert names == {f"downstream/{one}" for one in ("config.yaml", "step=4", "step=8")}
    rows = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()
    column, when = rows[0].split(",").index(name), rows[0].split(",").index("step")
    mirrored = [
        (int(row.split(",")[when]), float(row.split(",")[column])) for row in rows[1:] if row.split(",")[column]
    ]
    assert mirrored == [(step, metrics[name]) for step, metrics in callback.curve]


def test_notes_of_a_measurement_are_kept(task: Task, module: Busy, tmp_path: Path, tracking: str) -> None:
    task.max_rows.test = 5
    callback = callback_of(tmp_path, task)
    trainer(tmp_path, [callback], max_epochs=1).fit(module, loader(), loader(shuffle=False))
    text = mlflow.artifacts.load_text(f"{run_of(callback).info.artifact_uri}/downstream/step=4/notes.md")
    assert "- downstream: test: max_rows takes 5 of 30 sequences" in text.splitlines()


def test_the_active_run_and_the_named_run_are_used(
    task: Task, module: Busy, tmp_path: Path, tracking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mlflow.start_run() as active:
        trainer(tmp_path, [callback_of(tmp_path, task)], max_epochs=1).fit(module, loader(), loader(shuffle=False))
        assert MlflowClient().get_run(active.info.run_id).info.status == "RUNNING"
    named = MlflowClient().create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", named)
    trainer(tmp_path, [callback_of(tmp_path, task)], max_epochs=1).fit(module, loader(), loader(shuffle=False))
    for run_id in (active.info.run_id, named):
        assert MlflowClient().get_metric_history(run_id, "test_label_accuracy")[0].step == 4
    assert len(MlflowClient().search_runs(["0"])) == 2


def test_trackers_that_fail_only_warn(
    task: Task,
    module: Busy,
    tmp_path: Path,
    tracking: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Broken(pl.loggers.CSVLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            if "test_label_accuracy" in metrics:
                raise OSError("no space left")
            super().log_metrics(metrics, step)

    mlflow.set_tracking_uri("nowhere://there")
    callback = callback_of(tmp_path, task, on_error="raise")
    fit = trainer(tmp_path, [callback], logger=Broken(tmp_path, name="", version="csv"))
    fit.fit(module, loader(), loader(shuffle=False))
    assert steps_of(callback) == [4, 8]
    assert caplog.text.count("MLflow does not answer (Model registry functionality is unavailable") == 1
    assert caplog.text.count("Broken failed, work goes on: OSError: no space left") == 2


def test_a_failure_is_logged_with_its_step(
    task: Task, module: Busy, tmp_path: Path, tracking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise DataError("injected")

    class Saboteur(pl.Callback):
        def on_train_epoch_start(self, fit: pl.Trainer, pl_module: Any) -> None:
            if fit.current_epoch == 1:
                monkeypatch.setattr("pipeline.validation.score", fail)

    callback = callback_of(tmp_path, task)
    fit = trainer(tmp_path, [callback, Saboteur()], max_epochs=3)
    with pytest.warns(UserWarning, match="failed at step (8|12), training goes on: injected"):
        fit.fit(module, loader(), loader(shuffle=False))
    assert steps_of(callback) == [4]
    run = run_of(callback)
    assert run.data.tags["downstream.failed.step 8"] == "injected"
    assert run.info.status == "FINISHED"


def test_a_resumed_training_continues_its_run(task: Task, tmp_path: Path, tracking: str, model_folder: Any) -> None:
    """The validations are counted on, the MLflow run goes on, and each point is that of its checkpoint."""
    keep: dict[str, Any] = {"dirpath": tmp_path / "kept", "filename": "{step}", "save_top_k": -1}
    first = callback_of(tmp_path, task, every_n_validations=2)
    one = trainer(tmp_path, [first, pl.callbacks.ModelCheckpoint(**keep)], max_epochs=2)
    one.fit(Busy(model_folder("esm")), loader(), loader(shuffle=False))
    second = callback_of(tmp_path, task, every_n_validations=2, on_start=True)
    two = trainer(tmp_path, [second, pl.callbacks.ModelCheckpoint(**keep)], max_epochs=5)
    path = str(tmp_path / "kept" / "step=8.ckpt")
    two.fit(Busy(model_folder("esm")), loader(), loader(shuffle=False), ckpt_path=path, **INERT)
    assert (steps_of(first), steps_of(second)) == ([4], [12, 20])
    (run,) = MlflowClient().search_runs(["0"])
    history = MlflowClient().get_metric_history(run.info.run_id, "test_label_accuracy")
    assert [point.step for point in history] == [4, 12, 20]
    for step, metrics in first.curve + second.curve:
        encoder = open_encoder(str(tmp_path / "kept" / f"step={step}.ckpt"))
        assert measured(encoder, task, tmp_path / str(step)).metrics == metrics


def test_embeddings_of_live_weights_go_unless_they_are_kept(
    task: Task, module: Busy, tmp_path: Path, tracking: str
) -> None:
    for keep in (False, True):
        trainer(tmp_path, [callback_of(tmp_path, task, keep_embeddings=keep)]).fit(
            module, loader(), loader(shuffle=False)
        )
        kept = [one for part in ("embeddings", "live") for one in (tmp_path / "store" / part).rglob("*.parquet")]
        assert len(kept) == (2 if keep else 0)
    assert list((tmp_path / "store" / "live").iterdir()) == []


def test_every_form_of_configuration(task: Task, tmp_path: Path) -> None:
    config = section(tmp_path, task)
    path = tmp_path / "task.yaml"
    path.write_text(to_yaml(config))
    tree = OmegaConf.load(path)
    OmegaConf.set_readonly(tree, True)
    forms: list[Any] = [config, path, str(path), tree, OmegaConf.to_container(tree)]
    for form in forms:
        (callback,) = setup_dwnstr_task_validation_callbacks(form)
        assert callback.config == config  # type: ignore[attr-defined]


def test_a_disabled_section_gives_no_callback(task: Task, tmp_path: Path) -> None:
    assert setup_dwnstr_task_validation_callbacks(section(tmp_path, task, enabled=False)) == []


def test_a_wrong_configuration_is_an_error_at_once(task: Task, tmp_path: Path) -> None:
    for options, message in (
        ({"on_error": "ignore"}, "on_error: expected one of warn, raise, found 'ignore'"),
        ({"every_n_validations": 0}, "every_n_validations is 0, expected at least 1"),
        ({"timeout": 0.0}, "timeout is 0.0, expected more than 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            callback_of(tmp_path, task, **options)
    with pytest.raises(ConfigError, match="cfg: unknown key 'every_n_validation'; did you mean 'every_n_validations'"):
        setup_dwnstr_task_validation_callbacks(
            {"model": {"dwnstr_task_validation": {"dataset": {}, "every_n_validation": 1}}}
        )


def test_float64_and_half_modules(task: Task, tmp_path: Path, tracking: str, model_folder: Any) -> None:
    """Weights of another dtype are measured in float32, as from a `.ckpt`, and stay what they are."""
    for precision, dtype in (("bf16-true", torch.bfloat16), ("64-true", torch.float64)):
        module = Busy(model_folder("esm"))
        callback = callback_of(tmp_path, task, on_error="raise")
        keep = pl.callbacks.ModelCheckpoint(tmp_path / precision, "{step}")
        fit = trainer(tmp_path, [callback, keep], precision=precision, max_epochs=1)
        fit.fit(module, loader(), loader(shuffle=False))
        assert {value.dtype for value in module.parameters()} == {dtype}
        encoder = open_encoder(str(tmp_path / precision / "step=4.ckpt"))
        assert callback.curve == [(4, measured(encoder, task, tmp_path / f"{precision} again").metrics)]
