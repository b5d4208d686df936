"""A training with the callback is bit for bit the training without it, whatever the measurement does."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from pipeline import JournalLogger, setup_dwnstr_task_validation_callbacks, untouched, validation
from pipeline.config.task import Task
from pipeline.config.trackers import Logging
from pipeline.errors import DataError
from tests.support.data import planted_task
from tests.support.programs import run_two_ranks
from tests.support.training import Busy, Recorder, WithMethod, loader, section, trainer

HARD = {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "val_check_interval": 2}
STAGES = {"load": "data_of", "embed": "embed", "train_head": "train_head", "score": "score"}


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return planted_task(tmp_path / "data", num_epochs=1)


def train(module: Busy, folder: Path, callbacks: list[Any], **options: Any) -> Recorder:
    recorder = Recorder()
    trainer(folder, [*callbacks, recorder], **{**HARD, **options}).fit(module, loader(), loader(shuffle=False))
    return recorder


@pytest.fixture(scope="module")
def undisturbed(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[type, Recorder]:
    folder = tmp_path_factory.mktemp("plain")
    found: dict[type, Recorder] = {}
    model_folder("esm")  # is made by chance, once
    for kind in (Busy, WithMethod):
        pl.seed_everything(3, verbose=False)
        found[kind] = train(kind(model_folder("esm")), folder, [])
    return found


def same(one: Recorder, other: Recorder) -> None:
    assert len(one.states) == len(other.states) == 8
    for left, right in zip([*one.states, one.end], [*other.states, other.end], strict=True):
        assert left == right


def test_the_journal_changes_nothing(
    task: Task, tmp_path: Path, tracking: str, undisturbed: Any, model_folder: Any
) -> None:
    """Neither do the pictures, nor the thread that sends, which MLflow would have draw a run's name by chance."""
    config = section(tmp_path, task, on_start=True, on_error="raise", logging=Logging())
    callbacks = setup_dwnstr_task_validation_callbacks(config)
    pl.seed_everything(3, verbose=False)
    logger = JournalLogger(journal=tmp_path / "journal.jsonl")
    recorder = train(Busy(model_folder("esm")), tmp_path, callbacks, logger=logger, log_every_n_steps=1)
    same(recorder, undisturbed[Busy])


@pytest.mark.parametrize(
    ("kind", "target", "save"),
    [
        (Busy, "auto", False),
        (Busy, "auto", True),
        (WithMethod, "auto", False),
        (Busy, "tests.support.training.FromModule", False),
    ],
    ids=["hugging face", "saved", "own method", "own class"],
)
def test_training_is_the_same(
    kind: type[Busy],
    target: str,
    save: bool,
    task: Task,
    tmp_path: Path,
    tracking: str,
    undisturbed: Any,
    model_folder: Any,
) -> None:
    task.infer_target = target
    config = section(tmp_path, task, on_start=True, on_end=True, on_error="raise", save=save)
    callbacks = setup_dwnstr_task_validation_callbacks(config)
    pl.seed_everything(3, verbose=False)
    recorder = train(kind(model_folder("esm")), tmp_path, callbacks)
    assert [step for step, _ in callbacks[0].curve] == [0, 1, 2, 3, 4]  # type: ignore[attr-defined]
    same(recorder, undisturbed[kind])


@pytest.mark.parametrize("stage", STAGES)
def test_training_is_the_same_when_a_stage_fails(
    stage: str,
    task: Task,
    tmp_path: Path,
    tracking: str,
    undisturbed: Any,
    model_folder: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        random.random()
        np.random.rand()
        torch.rand(1)
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float64)
        raise RuntimeError("injected")

    class Saboteur(pl.Callback):  # after the sanity check, which would find out
        def on_train_start(self, *_: Any) -> None:
            monkeypatch.setattr(validation, STAGES[stage], fail)

    callbacks = setup_dwnstr_task_validation_callbacks(section(tmp_path, task, on_end=True))
    pl.seed_everything(3, verbose=False)
    with pytest.warns(UserWarning, match="failed at step [1-4], training goes on: RuntimeError: injected"):
        recorder = train(WithMethod(model_folder("esm")), tmp_path, [*callbacks, Saboteur()])
    assert callbacks[0].curve == []  # type: ignore[attr-defined]
    same(recorder, undisturbed[WithMethod])


def test_on_error_raise_ends_the_training(
    task: Task, tmp_path: Path, tracking: str, model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise DataError("injected")

    callbacks = setup_dwnstr_task_validation_callbacks(section(tmp_path, task, on_error="raise"))
    monkeypatch.setattr(validation, "train_head", fail)
    with pytest.raises(DataError, match="injected"):
        train(Busy(model_folder("esm")), tmp_path, callbacks)


def test_nothing_is_compiled_anew(task: Task, tmp_path: Path, tracking: str, model_folder: Any) -> None:
    """The training graph is compiled as often with the callback as without it, and the weights are the same."""
    counts, ends = [], []
    for measured in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        callbacks = setup_dwnstr_task_validation_callbacks(section(tmp_path, task)) if measured else []
        pl.seed_everything(3, verbose=False)
        module = Busy(model_folder("esm"), compiled=True)
        ends.append(train(module, tmp_path, callbacks, precision="32-true").end)
        counts.append(dict(torch._dynamo.utils.counters["stats"]))
    assert counts[0] == counts[1]
    assert counts[0]["unique_graphs"] > 0
    assert ends[0] == ends[1]


def test_untouched_puts_everything_back() -> None:
    module: Any = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.Dropout())
    module[1].requires_grad_(False)
    module[2].eval()
    module[1].register_buffer("cache", None)
    names = list(module.state_dict())
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with pytest.raises(KeyError, match="within"), torch.inference_mode(), untouched(module):
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
        assert not any(one.training for one in module.modules())
        module.train().requires_grad_(True)
        module(torch.rand(4, 2))
        module[0].register_buffer("running_var", torch.zeros(2))
        module[1].cache = torch.zeros(2)
        module[1].register_buffer("new", torch.zeros(2))
        raise KeyError("within")
    assert list(module.state_dict()) == names
    assert [one.training for one in module.modules()] == [True, True, True, False]
    assert [one.requires_grad for one in module.parameters()] == [True, True, False, False]
    assert module[0].running_mean.tolist() == [0, 0]
    assert module[0].running_var.tolist() == [1, 1]
    assert module[0].num_batches_tracked == 0
    assert torch.equal(torch.rand(3), expected)


def test_parts_of_tensors_are_put_back_without_the_other_rank(tmp_path: Path) -> None:
    """A measurement may fail on one rank alone, while the other is elsewhere."""
    codes = run_two_ranks("tests.support.untouched_ranks", [str(tmp_path)], tmp_path)
    assert codes == [0, 0], "".join(log.read_text()[-2000:] for log in tmp_path.glob("*.log"))
    for rank in (0, 1):
        assert json.loads((tmp_path / f"rank-{rank}.json").read_text()) == [[0.0, 0.0], [1.0, 1.0]]
